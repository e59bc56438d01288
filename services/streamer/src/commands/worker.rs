//! `streamer worker`: runs the example handlers in a separate process.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use streamer_config::Trace;
use streamer_core::ErrorCode;
use streamer_telemetry::{LogFormat, TraceOptions, Traces, init};
use streamer_worker::{Worker, WorkerError};

use crate::{
    Exit,
    arguments::{CommonArguments, parse_duration},
    commands::{config::environment, select_handlers::select_handlers},
};

/// Arguments of `streamer worker`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "The server must not run the actions itself:
  streamer up --set execution.builtin_actions=echo,health
  streamer worker --actions process_data,generate_report

On SIGTERM, running attempts may finish within the drain timeout; the others are returned to the
server. A second SIGTERM stops the worker immediately.")]
pub(crate) struct WorkerArguments {
    /// Actions to run, separated by commas [default: all].
    #[arg(long, value_name = "ACTIONS", value_delimiter = ',')]
    pub(crate) actions: Vec<String>,
    /// Maximum number of concurrent attempts.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) slots: u32,
    /// Time limit for running attempts on shutdown: a number followed by s, m, h or d.
    #[arg(long, default_value = "30s", value_parser = parse_duration)]
    pub(crate) drain_timeout: Duration,
    #[command(flatten)]
    pub(crate) common: CommonArguments,
}

/// Log filter of a worker if `STREAMER_LOG` is not set.
const LOG_FILTER: &str = "info";
/// Timeout for exporting the last spans.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

pub(crate) async fn run(arguments: WorkerArguments) -> ExitCode {
    let filter = std::env::var("STREAMER_LOG").unwrap_or_else(|_| LOG_FILTER.into());
    let traces = match traces(&filter) {
        Ok(traces) => traces,
        Err(error) => {
            eprintln!("error: {error}");
            return Exit::Usage.code();
        }
    };
    let all = streamer_builtin_actions::all();
    let actions = match &arguments.actions[..] {
        [] => vec!["*".to_owned()],
        names => names.to_vec(),
    };
    let handlers = match select_handlers(all, &actions) {
        Ok(handlers) => handlers,
        Err(error) => {
            eprintln!("error: --actions: {error}");
            return Exit::Usage.code();
        }
    };
    let common = arguments.common;
    let worker = Worker::new(common.server.clone(), common.tokens(), handlers)
        .slots(arguments.slots)
        .drain_timeout(arguments.drain_timeout)
        .version(env!("CARGO_PKG_VERSION"));
    let result = worker.run_until_terminated().await;
    traces.flush(FLUSH_TIMEOUT).await;
    match result {
        Ok(()) => Exit::Done.code(),
        Err(error) => {
            eprintln!("error: {error}");
            exit_code_of(&error).code()
        }
    }
}

/// Configures tracing from OpenTelemetry's environment variables. A worker makes no sampling decision: a
/// request is traced if its submission is traced.
fn traces(filter: &str) -> anyhow::Result<Traces> {
    let trace = Trace::from_environment(&environment())?;
    let options = TraceOptions {
        endpoint: (!trace.endpoint.is_empty()).then_some(trace.endpoint),
        service: "streamer-worker",
        version: env!("CARGO_PKG_VERSION"),
        ..TraceOptions::default()
    };
    Ok(init(filter, LogFormat::default(), &options)?.traces)
}

fn exit_code_of(error: &WorkerError) -> Exit {
    match error {
        WorkerError::Rejected(error) => match error.code {
            ErrorCode::Unauthorized | ErrorCode::Forbidden => Exit::NotPermitted,
            _ => Exit::Usage,
        },
        WorkerError::TokenExpired => Exit::NotPermitted,
        WorkerError::Url(_) | WorkerError::Token(_) | WorkerError::NoHandlers => Exit::Usage,
        WorkerError::Signal(_) => Exit::Failed,
    }
}
