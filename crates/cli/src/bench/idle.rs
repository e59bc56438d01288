//! Memory of connections that do nothing.

use std::time::Duration;

use anyhow::Context;
use streamer_client::{ClientError, Session};
use tokio::{task::JoinSet, time::sleep};

use super::{Report, Subject};

/// Connections that are being opened at once.
const AT_ONCE: usize = 64;
/// Small, since nothing is read.
const READ_BUFFER: usize = 512;
/// What the server did to open them is over by then.
const SETTLE: Duration = Duration::from_secs(2);
/// Opened and closed beforehand, so that what the server keeps for good is there already.
const REHEARSAL: usize = 200;

pub(super) async fn run(subject: &Subject, connections: usize) -> anyhow::Result<Report> {
    let server = subject.own.as_ref().context("memory is measured of a server of our own only")?;
    drop(open(subject, REHEARSAL).await?);
    sleep(SETTLE).await;
    let before = server.resident_bytes()?;
    let mut sessions = open(subject, connections).await?;
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
    // They are there and answer.
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

async fn open(subject: &Subject, connections: usize) -> anyhow::Result<Vec<Session>> {
    let mut opening: JoinSet<Result<Session, ClientError>> = JoinSet::new();
    let mut sessions = Vec::with_capacity(connections);
    for _ in 0..connections {
        if opening.len() == AT_ONCE
            && let Some(opened) = opening.join_next().await
        {
            sessions.push(opened??);
        }
        let (url, token) = (subject.url.clone(), subject.token.clone());
        opening.spawn(async move {
            let mut session = Session::connect_with_buffers(&url, &token, READ_BUFFER).await?;
            session.next_text().await?;
            Ok(session)
        });
    }
    while let Some(opened) = opening.join_next().await {
        sessions.push(opened??);
    }
    Ok(sessions)
}
