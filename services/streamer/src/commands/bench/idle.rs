//! Memory of idle connections.

use std::time::Duration;

use anyhow::Context;
use streamer_client::{ClientError, Session};
use tokio::{task::JoinSet, time::sleep};

use super::{load_target::LoadTarget, report::Report};

/// Maximum number of concurrent handshakes.
const MAX_OPENING: usize = 64;
/// Size of the client's read buffer, in bytes; small, because the client reads very little.
const READ_BUFFER: usize = 512;
/// Time allowed for the server to free the memory of handshakes.
const SETTLE: Duration = Duration::from_secs(2);
/// Number of connections to open and close before the measurement, so that the server has allocated the memory
/// that it never frees.
const WARM_UP_CONNECTIONS: usize = 200;

pub(super) async fn run(target: &LoadTarget, connections: usize) -> anyhow::Result<Report> {
    let server = target.process.as_ref().context("bench idle does not support --server")?;
    drop(open(target, WARM_UP_CONNECTIONS).await?);
    sleep(SETTLE).await;
    let before = server.resident_bytes()?;
    let mut sessions = open(target, connections).await?;
    sleep(SETTLE).await;
    let after = server.resident_bytes()?;
    let mut report = Report::new("idle");
    report.figure("connections", connections, "");
    report.figure("resident before", before / 1024, "KiB");
    report.figure("resident after", after / 1024, "KiB");
    report.figure(
        "resident each",
        after.saturating_sub(before) / connections.max(1) as u64,
        "bytes",
    );
    // Verify that all connections are still open.
    let mut faults = 0;
    for session in &mut sessions {
        session.send(r#"{"type":"ping"}"#).await?;
        if !session.next_text().await?.starts_with("{\"type\":\"pong\"") {
            faults += 1;
        }
    }
    report.add_faults(faults);
    Ok(report)
}

async fn open(target: &LoadTarget, connections: usize) -> anyhow::Result<Vec<Session>> {
    let mut opening: JoinSet<Result<Session, ClientError>> = JoinSet::new();
    let mut sessions = Vec::with_capacity(connections);
    for _ in 0..connections {
        if opening.len() == MAX_OPENING
            && let Some(opened) = opening.join_next().await
        {
            sessions.push(opened??);
        }
        let (url, token) = (target.url.clone(), target.token.clone());
        opening.spawn(async move {
            let mut session = Session::connect_with_read_buffer(&url, &token, READ_BUFFER).await?;
            session.next_text().await?;
            Ok(session)
        });
    }
    while let Some(opened) = opening.join_next().await {
        sessions.push(opened??);
    }
    Ok(sessions)
}
