//! Events of running requests to those who watch.

use std::time::Duration;

use anyhow::bail;
use streamer_client::{ClientError, Session};
use tokio::time::{Instant, sleep, timeout};

use super::{Report, Subject, report::MAX_LATENCY, seq_of};
use crate::server_process::ServerProcess;

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
    pub(super) output_chunks: u32,
    pub(super) chunk_bytes: u32,
}

impl Load {
    /// Progress and output, `started` and the terminal event.
    fn events_of_each(self) -> u64 {
        u64::from(self.events) + u64::from(self.output_chunks) + 2
    }
}

/// Resident memory of a server of our own, in bytes.
struct Memory {
    before: u64,
    peak: u64,
    after: u64,
}

/// After the end, for as long as it takes the server to drop what was watched.
const SETTLE: Duration = Duration::from_secs(12);

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
    let resident = subject.own.as_ref().map(ServerProcess::resident_bytes).transpose()?;
    submit_all(subject, load, head_start).await?;
    let before = subject.processor_ms();
    let mut tasks = Vec::with_capacity(total);
    for (position, session) in sessions.into_iter().enumerate() {
        let request = position % load.requests;
        let pause = Duration::from_millis(u64::from(load.delay_ms));
        tasks.push(tokio::spawn(watch(session, format!("fanout-{request}"), pause)));
    }
    let mut seen = Seen::default();
    for task in tasks {
        seen.add(&task.await??);
    }
    let spent = subject.processor_ms().saturating_sub(before);
    let memory = match (&subject.own, resident) {
        (Some(own), Some(before)) => {
            let peak = own.peak_resident_bytes()?;
            sleep(SETTLE).await;
            Some(Memory { before, peak, after: own.resident_bytes()? })
        }
        _ => None,
    };
    let (Some(first), Some(last)) = (seen.first, seen.last) else { bail!("nothing was delivered") };
    let mut report = Report::new("fanout");
    report.figure("requests", load.requests, "");
    report.figure("watchers each", load.watchers, "");
    let expected = load.events_of_each() * total as u64;
    report.figure("deliveries", seen.events, "");
    report.rate("deliveries", seen.events, last - first);
    report.rate("durable events", load.events_of_each() * load.requests as u64, last - first);
    report.processor(spent, seen.events);
    let silence = u64::try_from(seen.silence.as_micros()).unwrap_or(u64::MAX);
    report.figure("longest silence", silence, "µs");
    report.add_faults(seen.faults + expected.abs_diff(seen.events));
    if let Some(memory) = memory {
        report.figure("resident before", memory.before / 1024, "KiB");
        report.figure("resident at the peak", memory.peak / 1024, "KiB");
        report.figure("resident after", memory.after / 1024, "KiB");
    }
    Ok(report)
}

async fn submit_all(subject: &Subject, load: Load, head_start: Duration) -> anyhow::Result<()> {
    let mut session = Session::connect(&subject.url, &subject.token).await?;
    session.next_text().await?;
    for request in 0..load.requests {
        session
            .feed(format!(
                r#"{{"id":"fanout-{request}","action":"echo_async","delay_ms":{},"payload":{{"steps":{},"delay_ms":{},"output_chunks":{},"chunk_bytes":{}}}}}"#,
                head_start.as_millis(),
                load.events,
                load.delay_ms,
                load.output_chunks,
                load.chunk_bytes,
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
    /// The longest time from one event to the next.
    silence: Duration,
}

impl Seen {
    fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.faults += other.faults;
        self.first = [self.first, other.first].into_iter().flatten().min();
        self.last = self.last.max(other.last);
        self.silence = self.silence.max(other.silence);
    }
}

/// Watches one request from its second event on, which is when it starts. Its handler pauses for as
/// long as `pause` between two events.
async fn watch(
    mut session: Session,
    request_id: String,
    pause: Duration,
) -> Result<Seen, ClientError> {
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
        let now = Instant::now();
        seen.first.get_or_insert(now);
        if let Some(before) = seen.last.replace(now) {
            let silence = now - before;
            seen.silence = seen.silence.max(silence);
            seen.faults += u64::from(silence > pause + MAX_LATENCY);
        }
        if message.starts_with("{\"type\":\"complete\"") {
            return Ok(seen);
        }
    }
}
