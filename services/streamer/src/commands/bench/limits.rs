//! Latency of small requests while a second tenant exceeds a limit, and without that load. Each limit is
//! measured with a separate server.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use streamer_client::Session;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

use super::{
    load_target::{BenchCommon, LoadTarget},
    report::Report,
    small_requests::measure,
};

/// Number of WebSocket connections of the tenant that exceeds a limit.
const CONNECTIONS: u64 = 8;
/// Number of messages that each connection sends in one burst.
const BURST: u64 = 10;

pub(super) struct Load {
    pub(super) flood_rate: u64,
    pub(super) rate: u64,
    pub(super) duration: Duration,
}

/// A limit, and the load that exceeds it.
struct Case {
    settings: &'static [&'static str],
    flood: Flood,
    /// Names of the figures: p50 and p99 without the flood, p50 and p99 during the flood, and the number of
    /// rejected messages.
    figures: [&'static str; 5],
}

enum Flood {
    /// Sends messages, each of which has one response. The function returns the message with the given number.
    Messages(fn(u64) -> String),
    /// Opens connections.
    Connections,
}

macro_rules! figures {
    ($case:literal) => {
        [
            concat!($case, ": p50 alone"),
            concat!($case, ": p99 alone"),
            concat!($case, ": p50 beside"),
            concat!($case, ": p99 beside"),
            concat!($case, ": refused"),
        ]
    };
}

const CASES: [Case; 6] = [
    Case {
        settings: &["limits.submissions_per_second_per_user=100"],
        flood: Flood::Messages(|_| r#"{"action":"echo","payload":1}"#.to_owned()),
        figures: figures!("submissions"),
    },
    Case {
        settings: &["limits.queued_requests_per_user=100"],
        flood: Flood::Messages(|_| {
            r#"{"action":"echo_async","payload":{},"delay_ms":3600000}"#.to_owned()
        }),
        figures: figures!("queued requests"),
    },
    Case {
        settings: &["limits.watches_per_user=100"],
        flood: Flood::Messages(|number| {
            let id = number % 1000;
            format!(r#"{{"id":"{id}","action":"echo_async","payload":{{}},"delay_ms":3600000}}"#)
        }),
        figures: figures!("watches"),
    },
    Case {
        settings: &["gateway.rate_limit=100", "gateway.rate_limit_burst=100"],
        flood: Flood::Messages(|_| r#"{"type":"ping"}"#.to_owned()),
        figures: figures!("messages"),
    },
    Case {
        settings: &["limits.max_payload_bytes=1024"],
        flood: Flood::Messages(|_| {
            format!(r#"{{"action":"echo","payload":"{}"}}"#, "x".repeat(2048))
        }),
        figures: figures!("payloads"),
    },
    Case {
        settings: &["gateway.max_connections_per_user=4"],
        flood: Flood::Connections,
        figures: figures!("connections"),
    },
];

pub(super) async fn run(load: &Load, set: &[String]) -> anyhow::Result<Report> {
    let mut report = Report::new("limits");
    for Case { settings, flood, figures } in CASES {
        let common = BenchCommon { server: None, token: None, set: set.to_vec(), json: false };
        let settings: Vec<_> = settings.iter().map(ToString::to_string).collect();
        let target = LoadTarget::open_with(&common, &settings)?;
        let process = target.process.as_ref().context("bench limits does not support --server")?;
        let small = process.token("small")?;
        let alone = measure(&target, &small, load.rate, load.duration, "alone").await?;
        let (stop, rejected) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut flooding = JoinSet::new();
        let token = process.token("flooder")?;
        for connection in 0..CONNECTIONS {
            let flooder = Flooder {
                url: target.url.clone(),
                token: token.clone(),
                first: connection,
                per_second: load.flood_rate.div_ceil(CONNECTIONS),
                stop: stop.clone(),
                rejected: rejected.clone(),
            };
            match flood {
                Flood::Messages(message) => flooding.spawn(flooder.send(message)),
                Flood::Connections => flooding.spawn(flooder.connect()),
            };
        }
        let beside = measure(&target, &small, load.rate, load.duration, "beside").await;
        stop.store(true, Ordering::Relaxed);
        while let Some(flooded) = flooding.join_next().await {
            flooded??;
        }
        let beside = beside?;
        for (position, latencies) in [&alone, &beside].into_iter().enumerate() {
            report.figure(figures[position * 2], latencies.value_at_quantile(0.5), "µs");
            report.figure(figures[position * 2 + 1], latencies.value_at_quantile(0.99), "µs");
            report.check_latencies(latencies);
        }
        report.figure(figures[4], rejected.load(Ordering::Relaxed), "");
        let checked = target.check(Report::new("limits")).await?;
        report.add_faults(checked.faults());
    }
    Ok(report)
}

/// One of the tasks that together exceed a limit.
struct Flooder {
    url: String,
    token: String,
    /// Number of the first message; subsequent numbers increase in steps of [`CONNECTIONS`].
    first: u64,
    per_second: u64,
    stop: Arc<AtomicBool>,
    rejected: Arc<AtomicU64>,
}

impl Flooder {
    /// Sends messages in bursts and reads the responses.
    async fn send(self, message: fn(u64) -> String) -> anyhow::Result<()> {
        let mut session = Session::connect(&self.url, &self.token).await?;
        session.next_text().await?;
        let mut number = self.first;
        let interval = Duration::from_secs_f64(BURST as f64 / self.per_second.max(1) as f64);
        while !self.stop.load(Ordering::Relaxed) {
            let next = Instant::now() + interval;
            for _ in 0..BURST {
                session.send(message(number)).await?;
                number += CONNECTIONS;
            }
            for _ in 0..BURST {
                let response = session.next_text().await?;
                let is_rejected = response.starts_with("{\"type\":\"error\"");
                self.rejected.fetch_add(u64::from(is_rejected), Ordering::Relaxed);
            }
            sleep_until(next).await;
        }
        Ok(())
    }

    /// Opens connections and keeps those that the server accepts.
    async fn connect(self) -> anyhow::Result<()> {
        let mut open = Vec::new();
        let interval = Duration::from_secs_f64(10.0 / self.per_second.max(1) as f64);
        while !self.stop.load(Ordering::Relaxed) {
            let mut session = Session::connect(&self.url, &self.token).await?;
            if session.next_text().await.is_ok() {
                open.push(session);
            } else {
                self.rejected.fetch_add(1, Ordering::Relaxed);
            }
            sleep(interval).await;
        }
        Ok(())
    }
}
