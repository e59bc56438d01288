//! Exit codes of commands.

use std::process::ExitCode;

use streamer_client::ClientError;
use streamer_core::ErrorCode;

use crate::terminal::print_error_line;

/// Result of a command as an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// 0: success.
    Done,
    /// 1: the request failed.
    Failed,
    /// 2: invalid usage.
    Usage,
    /// 3: the server is unreachable.
    Unreachable,
    /// 4: permission denied.
    NotPermitted,
    /// 5: the request was cancelled.
    Cancelled,
    /// 130: interrupted by Ctrl-C, as in shells; the request continues.
    Interrupted,
}

impl Exit {
    /// Returns the exit code of the process.
    #[must_use]
    pub(crate) fn code(self) -> ExitCode {
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

    /// Returns the exit code for a request that ended with the given error code.
    pub(crate) fn from_error_code(code: Option<ErrorCode>) -> Self {
        match code {
            Some(ErrorCode::Unauthorized | ErrorCode::Forbidden) => Self::NotPermitted,
            Some(ErrorCode::Cancelled) => Self::Cancelled,
            Some(ErrorCode::ValidationError | ErrorCode::InvalidAction) => Self::Usage,
            _ => Self::Failed,
        }
    }
}

/// Prints an error to standard error and returns the exit code.
pub(crate) fn report(outcome: anyhow::Result<Exit>) -> ExitCode {
    match outcome {
        Ok(exit) => exit.code(),
        // The reader closed the pipe because it needs no further output.
        Err(error) if is_broken_pipe(&error) => Exit::Done.code(),
        Err(error) => {
            print_error_line(&format!("error: {error:#}"));
            exit_of(&error).code()
        }
    }
}

/// Usage error that is detected only when the command runs.
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
        Some(ClientError::Closed { code, .. }) => match code.error_code() {
            Some(code) => Exit::from_error_code(Some(code)),
            None => Exit::Unreachable,
        },
        Some(ClientError::Rejected(error)) if error.code == ErrorCode::Unavailable => {
            Exit::Unreachable
        }
        Some(ClientError::Rejected(error)) => Exit::from_error_code(Some(error.code)),
        Some(
            ClientError::InvalidUrl { .. }
            | ClientError::MalformedToken
            | ClientError::TokenSource(_),
        ) => Exit::Usage,
        Some(ClientError::Protocol(_) | ClientError::OutputMismatch(_)) | None => Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::CloseCode;

    use super::*;

    #[test]
    fn close_codes_have_the_exit_code_of_their_error() {
        for (code, expected) in [
            (CloseCode::Unauthenticated, Exit::NotPermitted),
            (CloseCode::Forbidden, Exit::NotPermitted),
            (CloseCode::InvalidRequest, Exit::Usage),
            (CloseCode::MessageTooBig, Exit::Usage),
            (CloseCode::GoingAway, Exit::Unreachable),
            (CloseCode::LimitExceeded, Exit::Unreachable),
            (CloseCode::Other(4999), Exit::Unreachable),
        ] {
            let error = ClientError::Closed { code, reason: String::new() };
            assert_eq!(exit_of(&error.into()), expected, "{code}");
        }
    }
}
