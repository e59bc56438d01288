//! Tests of attempts with an event log whose responses the test controls.

use std::sync::Arc;

use bytes::Bytes;
use streamer_core::{ActionSpec, AttemptNumber, ManualClock, RequestState, Seq, Uid};
use streamer_handler::{RequestSummary, async_trait};
use streamer_proto::{
    internal::v1::{
        AnnounceRequest, AnnounceResponse, PublishRequest, PublishResponse,
        event_log_service_server::EventLogService,
    },
    stubs::EventLogServiceEndpoint,
};
use streamer_rpc::{RpcMetrics, local};
use streamer_store::Owner;
use streamer_telemetry::Metrics;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tonic::{Request, Response, Status};

use tokio_util::sync::CancellationToken;

use super::*;
use crate::declaration::ActionKey;

type Answer = Result<PublishResponse, Status>;

/// Event log that passes each batch to the test, with a sender for the response.
struct ScriptedLog(mpsc::UnboundedSender<(PublishRequest, oneshot::Sender<Answer>)>);

#[tonic::async_trait]
impl EventLogService for ScriptedLog {
    async fn publish(
        &self,
        request: Request<PublishRequest>,
    ) -> Result<Response<PublishResponse>, Status> {
        let (answer, answered) = oneshot::channel();
        self.0.send((request.into_inner(), answer)).unwrap();
        answered.await.unwrap().map(Response::new)
    }

    async fn announce(
        &self,
        _: Request<AnnounceRequest>,
    ) -> Result<Response<AnnounceResponse>, Status> {
        Ok(Response::new(AnnounceResponse {}))
    }
}

struct NoHistory;

#[async_trait]
impl RequestHistory for NoHistory {
    async fn requests(
        &self,
        _: &str,
        _: &str,
        _: Timestamp,
        _: Timestamp,
        _: usize,
    ) -> Result<Vec<RequestSummary>, HandlerError> {
        Ok(Vec::new())
    }
}

/// Handler that succeeds once the token is cancelled.
struct WaitsForToken(CancellationToken);

#[async_trait]
impl DynHandler for WaitsForToken {
    fn spec(&self) -> ActionSpec {
        ActionSpec::new("waits")
    }

    async fn run(&self, _: &Context, _: Bytes) -> Result<Bytes, HandlerError> {
        self.0.cancelled().await;
        Ok("1".into())
    }
}

struct Fixture {
    handle: Arc<AttemptHandle>,
    may_end: CancellationToken,
    batches: mpsc::UnboundedReceiver<(PublishRequest, oneshot::Sender<Answer>)>,
    running: JoinHandle<AttemptResult>,
}

fn start() -> Fixture {
    let (sender, batches) = mpsc::unbounded_channel();
    let log =
        local(EventLogServiceEndpoint::new(ScriptedLog(sender)), &RpcMetrics::new(&Metrics::new()));
    let environment = Environment {
        clock: Arc::new(ManualClock::at(Timestamp::default())),
        log: EventLogClient::new(log, usize::MAX, &Metrics::new()),
        handlers: HandlerSpawner::new(Handle::current(), 1, 1),
        history: Arc::new(NoHistory),
        limits: Limits {
            max_payload_bytes: 1024,
            max_output_chunk_bytes: 1024,
            payload_option: streamer_core::limits::PAYLOAD_OPTION,
        },
        cancellation_grace_period: Duration::from_secs(10),
    };
    let may_end = CancellationToken::new();
    let attempt_spec = AttemptSpec {
        record: record(),
        declared: Arc::new(Declaration::new(
            ActionKey { action: "waits".into(), tenant: None },
            Arc::new(ActionSpec::new("waits")),
        )),
        handler: Arc::new(WaitsForToken(may_end.clone())),
        reports: Arc::default(),
        payload: StoredPayload { content_type: String::new(), data: Bytes::new() },
        checkpoint: None,
        started: None,
        output: OutputDigest::default(),
        is_remote: false,
    };
    let handle = Arc::new(AttemptHandle::default());
    let running = tokio::spawn({
        let handle = handle.clone();
        async move { run(&environment, attempt_spec, handle).await }
    });
    Fixture { handle, may_end, batches, running }
}

fn record() -> RequestRecord {
    RequestRecord {
        uid: Uid::new(Timestamp::default()),
        client_id: None,
        owner: Owner { tenant: "acme".into(), user: "ann".into() },
        action: "waits".into(),
        state: RequestState::Running,
        attempt: AttemptNumber::FIRST,
        failed_attempts: 0,
        last_seq: Seq::from(2),
        attempt_seq: Seq::from(2),
        priority: 0,
        create_time: Timestamp::default(),
        start_time: Some(Timestamp::default()),
        finish_time: None,
        not_before: Timestamp::default(),
        deadline: None,
        close_by: None,
        progress: None,
        metadata: None,
        cancel_reason: None,
        error: None,
        output: None,
        redrive_of: None,
        trace_parent: None,
        trace_state: None,
    }
}

#[tokio::test]
async fn a_missing_lease_during_the_final_append_does_not_fence_the_attempt() {
    let mut fixture = start();
    fixture.may_end.cancel();
    let (batch, answer) = fixture.batches.recv().await.unwrap();
    assert!(matches!(batch.events[0].kind, Some(Kind::Succeeded(_))));
    // The store has committed the event, which ended the lease. A renewal observes that before the attempt receives the
    // response.
    fixture.handle.record_missing_lease();
    tokio::task::yield_now().await;
    assert!(!fixture.handle.is_fenced());
    answer.send(Ok(PublishResponse::default())).unwrap();
    let finished = fixture.running.await.unwrap();
    assert!(matches!(finished, AttemptResult::Recorded(Kind::Succeeded(_), None, None)));
}

#[tokio::test]
async fn a_rejected_final_event_fences_the_attempt() {
    let mut fixture = start();
    fixture.may_end.cancel();
    let (_, answer) = fixture.batches.recv().await.unwrap();
    fixture.handle.record_missing_lease();
    answer.send(Err(Status::aborted("attempt 2 runs"))).unwrap();
    assert!(matches!(fixture.running.await.unwrap(), AttemptResult::Fenced));
}

#[tokio::test]
async fn an_unanswered_final_append_is_abandoned_after_a_lease() {
    let mut fixture = start();
    fixture.may_end.cancel();
    let (_, _unanswered) = fixture.batches.recv().await.unwrap();
    for _ in 0..=handle::MAX_MISSED_RENEWALS {
        fixture.handle.record_missing_lease();
    }
    assert!(matches!(fixture.running.await.unwrap(), AttemptResult::Fenced));
}

#[tokio::test]
async fn a_missing_lease_before_the_final_append_fences_the_attempt() {
    let fixture = start();
    fixture.handle.record_missing_lease();
    assert!(matches!(fixture.running.await.unwrap(), AttemptResult::Fenced));
}
