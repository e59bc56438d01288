//! `streamer worker`: the example handlers in a process of their own.

use std::process::ExitCode;

use streamer_cli::{Exit, WorkerArguments};
use streamer_core::ErrorCode;
use streamer_telemetry::{LogFormat, init_logs};
use streamer_worker::{Worker, WorkerError};

/// What a worker logs unless `STREAMER_LOG` says otherwise.
const LOG_FILTER: &str = "info";

pub(crate) async fn run(arguments: WorkerArguments) -> ExitCode {
    let filter = std::env::var("STREAMER_LOG").unwrap_or_else(|_| LOG_FILTER.into());
    if let Err(error) = init_logs(&filter, LogFormat::default()) {
        eprintln!("error: {error}");
        return Exit::Usage.code();
    }
    let all = streamer_examples::all();
    let actions = match &arguments.actions[..] {
        [] => vec!["*".to_owned()],
        some => some.to_vec(),
    };
    let handlers = match super::up::some_of(all, &actions) {
        Ok(handlers) => handlers,
        Err(error) => {
            eprintln!("error: --actions: {error}");
            return Exit::Usage.code();
        }
    };
    let common = arguments.common;
    let worker = Worker::new(common.server.clone(), common.find_token(), handlers)
        .slots(arguments.slots)
        .drain_timeout(arguments.drain_timeout)
        .version(env!("CARGO_PKG_VERSION"));
    match worker.run_until_terminated().await {
        Ok(()) => Exit::Done.code(),
        Err(error) => {
            eprintln!("error: {error}");
            exit_of(&error).code()
        }
    }
}

fn exit_of(error: &WorkerError) -> Exit {
    match error {
        WorkerError::Refused(error) => match error.code {
            ErrorCode::Unauthorized | ErrorCode::Forbidden => Exit::NotPermitted,
            _ => Exit::Usage,
        },
        WorkerError::Url(_) | WorkerError::Token(_) | WorkerError::NoHandlers => Exit::Usage,
        WorkerError::Signal(_) => Exit::Failed,
    }
}
