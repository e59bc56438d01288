//! Events of running requests to those who watch.

use std::time::Duration;

use anyhow::bail;
use streamer_client::{ClientError, Session};
use tokio::time::{Instant, timeout};

use super::{Report, Subject, seq_of};

/// Requests begin so long after they are submitted, and longer by as much for each watcher: all
/// have subscribed by then.
const HEAD_START: Duration = Duration::from_millis(500);
const HEAD_START_EACH: Duration = Duration::from_micros(500);
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Clone, Copy)]
pub(super) struct Load {
    pub(super) requests: usize,
    pub(super) watchers: usize,
    pub(super) events: u32,
    pub(super) delay_ms: u32,
}

pub(super) async fn run(subject: &Subject, load: Load) -> anyhow::Result<Report> {
    let total = load.requests * load.watchers;
    let mut sessions = Vec::with_capacity(total);
    for _ in 0..total {
        let mut session = Session::connect(&subject.url, &subject.token).await?;
        session.next_text().await?;
        sessions.push(session);
    }
    let head_start =
        HEAD_START + HEAD_START_EACH * u32::try_from(total + load.requests * 4).unwrap_or(u32::MAX);
    submit_all(subject, load, head_start).await?;
    let before = subject.processor_ms();
    let mut tasks = Vec::with_capacity(total);
    for (position, session) in sessions.into_iter().enumerate() {
        let request = position % load.requests;
        tasks.push(tokio::spawn(watch(session, format!("fanout-{request}"))));
    }
    let mut seen = Seen::default();
    for task in tasks {
        seen.add(&task.await??);
    }
    let spent = subject.processor_ms().saturating_sub(before);
    let (Some(first), Some(last)) = (seen.first, seen.last) else { bail!("nothing was delivered") };
    let mut report = Report::new("fanout");
    report.figure("requests", load.requests, "");
    report.figure("watchers each", load.watchers, "");
    let expected = (u64::from(load.events) + 2) * total as u64;
    report.figure("deliveries", seen.events, "");
    report.rate("deliveries", seen.events, last - first);
    let events = (u64::from(load.events) + 2) * load.requests as u64;
    report.rate("durable events", events, last - first);
    report.processor(spent, seen.events);
    report.fault_count(seen.faults + expected.abs_diff(seen.events));
    Ok(report)
}

async fn submit_all(subject: &Subject, load: Load, head_start: Duration) -> anyhow::Result<()> {
    let mut session = Session::connect(&subject.url, &subject.token).await?;
    session.next_text().await?;
    for request in 0..load.requests {
        session
            .feed(format!(
                r#"{{"id":"fanout-{request}","action":"echo_async","delay_ms":{},"payload":{{"steps":{},"delay_ms":{}}}}}"#,
                head_start.as_millis(),
                load.events,
                load.delay_ms,
            ))
            .await?;
    }
    session.flush().await?;
    for _ in 0..load.requests {
        let answer = session.next_text().await?;
        if !answer.contains("\"acknowledgment\"") {
            bail!("the server refused: {answer}");
        }
    }
    Ok(session.close().await?)
}

#[derive(Default)]
struct Seen {
    events: u64,
    faults: u64,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Seen {
    fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.faults += other.faults;
        self.first = [self.first, other.first].into_iter().flatten().min();
        self.last = self.last.max(other.last);
    }
}

/// Watches one request from its second event on, which is when it starts.
async fn watch(mut session: Session, request_id: String) -> Result<Seen, ClientError> {
    session
        .send(format!(r#"{{"type":"subscribe","request_id":"{request_id}","after_seq":1}}"#))
        .await?;
    let mut seen = Seen::default();
    let mut expected = 2;
    loop {
        let Ok(message) = timeout(PATIENCE, session.next_text()).await else {
            seen.faults += 1;
            return Ok(seen);
        };
        let message = message?;
        let Some(seq) = seq_of(&message) else { continue };
        if seq != expected {
            seen.faults += 1;
        }
        expected = seq + 1;
        seen.events += 1;
        if seen.first.is_none() {
            seen.first = Some(Instant::now());
        }
        if message.starts_with("{\"type\":\"complete\"") {
            seen.last = Some(Instant::now());
            return Ok(seen);
        }
    }
}
