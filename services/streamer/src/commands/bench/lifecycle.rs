//! Complete async requests, from submission to result.

use std::{collections::HashMap, time::Duration};

use hdrhistogram::Histogram;
use streamer_client::{ClientError, Session};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::{
    load_target::{LoadTarget, WARM_UP},
    raw_message::{seq_of, text_after},
    report::{Report, SUCCEEDED, histogram, record},
};

/// Time allowed for the server to count the last attempt after its request has ended.
const SETTLE: Duration = Duration::from_millis(200);
/// Timeout for the end of the last requests.
const END_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone, Copy)]
pub(super) struct Load {
    pub(super) in_flight: usize,
    pub(super) connections: usize,
    pub(super) steps: u32,
    pub(super) rate: u64,
    pub(super) duration: Duration,
}

pub(super) async fn run(target: &LoadTarget, load: Load) -> anyhow::Result<Report> {
    let connections = load.connections.clamp(1, load.in_flight.max(1));
    let mut sessions = Vec::with_capacity(connections);
    for _ in 0..connections {
        let mut session = Session::connect(&target.url, &target.token).await?;
        session.next_text().await?;
        sessions.push(session);
    }
    let begin = Instant::now() + WARM_UP;
    let end = begin + load.duration;
    let mut tasks = Vec::with_capacity(connections);
    for (position, session) in sessions.into_iter().enumerate() {
        // The remainder of the division is distributed over the first connections.
        let window =
            load.in_flight / connections + usize::from(position < load.in_flight % connections);
        let interval =
            (load.rate > 0).then(|| Duration::from_secs_f64(connections as f64 / load.rate as f64));
        let driver = Driver {
            session,
            name: format!("c{position}"),
            window,
            interval,
            steps: load.steps,
            begin,
            end,
            running: HashMap::new(),
            submitted: 0,
            latencies: histogram(),
            completed: 0,
            faults: 0,
        };
        tasks.push(tokio::spawn(driver.drive()));
    }
    sleep_until(begin).await;
    let before = target.processor_ms();
    sleep_until(end).await;
    let processor_ms = target.processor_ms().saturating_sub(before);
    let mut latencies = histogram();
    let (mut completed, mut submitted, mut faults) = (0, 0, 0);
    for task in tasks {
        let driver: Driver = task.await??;
        latencies.add(driver.latencies)?;
        completed += driver.completed;
        submitted += driver.submitted;
        faults += driver.faults;
    }
    let mut report = Report::new("lifecycle");
    report.figure("in flight", load.in_flight, "");
    report.figure("durable events each", load.steps + 3, "");
    report.rate("completed", completed, load.duration);
    report.latencies(&latencies);
    report.processor(processor_ms, completed);
    report.add_faults(faults);
    if let Some(process) = &target.process {
        // A client receives the last event shortly before the server counts the attempt.
        sleep(SETTLE).await;
        let succeeded: u64 = process.metric(SUCCEEDED).await?;
        report.figure("submitted", submitted, "");
        report.figure("succeeded on the server", succeeded, "");
        report.add_faults(succeeded.abs_diff(submitted));
    }
    Ok(report)
}

/// Generates the load of one connection.
struct Driver {
    session: Session,
    name: String,
    /// Number of concurrent requests in a closed loop.
    window: usize,
    /// Interval between submissions in an open loop; `None` in a closed loop.
    interval: Option<Duration>,
    steps: u32,
    begin: Instant,
    end: Instant,
    /// Time when each running request was due and `seq` of its last event, by request ID.
    running: HashMap<String, (Instant, i64)>,
    submitted: u64,
    latencies: Histogram<u64>,
    completed: u64,
    faults: u64,
}

impl Driver {
    async fn drive(mut self) -> Result<Self, ClientError> {
        match self.interval {
            None => {
                for _ in 0..self.window {
                    self.submit(Instant::now()).await?;
                }
                self.session.flush().await?;
            }
            Some(interval) => self.drive_open(interval).await?,
        }
        let deadline = self.end + END_TIMEOUT;
        while !self.running.is_empty() {
            let Ok(message) = timeout_at(deadline, self.session.next_text()).await else { break };
            if self.handle(&message?) && self.interval.is_none() && Instant::now() < self.end {
                self.submit(Instant::now()).await?;
                self.session.flush().await?;
            }
        }
        self.faults += self.running.len() as u64;
        Ok(self)
    }

    /// Submits requests on schedule, regardless of those that are in flight.
    async fn drive_open(&mut self, interval: Duration) -> Result<(), ClientError> {
        let mut due = Instant::now();
        while due < self.end {
            tokio::select! {
                biased;
                () = sleep_until(due) => {
                    self.submit(due).await?;
                    self.session.flush().await?;
                    due += interval;
                }
                message = self.session.next_text() => {
                    let message = message?;
                    self.handle(&message);
                }
            }
        }
        Ok(())
    }

    async fn submit(&mut self, due: Instant) -> Result<(), ClientError> {
        let id = format!("{}-{}", self.name, self.submitted);
        self.submitted += 1;
        let message = format!(
            r#"{{"id":"{id}","action":"echo_async","payload":{{"steps":{}}}}}"#,
            self.steps
        );
        self.running.insert(id, (due, 0));
        self.session.feed(message).await
    }

    /// Handles a message. Returns whether the message ends a request.
    fn handle(&mut self, message: &str) -> bool {
        let Some(id) = text_after(message, "\"request_id\":\"") else {
            self.faults += 1;
            return false;
        };
        let Some((due, last_seq)) = self.running.get_mut(id) else {
            self.faults += 1;
            return false;
        };
        if message.starts_with("{\"type\":\"acknowledgment\"") {
            *last_seq = 1;
            return false;
        }
        let seq = seq_of(message).unwrap_or(0);
        if seq != *last_seq + 1 {
            self.faults += 1;
        }
        *last_seq = seq;
        if !message.starts_with("{\"type\":\"complete\"") {
            return false;
        }
        if seq != i64::from(self.steps) + 3 {
            self.faults += 1;
        }
        let now = Instant::now();
        // The throughput includes requests that ended during the measurement; the latency includes requests
        // that were due during the measurement, even if they ended later.
        self.completed += u64::from(now >= self.begin && now < self.end);
        if *due >= self.begin && *due < self.end {
            record(&mut self.latencies, now - *due);
        }
        self.running.remove(id);
        true
    }
}
