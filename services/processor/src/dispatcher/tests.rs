//! Tests of the counts of attempts, with a store and an event log that appends to it.

use bytes::Bytes;
use streamer_core::{ActionSpec, ManualClock, RequestState, limits};
use streamer_handler::{Context, DynHandler, HandlerError, Handlers, async_trait};
use streamer_proto::{
    common::v1::event::Kind,
    internal::v1::{
        AnnounceRequest, AnnounceResponse, PublishRequest, PublishResponse,
        event_log_service_server::EventLogService,
    },
    millis,
    stubs::EventLogServiceEndpoint,
};
use streamer_rpc::{RpcMetrics, local, parse_uid};
use streamer_store::{
    Append, AppendOutcome, Claim, NewRequest, Owner, Quota, StoredPayload, Writer,
};
use streamer_telemetry::Metrics;
use tempfile::TempDir;
use tokio::runtime::Handle;
use tonic::{Request, Response, Status};

use super::*;
use crate::{handlers::request_history::StoredHistory, workers::worker_pool::WorkerPool};

const LEASE: Duration = Duration::from_secs(10);

/// Event log without watchers. Reports that cancellation was requested once an attempt is retried.
struct StoringLog {
    store: Arc<dyn Store>,
    clock: Arc<ManualClock>,
}

#[tonic::async_trait]
impl EventLogService for StoringLog {
    async fn publish(
        &self,
        request: Request<PublishRequest>,
    ) -> Result<Response<PublishResponse>, Status> {
        let request = request.into_inner();
        let last = request.events.last().and_then(|event| event.kind.as_ref());
        let is_retried = matches!(last, Some(Kind::Retrying(_)));
        let append = Append {
            uid: parse_uid(&request.uid)?,
            writer: Writer::Attempt(AttemptNumber::from_i32(request.attempt).unwrap()),
            events: request.events,
            checkpoint: request.checkpoint,
            retry_at: request.retry_at.map(|at| Timestamp::from_millis(millis(&at))),
            now: self.clock.now(),
        };
        let appended = self.store.append(append).await.unwrap();
        assert!(matches!(appended, AppendOutcome::Applied { .. }), "{appended:?}");
        Ok(Response::new(PublishResponse { cancel_reason: is_retried.then(|| "enough".into()) }))
    }

    async fn announce(
        &self,
        _: Request<AnnounceRequest>,
    ) -> Result<Response<AnnounceResponse>, Status> {
        Ok(Response::new(AnnounceResponse {}))
    }
}

struct Fails;

#[async_trait]
impl DynHandler for Fails {
    fn spec(&self) -> ActionSpec {
        ActionSpec::new("fails")
    }

    async fn run(&self, _: &Context, _: Bytes) -> Result<Bytes, HandlerError> {
        Err(HandlerError::retryable("no"))
    }
}

struct Fixture {
    dispatcher: Arc<Dispatcher>,
    store: Arc<dyn Store>,
    clock: Arc<ManualClock>,
    metrics: Metrics,
    _data: TempDir,
}

fn fixture() -> Fixture {
    let data = TempDir::new().unwrap();
    let store = streamer_store_sqlite::open(data.path()).unwrap();
    let clock = Arc::new(ManualClock::at(Timestamp::from_millis(1_000_000)));
    let metrics = Metrics::new();
    let log = StoringLog { store: store.clone(), clock: clock.clone() };
    let log = local(EventLogServiceEndpoint::new(log), &RpcMetrics::new(&metrics));
    let wakeup = Arc::new(Wakeup::default());
    let workers = Arc::new(WorkerPool::new(wakeup.clone(), LEASE, 100));
    let handlers = Handlers::new().with(Fails);
    let dispatcher = Dispatcher::new(Parts {
        name: "processor".into(),
        store: store.clone(),
        history: Arc::new(StoredHistory::new(store.clone())),
        clock: clock.clone(),
        actions: Arc::new(Actions::new(handlers, workers, Duration::ZERO)),
        wakeup,
        log: EventLogClient::new(log, usize::MAX, &metrics),
        output_budget: MemoryBudget::new(1 << 20),
        handlers: HandlerSpawner::new(Handle::current(), 1, 1),
        metrics: ProcessorMetrics::new(&metrics),
        traces: Traces::default(),
        options: ProcessorOptions {
            max_concurrent_attempts: 4,
            tenant_share: 100,
            priority_aging: Duration::ZERO,
            max_concurrent_sync: 1,
            sync_timeout: LEASE,
            lease: LEASE,
            cancellation_grace_period: LEASE,
            poll_interval: LEASE,
            drain_timeout: LEASE,
            max_buffered_output_bytes: 1 << 20,
            limits: streamer_core::Limits {
                max_payload_bytes: 1024,
                max_output_chunk_bytes: 1024,
                payload_option: limits::PAYLOAD_OPTION,
            },
            sync_threshold: Duration::ZERO,
            queue_polling: false,
            shared: false,
        },
    });
    Fixture { dispatcher: Arc::new(dispatcher), store, clock, metrics, _data: data }
}

