//! From asking for cancellation to the end of a running request, as its submitter sees it.

use anyhow::bail;
use streamer_client::Session;
use tokio::time::Instant;

use super::{
    Report, Subject,
    report::{histogram, record},
};

pub(super) async fn run(subject: &Subject, count: usize) -> anyhow::Result<Report> {
    let mut session = Session::connect(&subject.url, &subject.token).await?;
    session.next_text().await?;
    let mut latencies = histogram();
    for number in 0..count {
        let id = format!("cancel-{number}");
        session
            .send(format!(
                r#"{{"id":"{id}","action":"echo_async","payload":{{"steps":1,"delay_ms":3600000}}}}"#
            ))
            .await?;
        until(&mut session, "started").await?;
        let asked = Instant::now();
        session.send(format!(r#"{{"type":"cancel","request_id":"{id}"}}"#)).await?;
        until(&mut session, "cancelled").await?;
        record(&mut latencies, asked.elapsed());
    }
    let mut report = Report::new("cancel");
    report.figure("requests", count, "");
    report.latencies(&latencies);
    Ok(report)
}

async fn until(session: &mut Session, kind: &str) -> anyhow::Result<()> {
    loop {
        let message = session.next().await?;
        if message.kind == kind {
            return Ok(());
        }
        if matches!(message.kind.as_str(), "error" | "complete") {
            bail!("{} came instead of {kind}", message.text);
        }
    }
}
