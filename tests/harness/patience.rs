//! How long tests wait for what must come.

use std::time::Duration;

use tokio::time::timeout;

/// Far longer than anything takes on a slow and busy machine, and shorter than the time after which the
/// whole suite is taken for hung: the failure names the test.
const PATIENCE: Duration = Duration::from_secs(240);

/// Waits for something.
///
/// # Panics
/// When it does not come.
pub async fn in_time<T>(what: &str, coming: impl Future<Output = T>) -> T {
    match timeout(PATIENCE, coming).await {
        Ok(come) => come,
        Err(_) => panic!("{what} did not come within {} s", PATIENCE.as_secs()),
    }
}
