//! Work that must not stop halfway because its caller stopped waiting.

use streamer_telemetry::{InScope, Scope};
use tonic::Status;
use tracing::Instrument;

/// Starts `work` in a task of its own; the future that is returned waits for its result.
///
/// tonic drops the future of a call when the client goes away or its deadline passes. For a change
/// with more than one step, such as storing an event and then notifying watchers, that would leave the
/// first step without the second. Dropping the returned future leaves `work` running to its end, unless
/// the process ends before.
///
/// # Errors
/// The error of `work`. INTERNAL if it panicked, UNAVAILABLE if the process is shutting down.
pub fn run_to_completion<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> impl Future<Output = Result<T, Status>> + Send + 'static {
    // Boxed, because tokio copies a task several times on its way to the heap.
    let task = tokio::spawn(Box::pin(work).in_current_span().in_scope(Scope::current()));
    async move {
        match task.await {
            Ok(result) => result,
            Err(error) if error.is_panic() => {
                tracing::error!(%error, "a call panicked");
                Err(Status::internal("internal error"))
            }
            Err(_) => Err(Status::unavailable("the server is stopping")),
        }
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
