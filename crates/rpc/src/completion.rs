//! Work that must not stop halfway because its caller stopped waiting.

use std::future::Future;

use tonic::Status;
use tracing::Instrument;

/// Runs `work` in a task of its own and waits for its result.
///
/// tonic drops the future of a call when the client goes away or its deadline passes. For a change
/// with more than one step, such as storing an event and then notifying watchers, that would leave the
/// first step without the second. Dropping the future that this function returns leaves `work` running
/// to its end.
///
/// # Errors
/// The error of `work`. INTERNAL if it panicked, UNAVAILABLE if the process is shutting down.
pub async fn run_to_completion<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<T, Status> {
    match tokio::spawn(work.in_current_span()).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => {
            tracing::error!(%error, "a call panicked");
            Err(Status::internal("internal error"))
        }
        Err(_) => Err(Status::unavailable("the server is stopping")),
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::{mpsc, oneshot};

    use super::*;

    #[tokio::test]
    async fn work_continues_after_its_caller_stops_waiting() {
        let (proceed, wait) = oneshot::channel::<()>();
        let (steps, mut done) = mpsc::unbounded_channel();
        let work = run_to_completion(async move {
            steps.send("first").map_err(|_| Status::internal("no receiver"))?;
            wait.await.map_err(|_| Status::internal("no sender"))?;
            steps.send("second").map_err(|_| Status::internal("no receiver"))
        });
        let mut work = Box::pin(work);
        assert!(futures_util::poll!(&mut work).is_pending());
        assert_eq!(done.recv().await, Some("first"));
        drop(work);
        proceed.send(()).unwrap();
        assert_eq!(done.recv().await, Some("second"));
    }

    #[tokio::test]
    async fn a_panic_is_reported_to_the_caller() {
        let fails = true;
        let work = run_to_completion(async move {
            assert!(!fails, "on purpose");
            Ok(())
        });
        assert_eq!(work.await.unwrap_err().code(), tonic::Code::Internal);
    }
}