impl Fixture {
    /// Stores a request that must start within a lease.
    async fn create(&self) -> Uid {
        let now = self.clock.now();
        let uid = Uid::new(now);
        let new = NewRequest {
            uid,
            client_id: None,
            owner: Owner { tenant: "acme".into(), user: "ann".into() },
            action: "fails".into(),
            payload: StoredPayload { content_type: String::new(), data: "1".into() },
            metadata: None,
            priority: 0,
            create_time: now,
            not_before: now,
            deadline: Some(now.plus(LEASE)),
            close_by: None,
            redrive_of: None,
            trace_parent: None,
            trace_state: None,
            fingerprint: [0; 32],
            quota: Quota::default(),
        };
        self.store.create_request(new).await.unwrap();
        uid
    }

    async fn state(&self, uid: Uid) -> RequestState {
        self.store.get_request(uid).await.unwrap().unwrap().state
    }

    /// Returns the counts of attempts and of requests that ended without one.
    fn counts(&self) -> Vec<String> {
        let text = self.metrics.encode();
        let counts = text.lines().filter_map(|line| {
            let (name, labels) = line.strip_prefix("streamer_processor_")?.split_once('{')?;
            let is_count = ["attempts_total", "queued_requests_ended_total"].contains(&name);
            is_count.then(|| format!("{name} {labels}"))
        });
        counts.collect()
    }
}

#[tokio::test]
async fn a_request_that_is_cancelled_after_its_attempt_has_one_attempt() {
    let fixture = fixture();
    let uid = fixture.create().await;
    fixture.dispatcher.wakeup.mark_scan_pending();
    fixture.dispatcher.dispatch().await.unwrap();
    fixture.dispatcher.tasks.close();
    fixture.dispatcher.tasks.wait().await;
    assert_eq!(fixture.state(uid).await, RequestState::Cancelled);
    assert_eq!(
        fixture.counts(),
        [
            "attempts_total action=\"fails\",outcome=\"retrying\"} 1",
            "queued_requests_ended_total action=\"fails\",outcome=\"cancelled\"} 1",
        ]
    );
}

#[tokio::test]
async fn an_overdue_request_has_no_attempt() {
    let fixture = fixture();
    let uid = fixture.create().await;
    fixture.clock.advance(LEASE * 2);
    fixture.dispatcher.fail_overdue().await;
    assert_eq!(fixture.state(uid).await, RequestState::Failed);
    assert_eq!(
        fixture.counts(),
        ["queued_requests_ended_total action=\"fails\",outcome=\"failed\"} 1"]
    );
}

#[tokio::test]
async fn an_attempt_ends_when_its_lease_is_recovered() {
    let fixture = fixture();
    let uid = fixture.create().await;
    let now = fixture.clock.now();
    let claim = Claim {
        uid,
        holder: "killed".into(),
        worker: None,
        now,
        lease_until: now.plus(LEASE),
        repeats: None,
    };
    fixture.store.claim(claim).await.unwrap();
    fixture.clock.advance(LEASE * 2);
    fixture.dispatcher.recover_expired_leases().await;
    assert_eq!(fixture.state(uid).await, RequestState::Queued);
    assert_eq!(fixture.counts(), ["attempts_total action=\"fails\",outcome=\"retrying\"} 1"]);
}
