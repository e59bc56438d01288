//! `streamer bench`: loads a server and measures throughput, latency and resource use.
//!
//! Latency is measured from the time when a request was due, not from the time when the generator sent it, so
//! that the results include the wait of all requests that were due while the server stalled (no coordinated
//! omission). Only verified requests count: the client must receive every event log without a gap.

mod cancel;
mod fairness;
mod fanout;
mod idle;
mod lifecycle;
mod limits;
mod load_target;
mod output;
mod queue;
mod raw_message;
mod report;
mod server_process;
mod small_requests;
mod store;
mod sync;
mod worker_process;

use std::time::Duration;

use clap::{Args, Subcommand};

use crate::{Exit, arguments::parse_duration};
use load_target::{BenchCommon, LoadTarget};

/// Arguments of `streamer bench`.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Without --server, a server is started for the measurement: this program in a
separate process, with a new data folder and relaxed rate and connection limits.

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
  streamer bench queue --tenants 1000 --waiting unavailable
  streamer bench store --finished 1000 --queued 20000
  streamer bench idle --connections 15000"
)]
pub(crate) struct BenchArguments {
    /// The benchmark to run.
    #[command(subcommand)]
    pub(crate) bench: Bench,
}

/// Benchmarks.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Bench {
    /// Measure sync requests (`echo`) over WebSocket.
    Sync {
        /// Number of WebSocket connections.
        #[arg(long, default_value_t = 256)]
        connections: usize,
        /// Total number of requests per second, sent on schedule even if the server is slow (open loop); 0
        /// sends each request after the response to the previous request (closed loop).
        #[arg(long, default_value_t = 0)]
        rate: u64,
        /// Duration of the measurement, after a warm-up of one second.
        #[arg(long, default_value = "5s", value_parser = parse_duration)]
        duration: Duration,
        #[command(flatten)]
        common: BenchCommon,
    },
    /// Measure complete async requests: submission, progress and result, with durable events.
    Lifecycle {
        /// Number of concurrent requests.
        #[arg(long, default_value_t = 256)]
        in_flight: usize,
        /// Number of WebSocket connections.
        #[arg(long, default_value_t = 16)]
        connections: usize,
        /// Number of progress events per request.
        #[arg(long, default_value_t = 10)]
        steps: u32,
        /// Total number of submissions per second, sent on schedule even if the server is slow (open loop); 0
        /// submits the next request when a previous request ends (closed loop).
        #[arg(long, default_value_t = 0)]
        rate: u64,
        /// Duration of the measurement, after a warm-up of one second.
        #[arg(long, default_value = "5s", value_parser = parse_duration)]
        duration: Duration,
        /// Number of worker processes that run the handlers; 0 runs them in the server.
        #[arg(long, default_value_t = 0)]
        workers: usize,
        /// Command that starts a worker for echo_async, with STREAMER_SERVER, STREAMER_TOKEN and
        /// STREAMER_SLOTS set [default: command `worker` of this program].
        #[arg(long, value_name = "COMMAND", requires = "workers")]
        worker_command: Option<String>,
        #[command(flatten)]
        common: BenchCommon,
    },
    /// Measure the delivery of events of running requests to watchers.
    Fanout {
        /// Number of concurrent requests.
        #[arg(long, default_value_t = 1)]
        requests: usize,
        /// Number of watchers per request, each with a separate WebSocket connection.
        #[arg(long, default_value_t = 1000)]
        watchers: usize,
        /// Number of progress events per request.
        #[arg(long, default_value_t = 2000)]
        events: u32,
        /// Milliseconds between two events of a request; 0 sends them as fast as they can be stored.
        #[arg(long, default_value_t = 1)]
        delay_ms: u32,
        /// Number of output chunks per request, distributed evenly among its events.
        #[arg(long, default_value_t = 0)]
        output_chunks: u32,
        /// Number of characters per chunk.
        #[arg(long, default_value_t = 64)]
        chunk_bytes: u32,
        #[command(flatten)]
        common: BenchCommon,
    },
    /// Measure the time from a cancellation to the end of the running request.
    Cancel {
        /// Number of requests, which run sequentially.
        #[arg(long, default_value_t = 200)]
        count: usize,
        /// Number of worker processes that run the handlers; 0 runs them in the server.
        #[arg(long, default_value_t = 0)]
        workers: usize,
        /// Command that starts a worker: see `bench lifecycle`.
        #[arg(long, value_name = "COMMAND", requires = "workers")]
        worker_command: Option<String>,
        #[command(flatten)]
        common: BenchCommon,
    },
    /// Measure the time that requests wait to start, with and without one tenant that floods the queue.
    Fairness {
        /// Number of tenants, one of which floods the queue.
        #[arg(long, default_value_t = 10)]
        tenants: usize,
        /// Number of requests of the flooding tenant.
        #[arg(long, default_value_t = 100_000)]
        flood: usize,
        /// Number of requests per second of each of the other tenants.
        #[arg(long, default_value_t = 20)]
        rate: u64,
        /// Duration of each measurement.
        #[arg(long, default_value = "8s", value_parser = parse_duration)]
        duration: Duration,
        #[command(flatten)]
        common: BenchCommon,
    },
    /// Measure the latency of small requests, with and without a second tenant whose output floods the store.
    Output {
        /// Number of concurrent attempts of the flooding tenant.
        #[arg(long, default_value_t = 50)]
        attempts: usize,
        /// Number of output chunks per attempt.
        #[arg(long, default_value_t = 20)]
        output_chunks: u32,
        /// Number of characters per chunk.
        #[arg(long, default_value_t = 1_000_000)]
        chunk_bytes: u32,
        /// Number of small requests per second.
        #[arg(long, default_value_t = 20)]
        rate: u64,
        /// Duration of each of the two measurements.
        #[arg(long, default_value = "8s", value_parser = parse_duration)]
        duration: Duration,
        #[command(flatten)]
        common: BenchCommon,
    },
    /// Measure the latency of small requests, with and without a second tenant that exceeds each limit in
    /// turn.
    Limits {
        /// Number of messages per second from the tenant that exceeds the limits; the number of connections
        /// that it opens per second is a tenth of this value.
        #[arg(long, default_value_t = 2000)]
        flood_rate: u64,
        /// Number of small requests per second.
        #[arg(long, default_value_t = 20)]
        rate: u64,
        /// Duration of each measurement.
        #[arg(long, default_value = "5s", value_parser = parse_duration)]
        duration: Duration,
        /// Set a configuration option of the started servers; may be repeated.
        #[arg(long = "set", value_name = "SECTION.OPTION=VALUE")]
        set: Vec<String>,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Measure the latency of small requests, alone and beside many tenants whose requests cannot start.
    Queue {
        /// Number of the other tenants.
        #[arg(long, default_value_t = 300)]
        tenants: usize,
        /// Number of requests of each of them.
        #[arg(long, default_value_t = 1)]
        requests: usize,
        /// Kind of their requests.
        #[arg(long, value_enum, default_value = "delayed")]
        waiting: queue::Waiting,
        /// Number of small requests per second.
        #[arg(long, default_value_t = 20)]
        rate: u64,
        /// Duration of each of the two measurements.
        #[arg(long, default_value = "8s", value_parser = parse_duration)]
        duration: Duration,
        #[command(flatten)]
        common: BenchCommon,
    },
    /// Measure start-up and claims on a large store.
    Store {
        /// Number of finished requests.
        #[arg(long, default_value_t = 1_000_000)]
        finished: usize,
        /// Number of queued requests that are due.
        #[arg(long, default_value_t = 100_000)]
        queued: usize,
        #[command(flatten)]
        common: BenchCommon,
    },
    /// Measure the memory of idle connections.
    Idle {
        /// Number of authenticated WebSocket connections.
        #[arg(long, default_value_t = 15_000)]
        connections: usize,
        #[command(flatten)]
        common: BenchCommon,
    },
}

