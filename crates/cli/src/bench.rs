//! `streamer bench`: load on a server, and what came of it.
//!
//! Latency is measured from when a request was due, not from when the generator got round to
//! sending it, so that a server that stalls is charged for everything that waited meanwhile (no
//! coordinated omission). What is counted was checked: every log seen without a gap.

mod cancel;
mod fairness;
mod fanout;
mod idle;
mod lifecycle;
mod limits;
mod output;
mod report;
mod small_requests;
mod store;
mod sync;
mod worker_process;

use std::time::Duration;

use clap::{Args, Subcommand};

use crate::{Exit, server_process::ServerProcess, token::parse_duration};
use report::Report;

/// `streamer bench`
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Without --server a server is started for the measurement: this program, in a
process of its own, with a new data folder, its rate and connection limits out of the way.

Examples:
  streamer bench sync --connections 256
  streamer bench sync --connections 256 --rate 30000      open loop
  streamer bench lifecycle --in-flight 256
  streamer bench lifecycle --workers 2
  streamer bench fanout --watchers 1000
  streamer bench fanout --requests 1000 --watchers 1
  streamer bench cancel --workers 1
  streamer bench fairness
  streamer bench output
  streamer bench store --finished 1000 --queued 20000
  streamer bench idle --connections 15000"
)]
pub struct BenchArguments {
    /// What to measure.
    #[command(subcommand)]
    pub what: Bench,
}

