//! What a tenant's small requests take: alone, and while another tenant goes beyond a limit. Each limit has a
//! server of its own.

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

use super::{BenchCommon, Report, Subject, small_requests::measure};

/// WebSockets of the tenant that goes beyond limits.
const CONNECTIONS: u64 = 8;
/// Messages that one of them sends at once.
const BURST: u64 = 10;

pub(super) struct Load {
    pub(super) flood_rate: u64,
    pub(super) rate: u64,
    pub(super) duration: Duration,
}

/// A limit, and what goes beyond it.
struct Case {
    settings: &'static [&'static str],
    flood: Flood,
    /// Names of the figures: p50 and p99 alone, p50 and p99 beside the flood, refused messages.
    figures: [&'static str; 5],
}

enum Flood {
    /// Makes the message of this number; each has one answer.
    Messages(fn(u64) -> String),
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
        settings: &["gateway.messages_per_second=100", "gateway.message_burst=100"],
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
        let subject = Subject::open_with(&common, &settings)?;
        let own = subject.own.as_ref().context("it needs a server of its own")?;
        let small = own.token("small")?;
        let alone = measure(&subject, &small, load.rate, load.duration, "alone").await?;
        let (stop, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut flooding = JoinSet::new();
        let token = own.token("flooder")?;
        for connection in 0..CONNECTIONS {
            let flooder = Flooder {
                url: subject.url.clone(),
                token: token.clone(),
                first: connection,
                per_second: load.flood_rate.div_ceil(CONNECTIONS),
                stop: stop.clone(),
                refused: refused.clone(),
            };
            match flood {
                Flood::Messages(message) => flooding.spawn(flooder.send(message)),
                Flood::Connections => flooding.spawn(flooder.connect()),
            };
        }
        let beside = measure(&subject, &small, load.rate, load.duration, "beside").await;
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
        report.figure(figures[4], refused.load(Ordering::Relaxed), "");
        let checked = subject.check(Report::new("limits")).await?;
        report.add_faults(checked.faults());
    }
    Ok(report)
}

/// One of those who go beyond a limit together.
struct Flooder {
    url: String,
    token: String,
    /// Number of its first message; the others follow in steps of [`CONNECTIONS`].
    first: u64,
    per_second: u64,
    stop: Arc<AtomicBool>,
    refused: Arc<AtomicU64>,
}

impl Flooder {
    /// Sends messages, some at once, and reads their answers.
    async fn send(self, message: fn(u64) -> String) -> anyhow::Result<()> {
        let mut session = Session::connect(&self.url, &self.token).await?;
        session.next_text().await?;
        let mut number = self.first;
        let every = Duration::from_secs_f64(BURST as f64 / self.per_second.max(1) as f64);
        while !self.stop.load(Ordering::Relaxed) {
            let next = Instant::now() + every;
            for _ in 0..BURST {
                session.send(message(number)).await?;
                number += CONNECTIONS;
            }
            for _ in 0..BURST {
                let answer = session.next_text().await?;
                let is_refusal = answer.starts_with("{\"type\":\"error\"");
                self.refused.fetch_add(u64::from(is_refusal), Ordering::Relaxed);
            }
            sleep_until(next).await;
        }
        Ok(())
    }

    /// Opens connections, and keeps those that are let in.
    async fn connect(self) -> anyhow::Result<()> {
        let mut open = Vec::new();
        let every = Duration::from_secs_f64(10.0 / self.per_second.max(1) as f64);
        while !self.stop.load(Ordering::Relaxed) {
            let mut session = Session::connect(&self.url, &self.token).await?;
            if session.next_text().await.is_ok() {
                open.push(session);
            } else {
                self.refused.fetch_add(1, Ordering::Relaxed);
            }
            sleep(every).await;
        }
        Ok(())
    }
}