pub(crate) async fn run(arguments: BenchArguments) -> anyhow::Result<Exit> {
    let (report, json) = match arguments.bench {
        Bench::Sync { connections, rate, duration, common } => {
            let target = LoadTarget::open(&common)?;
            (
                target.check(sync::run(&target, connections, rate, duration).await?).await?,
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
            let target = LoadTarget::open_with(&common, &[local_actions(workers)])?;
            let slots = in_flight.div_ceil(workers.max(1)) + 1;
            let _workers = worker_process::start(
                &target,
                "echo_async",
                workers,
                slots,
                worker_command.as_deref(),
            )
            .await?;
            let load = lifecycle::Load { in_flight, connections, steps, rate, duration };
            (target.check(lifecycle::run(&target, load).await?).await?, common.json)
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
            let target = LoadTarget::open(&common)?;
            let load =
                fanout::Load { requests, watchers, events, delay_ms, output_chunks, chunk_bytes };
            (target.check(fanout::run(&target, load).await?).await?, common.json)
        }
        Bench::Cancel { count, workers, worker_command, common } => {
            let target = LoadTarget::open_with(&common, &[local_actions(workers)])?;
            let _workers =
                worker_process::start(&target, "echo_async", workers, 8, worker_command.as_deref())
                    .await?;
            (target.check(cancel::run(&target, count).await?).await?, common.json)
        }
        Bench::Fairness { tenants, flood, rate, duration, common } => {
            let concurrency = "execution.max_concurrent_attempts=64".to_owned();
            let target = LoadTarget::open_with(&common, &[concurrency])?;
            let load = fairness::Load { tenants, flood, rate, duration };
            (target.check(fairness::run(&target, load).await?).await?, common.json)
        }
        Bench::Output { attempts, output_chunks, chunk_bytes, rate, duration, common } => {
            let target = LoadTarget::open(&common)?;
            let load = output::Load { attempts, output_chunks, chunk_bytes, rate, duration };
            (target.check(output::run(&target, load).await?).await?, common.json)
        }
        Bench::Queue { tenants, requests, waiting, rate, duration, common } => {
            let target = LoadTarget::open_with(&common, &[queue::local_actions()])?;
            let load = queue::Load { tenants, requests, waiting, rate, duration };
            (target.check(queue::run(&target, load).await?).await?, common.json)
        }
        Bench::Limits { flood_rate, rate, duration, set, json } => {
            (limits::run(&limits::Load { flood_rate, rate, duration }, &set).await?, json)
        }
        Bench::Store { finished, queued, common } => {
            (store::run(finished, queued, &common.set).await?, common.json)
        }
        Bench::Idle { connections, common } => {
            let target = LoadTarget::open(&common)?;
            (target.check(idle::run(&target, connections).await?).await?, common.json)
        }
    };
    let exit = if report.faults() == 0 { Exit::Done } else { Exit::Failed };
    report.print(json);
    Ok(exit)
}

/// Returns the setting for the actions that the server runs itself: without `echo_async` if workers are
/// started, otherwise all.
fn local_actions(workers: usize) -> String {
    let local = if workers > 0 { "echo,health" } else { "*" };
    format!("execution.builtin_actions={local}")
}