/// What to measure.
#[derive(Clone, Debug, Subcommand)]
pub enum Bench {
    /// Sync requests (`echo`) over WebSocket.
    Sync {
        /// WebSockets.
        #[arg(long, default_value_t = 256)]
        connections: usize,
        /// Requests a second in all, sent when due whatever the server does; 0 sends the next when
        /// the last is answered.
        #[arg(long, default_value_t = 0)]
        rate: u64,
        /// How long, after a second to warm up.
        #[arg(long, default_value = "5s", value_parser = parse_duration)]
        duration: Duration,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: BenchCommon,
    },
    /// Whole lives of async requests: submit, progress, result, each event durable.
    Lifecycle {
        /// Requests that are underway at once.
        #[arg(long, default_value_t = 256)]
        in_flight: usize,
        /// WebSockets.
        #[arg(long, default_value_t = 16)]
        connections: usize,
        /// Progress events of each.
        #[arg(long, default_value_t = 10)]
        steps: u32,
        /// Submissions a second in all, sent when due whatever the server does; 0 sends the next
        /// when one ends.
        #[arg(long, default_value_t = 0)]
        rate: u64,
        /// How long, after a second to warm up.
        #[arg(long, default_value = "5s", value_parser = parse_duration)]
        duration: Duration,
        /// Run the handlers in so many worker processes; 0 runs them in the server.
        #[arg(long, default_value_t = 0)]
        workers: usize,
        /// What to start as a worker of echo_async, with STREAMER_SERVER, STREAMER_TOKEN and
        /// STREAMER_SLOTS set [default: this program's own `worker`].
        #[arg(long, value_name = "COMMAND", requires = "workers")]
        worker_command: Option<String>,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: BenchCommon,
    },
    /// Events of running requests to those who watch.
    Fanout {
        /// Requests that run at once.
        #[arg(long, default_value_t = 1)]
        requests: usize,
        /// Watchers of each, each with a WebSocket of its own.
        #[arg(long, default_value_t = 1000)]
        watchers: usize,
        /// Progress events of each request.
        #[arg(long, default_value_t = 2000)]
        events: u32,
        /// Milliseconds between two events of a request; 0 for as fast as they can be stored.
        #[arg(long, default_value_t = 1)]
        delay_ms: u32,
        /// Chunks of output of each request, spread evenly among its events.
        #[arg(long, default_value_t = 0)]
        output_chunks: u32,
        /// Characters of each chunk.
        #[arg(long, default_value_t = 64)]
        chunk_bytes: u32,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: BenchCommon,
    },
    /// From asking for cancellation to the end of a running request.
    Cancel {
        /// Requests, one after the other.
        #[arg(long, default_value_t = 200)]
        count: usize,
        /// Run the handlers in so many worker processes; 0 runs them in the server.
        #[arg(long, default_value_t = 0)]
        workers: usize,
        /// As of `bench lifecycle`.
        #[arg(long, value_name = "COMMAND", requires = "workers")]
        worker_command: Option<String>,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: BenchCommon,
    },
    /// How long tenants wait for a start while another one floods the queue, and while it does not.
    Fairness {
        /// Tenants, one of which floods.
        #[arg(long, default_value_t = 10)]
        tenants: usize,
        /// Requests of the one that floods.
        #[arg(long, default_value_t = 100_000)]
        flood: usize,
        /// Requests a second of each of the others.
        #[arg(long, default_value_t = 20)]
        rate: u64,
        /// How long each of the two measurements is.
        #[arg(long, default_value = "8s", value_parser = parse_duration)]
        duration: Duration,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: BenchCommon,
    },
    /// How long small requests of one tenant take while the output of another tenant floods the store, and
    /// while it does not.
    Output {
        /// Attempts of the flood that run at once.
        #[arg(long, default_value_t = 50)]
        attempts: usize,
        /// Output chunks of each of them.
        #[arg(long, default_value_t = 20)]
        output_chunks: u32,
        /// Characters of each chunk.
        #[arg(long, default_value_t = 1_000_000)]
        chunk_bytes: u32,
        /// Small requests a second.
        #[arg(long, default_value_t = 20)]
        rate: u64,
        /// How long each of the two measurements is.
        #[arg(long, default_value = "8s", value_parser = parse_duration)]
        duration: Duration,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: BenchCommon,
    },
    /// How long small requests of one tenant take while another tenant goes beyond one limit after the other,
    /// and while it does not.
    Limits {
        /// Messages a second of the tenant that goes beyond limits; a tenth as many connections a second.
        #[arg(long, default_value_t = 2000)]
        flood_rate: u64,
        /// Small requests a second.
        #[arg(long, default_value_t = 20)]
        rate: u64,
        /// How long each measurement is.
        #[arg(long, default_value = "5s", value_parser = parse_duration)]
        duration: Duration,
        /// Set an option of the servers that are started; may be repeated.
        #[arg(long = "set", value_name = "SECTION.OPTION=VALUE")]
        set: Vec<String>,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Start-up and claims over a store that holds much.
    Store {
        /// Requests that have ended.
        #[arg(long, default_value_t = 1_000_000)]
        finished: usize,
        /// Requests that wait and are due.
        #[arg(long, default_value_t = 100_000)]
        queued: usize,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: BenchCommon,
    },
    /// Memory of connections that do nothing.
    Idle {
        /// WebSockets, each authenticated.
        #[arg(long, default_value_t = 15_000)]
        connections: usize,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: BenchCommon,
    },
}

/// Where the load goes.
#[derive(Args, Clone, Debug)]
pub struct BenchCommon {
    /// A running server; must be given with --token.
    #[arg(long, requires = "token", value_name = "URL")]
    pub server: Option<String>,
    /// A token for it.
    #[arg(long, requires = "server", hide_env_values = true, value_name = "TOKEN")]
    pub token: Option<String>,
    /// Set an option of the server that is started; may be repeated.
    #[arg(long = "set", value_name = "SECTION.OPTION=VALUE")]
    pub set: Vec<String>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// What the load goes to.
pub(crate) struct Subject {
    pub(crate) url: String,
    pub(crate) token: String,
    /// A server of our own, whose memory and processor time can be read.
    pub(crate) own: Option<ServerProcess>,
}

impl Subject {
    fn open(common: &BenchCommon) -> anyhow::Result<Self> {
        Self::open_with(common, &[])
    }

    fn open_with(common: &BenchCommon, settings: &[String]) -> anyhow::Result<Self> {
        let wanted = settings;
        if let (Some(url), Some(token)) = (&common.server, &common.token) {
            return Ok(Self { url: url.clone(), token: token.clone(), own: None });
        }
        let mut settings: Vec<String> = [
            "gateway.messages_per_second=0",
            "limits.submissions_per_second_per_tenant=0",
            "limits.submissions_per_second_per_user=0",
            "limits.queued_requests_per_tenant=0",
            "limits.queued_requests_per_user=0",
            "limits.watches_per_tenant=0",
            "limits.watches_per_user=0",
            "gateway.max_connections_per_user=1000000",
            "gateway.max_connections_per_address=1000000",
            "server.max_connections_per_address=1000000",
            "gateway.max_buffered_bytes_per_user=268435456",
        ]
        .map(str::to_owned)
        .to_vec();
        settings.extend(wanted.iter().chain(&common.set).cloned());
        let own = ServerProcess::start(&settings)?;
        Ok(Self { url: own.url.clone(), token: own.token("bench")?, own: Some(own) })
    }

