//! Time from a cancellation to the end of the running request, as its submitter observes it.

use anyhow::bail;
use streamer_client::{ServerMessage, Session};
use tokio::time::Instant;

use super::{
    load_target::LoadTarget,
    report::{Report, histogram, record},
};

pub(super) async fn run(target: &LoadTarget, count: usize) -> anyhow::Result<Report> {
    let mut session = Session::connect(&target.url, &target.token).await?;
    session.next_text().await?;
    let mut latencies = histogram();
    for number in 0..count {
        let id = format!("cancel-{number}");
        session
            .send(format!(
                r#"{{"id":"{id}","action":"echo_async","payload":{{"steps":1,"delay_ms":3600000}}}}"#
            ))
            .await?;
        read_until(&mut session, "started").await?;
        let cancel_time = Instant::now();
        session.send(format!(r#"{{"type":"cancel","request_id":"{id}"}}"#)).await?;
        read_until(&mut session, "cancelled").await?;
        record(&mut latencies, cancel_time.elapsed());
    }
    let mut report = Report::new("cancel");
    report.figure("requests", count, "");
    report.latencies(&latencies);
    Ok(report)
}

/// Reads messages up to the first one of the given type.
async fn read_until(session: &mut Session, kind: &str) -> anyhow::Result<()> {
    loop {
        let received = session.next().await?;
        if received.message.kind() == kind {
            return Ok(());
        }
        if let ServerMessage::Error(_) | ServerMessage::Complete(_) = received.message {
            bail!("expected {kind}, received {}", received.text);
        }
    }
}
