//! The timeout of events that tests wait for.

use std::time::Duration;

use tokio::time::timeout;

/// Maximum time to wait for an event. It is sufficient for any event on a slow and busy machine, and shorter than
/// the timeout of a suite, so that the failure names the test.
const TIMEOUT: Duration = Duration::from_secs(240);

/// Waits for a future; `what` describes its result.
///
/// # Panics
/// Panics if the future does not complete in time.
pub async fn within_timeout<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(TIMEOUT, future).await {
        Ok(output) => output,
        Err(_) => panic!("timed out after {} s waiting for {what}", TIMEOUT.as_secs()),
    }
}