    /// Adds what the server itself counts as faults, if it is ours.
    async fn check(&self, mut report: Report) -> anyhow::Result<Report> {
        if let Some(own) = &self.own {
            report.check_delivery(own).await?;
        }
        Ok(report)
    }

    /// Processor time of the server so far, if it is ours.
    pub(crate) fn processor_ms(&self) -> u64 {
        let own = self.own.as_ref().map(ServerProcess::processor_ms);
        own.and_then(Result::ok).unwrap_or(0)
    }
}

pub(crate) async fn run(arguments: BenchArguments) -> anyhow::Result<Exit> {
    let (report, json) = match arguments.what {
        Bench::Sync { connections, rate, duration, common } => {
            let subject = Subject::open(&common)?;
            (
                subject.check(sync::run(&subject, connections, rate, duration).await?).await?,
                common.json,
            )
        }
        Bench::Lifecycle {
            in_flight,
            connections,
            steps,
            rate,
            duration,
            workers,
            worker_command,
            common,
        } => {
            let subject = Subject::open_with(&common, &[local_actions(workers)])?;
            let slots = in_flight.div_ceil(workers.max(1)) + 1;
            let _workers =
                worker_process::start(&subject, workers, slots, worker_command.as_deref()).await?;
            let load = lifecycle::Load { in_flight, connections, steps, rate, duration };
            (subject.check(lifecycle::run(&subject, load).await?).await?, common.json)
        }
        Bench::Fanout {
            requests,
            watchers,
            events,
            delay_ms,
            output_chunks,
            chunk_bytes,
            common,
        } => {
            let subject = Subject::open(&common)?;
            let load =
                fanout::Load { requests, watchers, events, delay_ms, output_chunks, chunk_bytes };
            (subject.check(fanout::run(&subject, load).await?).await?, common.json)
        }
        Bench::Cancel { count, workers, worker_command, common } => {
            let subject = Subject::open_with(&common, &[local_actions(workers)])?;
            let _workers =
                worker_process::start(&subject, workers, 8, worker_command.as_deref()).await?;
            (subject.check(cancel::run(&subject, count).await?).await?, common.json)
        }
        Bench::Fairness { tenants, flood, rate, duration, common } => {
            let few = "execution.max_concurrent_attempts=64".to_owned();
            let subject = Subject::open_with(&common, &[few])?;
            let load = fairness::Load { tenants, flood, rate, duration };
            (subject.check(fairness::run(&subject, load).await?).await?, common.json)
        }
        Bench::Output { attempts, output_chunks, chunk_bytes, rate, duration, common } => {
            let subject = Subject::open(&common)?;
            let load = output::Load { attempts, output_chunks, chunk_bytes, rate, duration };
            (subject.check(output::run(&subject, load).await?).await?, common.json)
        }
        Bench::Limits { flood_rate, rate, duration, set, json } => {
            (limits::run(&limits::Load { flood_rate, rate, duration }, &set).await?, json)
        }
        Bench::Store { finished, queued, common } => {
            (store::run(finished, queued, &common.set).await?, common.json)
        }
        Bench::Idle { connections, common } => {
            let subject = Subject::open(&common)?;
            (subject.check(idle::run(&subject, connections).await?).await?, common.json)
        }
    };
    let exit = if report.faults() == 0 { Exit::Done } else { Exit::Failed };
    report.print(json);
    Ok(exit)
}

/// What the server leaves to so many workers.
fn local_actions(workers: usize) -> String {
    let local = if workers > 0 { "echo,health" } else { "*" };
    format!("execution.local_actions={local}")
}

/// How long the server is left to warm up before anything counts.
const WARM_UP: Duration = Duration::from_secs(1);

/// The number after `"seq":`; the generator must cost less than the server, so nothing else of a
/// message is read.
pub(crate) fn seq_of(message: &str) -> Option<i64> {
    number_after(message, "\"seq\":")
}

pub(crate) fn number_after(message: &str, name: &str) -> Option<i64> {
    let digits = &message[message.find(name)? + name.len()..];
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().ok()
}

/// The text of a member near the beginning of a message.
pub(crate) fn text_after<'a>(message: &'a str, name: &str) -> Option<&'a str> {
    let rest = &message[message.find(name)? + name.len()..];
    rest.split('"').next()
}
