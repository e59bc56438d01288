//! Delivery of events of running requests to watchers.

use std::time::Duration;

use anyhow::bail;
use streamer_client::{ClientError, Session};
use tokio::time::{Instant, sleep, timeout};

use super::server_process::ServerProcess;
use super::{
    load_target::LoadTarget,
    raw_message::seq_of,
    report::{MAX_LATENCY, Report},
};

/// Delay before a request starts, so that all watchers have subscribed by then. `START_DELAY_PER_WATCHER` is
/// added for each watcher.
const START_DELAY: Duration = Duration::from_millis(500);
/// Additional delay per watcher.
const START_DELAY_PER_WATCHER: Duration = Duration::from_micros(500);
/// Timeout for the receipt of each event.
const EVENT_TIMEOUT: Duration = Duration::from_secs(120);

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
    /// Returns the number of events of a request: progress, output, `started` and the terminal event.
    fn events_per_request(self) -> u64 {
        u64::from(self.events) + u64::from(self.output_chunks) + 2
    }
}

/// Resident memory of the server, in bytes.
struct Memory {
    before: u64,
    peak: u64,
    after: u64,
}

/// Time allowed for the server to free the topics of ended requests.
const SETTLE: Duration = Duration::from_secs(12);

pub(super) async fn run(target: &LoadTarget, load: Load) -> anyhow::Result<Report> {
    let total = load.requests * load.watchers;
    let mut sessions = Vec::with_capacity(total);
    for _ in 0..total {
        let mut session = Session::connect(&target.url, &target.token).await?;
        session.next_text().await?;
        sessions.push(session);
    }
    let start_delay = START_DELAY
        + START_DELAY_PER_WATCHER * u32::try_from(total + load.requests * 4).unwrap_or(u32::MAX);
    let resident = target.process.as_ref().map(ServerProcess::resident_bytes).transpose()?;
    submit_all(target, load, start_delay).await?;
    let before = target.processor_ms();
    let mut tasks = Vec::with_capacity(total);
    for (position, session) in sessions.into_iter().enumerate() {
        let request = position % load.requests;
        let pause = Duration::from_millis(u64::from(load.delay_ms));
        tasks.push(tokio::spawn(watch(session, format!("fanout-{request}"), pause)));
    }
    let mut delivered = Deliveries::default();
    for task in tasks {
        delivered.add(&task.await??);
    }
    let processor_ms = target.processor_ms().saturating_sub(before);
    let memory = match (&target.process, resident) {
        (Some(process), Some(before)) => {
            let peak = process.peak_resident_bytes()?;
            sleep(SETTLE).await;
            Some(Memory { before, peak, after: process.resident_bytes()? })
        }
        _ => None,
    };
    let (Some(first), Some(last)) = (delivered.first, delivered.last) else {
        bail!("no event was delivered")
    };
    let mut report = Report::new("fanout");
    report.figure("requests", load.requests, "");
    report.figure("watchers each", load.watchers, "");
    let expected = load.events_per_request() * total as u64;
    report.figure("deliveries", delivered.events, "");
    report.rate("deliveries", delivered.events, last - first);
    report.rate("durable events", load.events_per_request() * load.requests as u64, last - first);
    report.processor(processor_ms, delivered.events);
    let silence = u64::try_from(delivered.silence.as_micros()).unwrap_or(u64::MAX);
    report.figure("longest silence", silence, "µs");
    report.add_faults(delivered.faults + expected.abs_diff(delivered.events));
    if let Some(memory) = memory {
        report.figure("resident before", memory.before / 1024, "KiB");
        report.figure("resident at the peak", memory.peak / 1024, "KiB");
        report.figure("resident after", memory.after / 1024, "KiB");
    }
    Ok(report)
}

/// Submits the requests, which start after `start_delay`.
async fn submit_all(target: &LoadTarget, load: Load, start_delay: Duration) -> anyhow::Result<()> {
    let mut session = Session::connect(&target.url, &target.token).await?;
    session.next_text().await?;
    for request in 0..load.requests {
        session
            .feed(format!(
                r#"{{"id":"fanout-{request}","action":"echo_async","delay_ms":{},"payload":{{"steps":{},"delay_ms":{},"output_chunks":{},"chunk_bytes":{}}}}}"#,
                start_delay.as_millis(),
                load.events,
                load.delay_ms,
                load.output_chunks,
                load.chunk_bytes,
            ))
            .await?;
    }
    session.flush().await?;
    for _ in 0..load.requests {
        let response = session.next_text().await?;
        if !response.contains("\"acknowledgment\"") {
            bail!("the server rejected a request: {response}");
        }
    }
    Ok(session.close().await?)
}

/// Statistics of the events that watchers received.
#[derive(Default)]
struct Deliveries {
    events: u64,
    faults: u64,
    first: Option<Instant>,
    last: Option<Instant>,
    /// Maximum time between two consecutive events.
    silence: Duration,
}

impl Deliveries {
    fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.faults += other.faults;
        self.first = [self.first, other.first].into_iter().flatten().min();
        self.last = self.last.max(other.last);
        self.silence = self.silence.max(other.silence);
    }
}

/// Watches one request from its second event, `started`, to its end. The handler sends an event every `pause`.
async fn watch(
    mut session: Session,
    request_id: String,
    pause: Duration,
) -> Result<Deliveries, ClientError> {
    session
        .send(format!(r#"{{"type":"subscribe","request_id":"{request_id}","after_seq":1}}"#))
        .await?;
    let mut delivered = Deliveries::default();
    let mut expected = 2;
    loop {
        let Ok(message) = timeout(EVENT_TIMEOUT, session.next_text()).await else {
            delivered.faults += 1;
            return Ok(delivered);
        };
        let message = message?;
        let Some(seq) = seq_of(&message) else { continue };
        if seq != expected {
            delivered.faults += 1;
        }
        expected = seq + 1;
        delivered.events += 1;
        let now = Instant::now();
        delivered.first.get_or_insert(now);
        if let Some(before) = delivered.last.replace(now) {
            let silence = now - before;
            delivered.silence = delivered.silence.max(silence);
            delivered.faults += u64::from(silence > pause + MAX_LATENCY);
        }
        if message.starts_with("{\"type\":\"complete\"") {
            return Ok(delivered);
        }
    }
}
