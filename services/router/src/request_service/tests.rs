//! Tests of changes whose caller disconnects.

use futures_util::poll;
use streamer_auth::Principal;
use streamer_cluster::Instances;
use streamer_core::{RequestState, SystemClock};
use streamer_proto::{
    internal::v1::{
        AnnounceRequest, AnnounceResponse, PublishRequest, PublishResponse,
        event_log_service_server::EventLogService,
    },
    stubs::EventLogServiceEndpoint,
};
use streamer_rpc::{RpcMetrics, local};
use streamer_telemetry::Metrics;
use tempfile::TempDir;
use tokio::sync::{Semaphore, mpsc};
use tonic::{Request, Response};

use super::*;

/// Forwards each announcement to the test after acquiring a permit from `gate`.
struct Announcements {
    gate: Arc<Semaphore>,
    announced: mpsc::UnboundedSender<AnnounceRequest>,
}

#[tonic::async_trait]
impl EventLogService for Announcements {
    async fn publish(
        &self,
        _: Request<PublishRequest>,
    ) -> Result<Response<PublishResponse>, Status> {
        Err(Status::unimplemented("the router does not publish"))
    }

    async fn announce(
        &self,
        request: Request<AnnounceRequest>,
    ) -> Result<Response<AnnounceResponse>, Status> {
        self.gate.acquire().await.unwrap().forget();
        self.announced.send(request.into_inner()).unwrap();
        Ok(Response::new(AnnounceResponse {}))
    }
}

struct Fixture {
    service: Arc<RequestService>,
    gate: Arc<Semaphore>,
    announced: mpsc::UnboundedReceiver<AnnounceRequest>,
    caller: Caller,
    metrics: Metrics,
    _data: TempDir,
}

fn fixture() -> Fixture {
    let data = TempDir::new().unwrap();
    let store = streamer_store_sqlite::open(data.path()).unwrap();
    let (sender, announced) = mpsc::unbounded_channel();
    let gate = Arc::new(Semaphore::new(0));
    let announcements = Announcements { gate: gate.clone(), announced: sender };
    let log = local(EventLogServiceEndpoint::new(announcements), &RpcMetrics::new(&Metrics::new()));
    let limits = Limits {
        max_payload_bytes: 1024,
        max_output_chunk_bytes: 1024,
        payload_option: streamer_core::limits::PAYLOAD_OPTION,
    };
    let metrics = Metrics::new();
    let processors = Instances::one(streamer_cluster::Service::Processor, log.clone());
    let service = Arc::new(RequestService {
        store,
        clock: Arc::new(SystemClock),
        upstreams: Arc::new(Upstreams::new(processors, log.clone(), log, limits, false)),
        catalog: Arc::default(),
        metrics: Arc::new(RouterMetrics::new(&metrics)),
        limits,
        changes: ChangeLimiter::default(),
        order: SubmissionOrder::default(),
        submissions: Arc::new(SubmissionRates::new(LimitsByTenant::default())),
        tenant_limits: LimitsByTenant::default(),
    });
    let principal = Principal {
        tenant: "acme".into(),
        user: "ann".into(),
        permissions: Vec::new(),
        expires_at: Timestamp::default(),
    };
    let authorization = http::HeaderValue::from_static("Bearer t");
    let caller = Caller::new(Arc::new(principal), authorization);
    Fixture { service, gate, announced, caller, metrics, _data: data }
}

fn submission() -> Submission {
    Submission {
        client_id: Some("one".into()),
        action: "a".into(),
        payload: StoredPayload { content_type: String::new(), data: "1".into() },
        metadata: None,
        wait_ms: 0,
        priority: 0,
        delay_ms: 0,
        deadline: None,
        uid: Uid::new(SystemClock.now()),
        after: None,
    }
}

impl Fixture {
    fn now(&self) -> Timestamp {
        self.service.clock.now()
    }

    /// Returns the counts of submissions by result.
    fn counts(&self) -> Vec<String> {
        let text = self.metrics.encode();
        let requests =
            text.lines().filter(|line| line.starts_with("streamer_router_requests_total"));
        requests.filter_map(|line| Some(line.split_once("result=")?.1.to_owned())).collect()
    }
}

#[tokio::test]
async fn a_stored_submission_is_announced_after_its_caller_disconnects() {
    let mut fixture = fixture();
    {
        let (owner, now) = (owner(&fixture.caller), fixture.now());
        let count = fixture.service.metrics.submission();
        let mut call = Box::pin(fixture.service.create(owner, submission(), now, None, &count));
        assert!(poll!(&mut call).is_pending());
        tokio::task::yield_now().await;
    }
    fixture.gate.add_permits(1);
    let announced = fixture.announced.recv().await.unwrap();
    assert_eq!(announced.events[0].seq, 1);
    assert_eq!(announced.created.unwrap().request_id, "one");
    assert_eq!(fixture.counts(), ["\"accepted\"} 1"]);
}

#[tokio::test]
async fn a_submission_whose_caller_disconnects_before_it_is_stored_is_cancelled() {
    let fixture = fixture();
    // The catalog waits for the lists of processors.
    let request = SubmitRequest { action: "a".into(), ..SubmitRequest::default() };
    let mut call = Box::pin(fixture.service.submit(&fixture.caller, request, None));
    assert!(poll!(&mut call).is_pending());
    assert!(fixture.counts().is_empty());
    drop(call);
    assert_eq!(fixture.counts(), ["\"cancelled\"} 1"]);
}

#[tokio::test]
async fn a_stored_cancellation_is_announced_after_its_caller_disconnects() {
    let mut fixture = fixture();
    let (owner, now) = (owner(&fixture.caller), fixture.now());
    fixture.gate.add_permits(1);
    let count = fixture.service.metrics.submission();
    fixture.service.create(owner, submission(), now, None, &count).await.unwrap();
    fixture.announced.recv().await.unwrap();
    {
        let mut call = Box::pin(fixture.service.cancel(&fixture.caller, "one", "enough".into()));
        // Polls until the cancellation is stored; the gate blocks its announcement.
        let mut is_cancelled = false;
        while !is_cancelled {
            assert!(poll!(&mut call).is_pending());
            tokio::task::yield_now().await;
            let found = fixture.service.find(&fixture.caller, "one", Access::Read).await.unwrap();
            is_cancelled = found.state == RequestState::Cancelled;
        }
    }
    fixture.gate.add_permits(1);
    let announced = fixture.announced.recv().await.unwrap();
    assert!(matches!(announced.events[0].kind, Some(Kind::Cancelled(_))));
}
