//! Metrics of the store operations, for every engine.

use std::sync::Arc;

use async_trait::async_trait;
use prometheus_client::{encoding::EncodeLabelSet, metrics::counter::Counter};
use streamer_core::{Seq, Timestamp, Uid};
use streamer_store::{
    Adopt, Append, AppendOutcome, BackupOutcome, CancelOutcome, Claim, ClaimOutcome,
    ConnectionPage, ConnectionRecord, CreateOutcome, DeclaredAction, DeleteOutcome, DuePage,
    DueQuery, EventPage, Lease, LeaseRenewal, ListRequests, NewRequest, Owner, QueueAhead,
    QueueNotifier, QueueStats, ReleasedRequests, RequestPage, RequestRecord, Store, StoreError,
    StoredPayload,
};
use streamer_telemetry::{IndexedFamily, LatencyHistogram, Metrics};
use strum::{EnumCount, IntoStaticStr};
use tokio::time::Instant;

/// Operation of the store.
#[derive(Clone, Copy, Debug, EnumCount, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
enum Operation {
    CreateRequest,
    GetRequest,
    FindRequest,
    ListRequests,
    ReadPayload,
    DeleteRequest,
    Claim,
    Append,
    Cancel,
    RenewLeases,
    ExpiredLeases,
    Adopt,
    OverdueRequests,
    DueRequests,
    QueueAhead,
    ReleaseDelayed,
    QueueStats,
    ReadEvents,
    UpdateConnections,
    RenewGateway,
    ListConnections,
    SaveActions,
    ListActions,
    BackUp,
    Check,
}

/// Outcome of an operation.
#[derive(Clone, Copy, Debug, EnumCount, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
enum Outcome {
    Ok,
    Unavailable,
    Overloaded,
    Rejected,
    Corrupt,
    /// The caller did not wait for the outcome.
    Cancelled,
}

