//! Work that must complete even if its caller stops waiting.

use streamer_telemetry::{InScope, Scope};
use tonic::Status;
use tracing::Instrument;

/// Spawns `work` in a dedicated task and returns a future that resolves to its result.
///
/// tonic drops the future of a call when the client disconnects or its deadline expires. A change with
/// several steps, such as storing an event and then notifying watchers, could then stop after the first
/// step. If the returned future is dropped, `work` still runs to completion, unless the process exits
/// first.
///
/// # Errors
/// Returns the error of `work`, INTERNAL if it panics, or UNAVAILABLE if the process is shutting down.
pub fn run_to_completion<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> impl Future<Output = Result<T, Status>> + Send + 'static {
    // Boxed because tokio copies a future several times before it is on the heap.
    let task = tokio::spawn(Box::pin(work).in_current_span().in_scope(Scope::current()));
    async move {
        match task.await {
            Ok(result) => result,
            Err(error) if error.is_panic() => {
                tracing::error!(%error, "a call panicked");
                Err(Status::internal("internal error"))
            }
            Err(_) => Err(Status::unavailable("the server is shutting down")),
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
            assert!(!fails, "intentional");
            Ok(())
        });
        assert_eq!(work.await.unwrap_err().code(), tonic::Code::Internal);
    }
}
