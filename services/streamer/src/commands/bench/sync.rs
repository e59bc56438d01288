//! Sync requests over WebSocket.

use std::time::Duration;

use hdrhistogram::Histogram;
use streamer_client::{ClientError, Session};
use tokio::time::{Instant, sleep_until};

use super::{
    load_target::{LoadTarget, WARM_UP},
    report::{Report, histogram, record},
};

const MESSAGE: &str = r#"{"action":"echo","payload":{"hello":"world","n":9223372036854775807}}"#;
const EXPECTED_DATA: &str = r#""data":{"echo":{"hello":"world","n":9223372036854775807}}"#;

pub(super) async fn run(
    target: &LoadTarget,
    connections: usize,
    rate: u64,
    duration: Duration,
) -> anyhow::Result<Report> {
    let mut sessions = Vec::with_capacity(connections);
    for _ in 0..connections {
        let mut session = Session::connect(&target.url, &target.token).await?;
        session.next_text().await?;
        sessions.push(session);
    }
    // Interval between the requests of one connection.
    let interval = (rate > 0).then(|| {
        Duration::from_secs_f64(
            f64::from(u32::try_from(connections).unwrap_or(u32::MAX)) / rate as f64,
        )
    });
    let begin = Instant::now() + WARM_UP;
    let end = begin + duration;
    let tasks: Vec<_> = sessions
        .into_iter()
        .enumerate()
        .map(|(position, session)| {
            // The start times are distributed over one interval, so that requests are not all due at once.
            let offset =
                interval.map(|interval| interval.mul_f64(position as f64 / connections as f64));
            tokio::spawn(drive(session, begin, end, interval.zip(offset)))
        })
        .collect();
    sleep_until(begin).await;
    let before = target.processor_ms();
    let mut latencies = histogram();
    let mut faults = 0;
    for task in tasks {
        let (connection_latencies, connection_faults) = task.await??;
        latencies.add(connection_latencies)?;
        faults += connection_faults;
    }
    let processor_ms = target.processor_ms().saturating_sub(before);
    let mut report = Report::new("sync");
    report.figure("connections", connections, "");
    report.rate("requests", latencies.len(), duration);
    report.latencies(&latencies);
    report.processor(processor_ms, latencies.len());
    report.add_faults(faults);
    Ok(report)
}

/// Sends requests until `end`, and returns the latencies since `begin` and the number of faults. `schedule` is
/// the interval between requests and the offset of the first request in an open loop.
async fn drive(
    mut session: Session,
    begin: Instant,
    end: Instant,
    schedule: Option<(Duration, Duration)>,
) -> Result<(Histogram<u64>, u64), ClientError> {
    let mut latencies = histogram();
    let mut faults = 0;
    let mut due = schedule.map(|(_, offset)| Instant::now() + offset);
    loop {
        let intended = match due {
            Some(due) => {
                sleep_until(due).await;
                due
            }
            None => Instant::now(),
        };
        if intended >= end {
            return Ok((latencies, faults));
        }
        session.send(MESSAGE).await?;
        let response = session.next_text().await?;
        let now = Instant::now();
        if !response.contains(EXPECTED_DATA) {
            faults += 1;
        }
        if intended >= begin {
            record(&mut latencies, now - intended);
        }
        due = due.zip(schedule).map(|(due, (interval, _))| due + interval);
    }
}