impl Outcome {
    fn of(error: &StoreError) -> Self {
        match error {
            StoreError::Unavailable { .. } => Self::Unavailable,
            StoreError::Overloaded { .. } => Self::Overloaded,
            StoreError::Rejected { .. } => Self::Rejected,
            StoreError::Corrupt { .. }
            | StoreError::Locked { .. }
            | StoreError::UnsupportedVersion { .. } => Self::Corrupt,
        }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OutcomeLabels {
    operation: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OperationLabel {
    operation: &'static str,
}

/// Metrics of all operations. A series exists after the first operation that it counts.
struct StoreMetrics {
    operations: IndexedFamily<OutcomeLabels, Counter>,
    durations: IndexedFamily<OperationLabel, LatencyHistogram>,
}

impl StoreMetrics {
    fn new(metrics: &Metrics) -> Self {
        Self {
            operations: IndexedFamily::register(
                metrics,
                "streamer_store_operations",
                "Operations of the store, by operation and outcome: ok, cancelled if the caller did not wait, or \
                 the kind of the error",
                Operation::COUNT * Outcome::COUNT,
            ),
            durations: IndexedFamily::register(
                metrics,
                "streamer_store_operation_duration_seconds",
                "Duration of the operations of the store, with waiting and retries, by operation",
                Operation::COUNT,
            ),
        }
    }

    async fn measure<T>(
        &self,
        operation: Operation,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let mut timer =
            Timer { metrics: self, operation, outcome: Outcome::Cancelled, start: Instant::now() };
        let result = call.await;
        timer.outcome = result.as_ref().map_or_else(Outcome::of, |_| Outcome::Ok);
        result
    }
}

/// Measurement of an operation, recorded when it is dropped.
struct Timer<'a> {
    metrics: &'a StoreMetrics,
    operation: Operation,
    outcome: Outcome,
    start: Instant,
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        let Self { metrics, operation, outcome, .. } = *self;
        let labels = || OutcomeLabels { operation: operation.into(), outcome: outcome.into() };
        let label = || OperationLabel { operation: operation.into() };
        let (position, duration) = (operation as usize, self.start.elapsed());
        metrics.durations.with(position, label, |latency| latency.observe(duration));
        let index = position * Outcome::COUNT + outcome as usize;
        metrics.operations.with(index, labels, |counter| {
            counter.inc();
        });
    }
}

/// A store whose operations are counted and measured.
pub(crate) struct MeasuredStore {
    store: Arc<dyn Store>,
    metrics: StoreMetrics,
}

impl MeasuredStore {
    /// Registers the metrics.
    pub(crate) fn new(store: Arc<dyn Store>, metrics: &Metrics) -> Self {
        Self { store, metrics: StoreMetrics::new(metrics) }
    }
}

/// Implements [`Store`] by measured calls of the inner store.
macro_rules! measured {
    ($($operation:ident: $method:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        #[async_trait]
        impl Store for MeasuredStore {
            $(
                async fn $method(&self, $($argument: $type),*) -> Result<$result, StoreError> {
                    let call = self.store.$method($($argument),*);
                    self.metrics.measure(Operation::$operation, call).await
                }
            )*

            fn queue_notifier(&self) -> Option<Arc<dyn QueueNotifier>> {
                self.store.queue_notifier()
            }
        }
    };
}

measured! {
    CreateRequest: create_request(new: NewRequest) -> CreateOutcome;
    GetRequest: get_request(uid: Uid) -> Option<RequestRecord>;
    FindRequest: find_request(owner: Owner, client_id: String) -> Option<RequestRecord>;
    ListRequests: list_requests(query: ListRequests) -> RequestPage;
    ReadPayload: read_payload(uid: Uid) -> Option<StoredPayload>;
    DeleteRequest: delete_request(uid: Uid) -> DeleteOutcome;
    Claim: claim(claim: Claim) -> ClaimOutcome;
    Append: append(append: Append) -> AppendOutcome;
    Cancel: cancel(uid: Uid, reason: String, now: Timestamp) -> CancelOutcome;
    RenewLeases: renew_leases(holder: String, leases: Vec<Lease>, until: Timestamp, now: Timestamp)
        -> Vec<LeaseRenewal>;
    ExpiredLeases: expired_leases(now: Timestamp, limit: usize) -> Vec<RequestRecord>;
    Adopt: adopt(adopt: Adopt) -> Option<RequestRecord>;
    OverdueRequests: overdue_requests(now: Timestamp, limit: usize) -> Vec<RequestRecord>;
    DueRequests: due_requests(query: DueQuery) -> DuePage;
    QueueAhead: queue_ahead(record: RequestRecord, limit: usize) -> QueueAhead;
    ReleaseDelayed: release_delayed(now: Timestamp, limit: usize) -> ReleasedRequests;
    QueueStats: queue_stats() -> QueueStats;
    ReadEvents: read_events(uid: Uid, after_seq: Seq, max_events: usize, max_bytes: usize) -> EventPage;
    UpdateConnections: update_connections(opened: Vec<ConnectionRecord>, closed: Vec<Uid>) -> ();
    RenewGateway: renew_gateway(gateway: String, until: Timestamp) -> ();
    ListConnections: list_connections(
        tenant: String, user: Option<String>, after: Option<Uid>, limit: usize, now: Timestamp
    ) -> ConnectionPage;
    SaveActions: save_actions(actions: Vec<DeclaredAction>, now: Timestamp) -> ();
    ListActions: list_actions(since: Timestamp) -> Vec<DeclaredAction>;
    BackUp: back_up() -> BackupOutcome;
    Check: check() -> ();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unavailable() -> StoreError {
        StoreError::Unavailable { doing: "testing", reason: "no reason".into() }
    }

    #[tokio::test(start_paused = true)]
    async fn operations_are_counted_by_outcome() {
        let registry = Metrics::new();
        let metrics = StoreMetrics::new(&registry);
        let ok = metrics.measure(Operation::Claim, async { Ok(1) }).await;
        assert_eq!(ok.unwrap(), 1);
        let failed = metrics.measure(Operation::Claim, async { Err::<(), _>(unavailable()) });
        assert!(failed.await.is_err());
        let endless = metrics.measure(Operation::Claim, std::future::pending::<Result<(), _>>());
        assert!(tokio::time::timeout(std::time::Duration::from_secs(1), endless).await.is_err());
        let text = registry.encode();
        for line in [
            "streamer_store_operations_total{operation=\"claim\",outcome=\"ok\"} 1",
            "streamer_store_operations_total{operation=\"claim\",outcome=\"unavailable\"} 1",
            "streamer_store_operations_total{operation=\"claim\",outcome=\"cancelled\"} 1",
            "streamer_store_operation_duration_seconds_count{operation=\"claim\"} 3",
            "streamer_store_operation_duration_seconds_sum{operation=\"claim\"} 1.0",
        ] {
            assert!(text.contains(line), "{line} is missing in {text}");
        }
    }

    #[tokio::test]
    async fn a_store_is_measured() {
        let folder = tempfile::tempdir().unwrap();
        let registry = Metrics::new();
        let store = streamer_store_sqlite::open(folder.path()).unwrap();
        let store = MeasuredStore::new(store, &registry);
        store.check().await.unwrap();
        let text = registry.encode();
        let line = "streamer_store_operations_total{operation=\"check\",outcome=\"ok\"} 1";
        assert!(text.contains(line), "{text}");
    }
}
