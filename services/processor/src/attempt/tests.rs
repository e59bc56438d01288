//! Attempts against an event log that answers when the test does.

use std::sync::Arc;

use bytes::Bytes;
use streamer_core::{ManualClock, RequestState};
use streamer_handler::{RequestSummary, async_trait};
use streamer_proto::internal::v1::{
    AnnounceRequest, AnnounceResponse, PublishResponse,
    event_log_service_server::{EventLogService, EventLogServiceServer},
};
use streamer_rpc::local;
use streamer_store::Owner;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tonic::{Request, Response};

use tokio_util::sync::CancellationToken;

use super::*;

type Answer = Result<PublishResponse, Status>;

/// Hands every batch to the test, with the way to answer it.
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

/// Succeeds once it is allowed to.
struct Waits(CancellationToken);

#[async_trait]
impl DynHandler for Waits {
    fn spec(&self) -> ActionSpec {
        ActionSpec::new("waits")
    }

    async fn run(&self, _: &Context, _: Bytes) -> Result<Bytes, HandlerError> {
        self.0.cancelled().await;
        Ok("1".into())
    }
}

struct Scene {
    handle: Arc<AttemptHandle>,
    may_end: CancellationToken,
    batches: mpsc::UnboundedReceiver<(PublishRequest, oneshot::Sender<Answer>)>,
    running: JoinHandle<Finished>,
}

fn start() -> Scene {
    let (sender, batches) = mpsc::unbounded_channel();
    let log = local(EventLogServiceServer::new(ScriptedLog(sender)));
    let environment = Environment {
        clock: Arc::new(ManualClock::at(Timestamp::default())),
        log: LogClient::new(log, usize::MAX),
        handlers: Handle::current(),
        history: Arc::new(NoHistory),
        limits: Limits {
            max_payload_bytes: 1024,
            max_output_chunk_bytes: 1024,
            payload_rule: streamer_core::limits::PAYLOAD_OPTION,
        },
        cancel_grace: Duration::from_secs(10),
    };
    let may_end = CancellationToken::new();
    let launch = Launch {
        record: record(),
        spec: Arc::new(ActionSpec::new("waits")),
        handler: Arc::new(Waits(may_end.clone())),
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
        async move { run(&environment, launch, handle).await }
    });
    Scene { handle, may_end, batches, running }
}

fn record() -> RequestRecord {
    RequestRecord {
        uid: Uid::new(Timestamp::default()),
        client_id: None,
        owner: Owner { tenant: "acme".into(), user: "ann".into() },
        action: "waits".into(),
        state: RequestState::Running,
        attempt: 1,
        last_seq: 2,
        attempt_seq: 2,
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
async fn a_lease_that_is_missing_while_the_last_event_is_being_stored_is_no_loss() {
    let mut scene = start();
    scene.may_end.cancel();
    let (batch, answer) = scene.batches.recv().await.unwrap();
    assert!(matches!(batch.events[0].kind, Some(Kind::Succeeded(_))));
    // The store has committed the event, which ended the lease; a renewal finds that out before the
    // attempt does.
    scene.handle.note_lease_missing();
    tokio::task::yield_now().await;
    assert!(!scene.handle.is_lost());
    answer.send(Ok(PublishResponse::default())).unwrap();
    let finished = scene.running.await.unwrap();
    assert!(matches!(finished, Finished::Concluded(Kind::Succeeded(_), None, None)));
}

#[tokio::test]
async fn a_last_event_that_comes_too_late_is_refused_and_the_attempt_is_lost() {
    let mut scene = start();
    scene.may_end.cancel();
    let (_, answer) = scene.batches.recv().await.unwrap();
    scene.handle.note_lease_missing();
    answer.send(Err(Status::aborted("attempt 2 runs"))).unwrap();
    assert!(matches!(scene.running.await.unwrap(), Finished::Lost));
}

#[tokio::test]
async fn a_last_event_that_is_neither_stored_nor_refused_is_given_up_after_a_lease() {
    let mut scene = start();
    scene.may_end.cancel();
    let (_, _unanswered) = scene.batches.recv().await.unwrap();
    for _ in 0..=handle::MAX_MISSING {
        scene.handle.note_lease_missing();
    }
    assert!(matches!(scene.running.await.unwrap(), Finished::Lost));
}

#[tokio::test]
async fn a_lease_that_is_missing_before_the_end_is_a_loss() {
    let scene = start();
    scene.handle.note_lease_missing();
    assert!(matches!(scene.running.await.unwrap(), Finished::Lost));
}
