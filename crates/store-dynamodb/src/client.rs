//! Configuration of the SDK client: endpoint, timeouts and retries.

use std::{
    env,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use aws_config::{BehaviorVersion, Region, SdkConfig, retry::RetryConfig, timeout::TimeoutConfig};
use aws_sdk_dynamodb::{Client, config::Credentials, types::ConsumedCapacity};
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, rustls_provider::CryptoMode},
};
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use streamer_core::{backoff, is_loopback_host};
use streamer_store::StoreError;
use streamer_telemetry::Metrics;
use tokio::time::{Instant, sleep};

use crate::{
    DynamoOptions, OpenError, claim_jitter::ClaimJitter, large_objects::LargeObjects,
    queue_counts::QueueCounts,
};

/// Timeout of one attempt of a call. DynamoDB responds within milliseconds, so a slower call is better retried.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// Timeout for opening a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout of a call, including all retries.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of attempts that the SDK makes for a call. In addition, the SDK has a retry budget for all calls
/// together.
const MAX_ATTEMPTS: u32 = 6;
/// Initial upper bound of the backoff.
const FIRST_BACKOFF: Duration = Duration::from_millis(25);
/// Maximum upper bound of the backoff.
const MAX_BACKOFF: Duration = Duration::from_secs(1);
/// Maximum time for which a transaction is retried after a conflict or throttling.
const TRANSACTION_RETRY_TIMEOUT: Duration = Duration::from_secs(5);

/// Region that calls to a local endpoint specify. Such an endpoint is in no region, but calls must specify one.
const LOCAL_REGION: Region = Region::from_static("us-east-1");

/// Names of the tables.
#[derive(Debug)]
pub(crate) struct TableNames {
    pub(crate) requests: String,
    pub(crate) parts: String,
    pub(crate) names: String,
    pub(crate) connections: String,
    pub(crate) fleet: String,
}

impl TableNames {
    pub(crate) fn new(prefix: &str) -> Self {
        let name = |table: &str| format!("{prefix}{table}");
        Self {
            requests: name("requests"),
            parts: name("parts"),
            names: name("names"),
            connections: name("connections"),
            fleet: name("fleet"),
        }
    }
}

/// State that all parts of the engine share.
#[derive(Clone)]
pub(crate) struct Dynamo {
    pub(crate) client: Client,
    pub(crate) tables: Arc<TableNames>,
    pub(crate) objects: Option<Arc<LargeObjects>>,
    pub(crate) queue_shards: u32,
    pub(crate) retention: Option<Duration>,
    pub(crate) claim_jitter: Arc<ClaimJitter>,
    pub(crate) queue_counts: Arc<QueueCounts>,
    /// Time of the next search for requests that an earlier version has queued; `None` for now.
    pub(crate) search_earlier_version_at: Arc<Mutex<Option<Instant>>>,
    pub(crate) metrics: DynamoMetrics,
}

#[derive(Clone)]
pub(crate) struct DynamoMetrics {
    read: Counter<f64, AtomicU64>,
    write: Counter<f64, AtomicU64>,
    pub(crate) throttled: Counter,
}

impl DynamoMetrics {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        Self {
            read: metrics.register(
                "streamer_dynamodb_consumed_read_capacity_units",
                "Consumed read capacity units",
                Counter::default(),
            ),
            write: metrics.register(
                "streamer_dynamodb_consumed_write_capacity_units",
                "Consumed write capacity units",
                Counter::default(),
            ),
            throttled: metrics.counter(
                "streamer_dynamodb_throttled",
                "Calls that were still throttled after all retries",
            ),
        }
    }

    pub(crate) fn record_read<'a>(&self, consumed: impl IntoIterator<Item = &'a ConsumedCapacity>) {
        self.read.inc_by(units(consumed));
    }

    pub(crate) fn record_write<'a>(
        &self,
        consumed: impl IntoIterator<Item = &'a ConsumedCapacity>,
    ) {
        self.write.inc_by(units(consumed));
    }
}

fn units<'a>(consumed: impl IntoIterator<Item = &'a ConsumedCapacity>) -> f64 {
    consumed.into_iter().filter_map(ConsumedCapacity::capacity_units).sum()
}

/// Returns the SDK configuration. Credentials come from the default credential provider chain; a local endpoint accepts
/// any credentials.
pub(crate) async fn sdk_config(options: &DynamoOptions) -> Result<SdkConfig, OpenError> {
    let http = Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https();
    let retries = RetryConfig::standard()
        .with_max_attempts(MAX_ATTEMPTS)
        .with_initial_backoff(FIRST_BACKOFF)
        .with_max_backoff(MAX_BACKOFF);
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .operation_attempt_timeout(ATTEMPT_TIMEOUT)
        .operation_timeout(CALL_TIMEOUT)
        .build();
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http)
        .retry_config(retries)
        .timeout_config(timeouts);
    if let Some(endpoint) = &options.endpoint {
        loader = loader.endpoint_url(endpoint);
    }
    let is_local = options.endpoint.as_deref().is_some_and(is_local);
    if is_local && env::var_os("AWS_ACCESS_KEY_ID").is_none() {
        let any = Credentials::new("local", "local", None, None, "streamer");
        loader = loader.credentials_provider(any);
    }
    let has_environment_region =
        ["AWS_REGION", "AWS_DEFAULT_REGION"].iter().any(|name| env::var_os(name).is_some());
    match &options.region {
        Some(region) => loader = loader.region(Region::new(region.clone())),
        None if is_local && !has_environment_region => loader = loader.region(LOCAL_REGION),
        None => {}
    }
    let config = loader.load().await;
    if config.region().is_none() {
        return Err(OpenError::Region);
    }
    Ok(config)
}

fn is_local(endpoint: &str) -> bool {
    let uri = endpoint.parse::<http::Uri>().ok();
    // An HTTPS endpoint on this machine may be a tunnel to AWS.
    uri.is_some_and(|uri| {
        uri.scheme_str() == Some("http") && uri.host().is_some_and(is_loopback_host)
    })
}

/// Exponential backoff with full jitter, up to a deadline.
pub(crate) struct Backoff {
    deadline: Instant,
    delays: backoff::Backoff,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            deadline: Instant::now() + TRANSACTION_RETRY_TIMEOUT,
            delays: backoff::Backoff::new(FIRST_BACKOFF, MAX_BACKOFF),
        }
    }
}

impl Backoff {
    /// Waits before a retry. Returns `error` if the deadline would be exceeded or a retry does not help.
    pub(crate) async fn wait(&mut self, error: StoreError) -> Result<(), StoreError> {
        let delay = self.delays.wait();
        if !error.is_retryable() || Instant::now() + delay > self.deadline {
            return Err(error);
        }
        sleep(delay).await;
        Ok(())
    }
}
