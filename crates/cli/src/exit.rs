//! Exit codes that scripts can use.

use std::process::ExitCode;

use streamer_client::ClientError;
use streamer_core::ErrorCode;

use crate::terminal::print_error_line;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0: done.
    Done,
    /// 1: the request failed.
    Failed,
    /// 2: wrong usage.
    Usage,
    /// 3: the server cannot be reached.
    Unreachable,
    /// 4: not permitted.
    NotPermitted,
    /// 5: cancelled.
    Cancelled,
    /// 130: interrupted by Ctrl-C, as shells have it; a request goes on.
    Interrupted,
}

impl Exit {
    /// The process's exit code.
    #[must_use]
    pub fn code(self) -> ExitCode {
        ExitCode::from(match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Unreachable => 3,
            Self::NotPermitted => 4,
            Self::Cancelled => 5,
            Self::Interrupted => 130,
        })
    }

    /// For a request that ended with this error.
    pub(crate) fn of_error_code(code: Option<ErrorCode>) -> Self {
        match code {
            Some(ErrorCode::Unauthorized | ErrorCode::Forbidden) => Self::NotPermitted,
            Some(ErrorCode::Cancelled) => Self::Cancelled,
            Some(ErrorCode::ValidationError | ErrorCode::InvalidAction) => Self::Usage,
            _ => Self::Failed,
        }
    }
}

/// Says on standard error what went wrong.
pub(crate) fn report(outcome: anyhow::Result<Exit>) -> ExitCode {
    match outcome {
        Ok(exit) => exit.code(),
        // Whoever read what was printed has enough.
        Err(error) if is_broken_pipe(&error) => Exit::Done.code(),
        Err(error) => {
            print_error_line(&format!("error: {error:#}"));
            exit_of(&error).code()
        }
    }
}

/// Wrong usage that only shows when a command runs.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<std::io::Error>();
    error.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn exit_of(error: &anyhow::Error) -> Exit {
    if error.is::<UsageError>() {
        return Exit::Usage;
    }
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Unreachable { .. }) => Exit::Unreachable,
        Some(ClientError::Closed { code: 4401 | 4403, .. }) => Exit::NotPermitted,
        Some(ClientError::Closed { code: 1009 | 4400, .. } | ClientError::Token) => Exit::Usage,
        Some(ClientError::Closed { .. }) => Exit::Unreachable,
        Some(ClientError::Refused(error)) if error.code == ErrorCode::Unavailable => {
            Exit::Unreachable
        }
        Some(ClientError::Refused(error)) => Exit::of_error_code(Some(error.code)),
        Some(ClientError::Url { .. } | ClientError::NoToken(_)) => Exit::Usage,
        Some(ClientError::Unexpected(_) | ClientError::Output(_)) | None => Exit::Failed,
    }
}
