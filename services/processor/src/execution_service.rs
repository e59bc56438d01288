//! `streamer.internal.v1.ExecutionService`.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::{FutureExt, stream::BoxStream};
use streamer_auth::{Authenticator, caller_of};
use streamer_core::{ActionSpec, ErrorCode, RequestError, Timestamp, Uid};
use streamer_handler::{AttemptInfo, Context, Handlers, ReportQueue};
use streamer_proto::{
    common::v1::Action,
    internal::v1::{
        ExecuteRequest, ExecuteResponse, SignalCancelRequest, SignalCancelResponse, WakeRequest,
        WakeResponse, WatchActionsRequest, WatchActionsResponse,
        execution_service_server::ExecutionService,
    },
    millis,
};
use streamer_rpc::{json_payload, payload_into_parts, status};
use tokio::{sync::Semaphore, time::timeout};
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::{ProcessorOptions, dispatcher::Dispatcher, metrics::ProcessorMetrics};

/// When to come again while all sync slots are taken: sync actions are short.
const SYNC_RETRY_AFTER: Duration = Duration::from_millis(100);

/// Serves routers.
pub struct ExecutionApi {
    dispatcher: Arc<Dispatcher>,
    handlers: Handlers,
    authenticator: Arc<Authenticator>,
    metrics: ProcessorMetrics,
    options: ProcessorOptions,
    sync_slots: Semaphore,
}

impl ExecutionApi {
    pub(crate) fn new(
        dispatcher: Arc<Dispatcher>,
        handlers: Handlers,
        authenticator: Arc<Authenticator>,
        metrics: ProcessorMetrics,
        options: ProcessorOptions,
    ) -> Self {
        let sync_slots = Semaphore::new(options.max_concurrent_sync);
        Self { dispatcher, handlers, authenticator, metrics, options, sync_slots }
    }

    async fn execute_now(&self, request: Request<ExecuteRequest>) -> Result<bytes::Bytes, Status> {
        let caller = caller_of(&self.authenticator, request.metadata().as_ref()).await?;
        let request = request.into_inner();
        let Some((spec, handler)) = self.handlers.get(&request.action) else {
            return Err(refusal(
                ErrorCode::InvalidAction,
                format!("there is no action {:?} here", request.action),
            ));
        };
        let Ok(_slot) = self.sync_slots.try_acquire() else {
            return Err(status(&RequestError::limited(
                "execution.max_concurrent_sync",
                "too many sync actions run at once",
                Some(SYNC_RETRY_AFTER),
            )));
        };
        let cancellation = CancellationToken::new();
        // A handler that runs on after its time, on another task, learns that nobody waits.
        let _cancelled_on_drop = cancellation.clone().drop_guard();
        let context = Context::new(
            AttemptInfo {
                uid: request.uid.parse().unwrap_or_else(|_| Uid::new(Timestamp::default())),
                request_id: request.request_id,
                tenant: caller.principal.tenant.clone(),
                user: caller.principal.user.clone(),
                action: request.action,
                attempt: 1,
                checkpoint: None,
                trace_parent: None,
            },
            // A sync action has no log: what it reports beside its result goes nowhere.
            Arc::new(ReportQueue::discarding()),
            cancellation,
            self.options.limits,
            None,
        );
        let (_, payload) = payload_into_parts(request.payload);
        let limit = spec.start_to_close.unwrap_or(self.options.sync_timeout);
        let running = AssertUnwindSafe(handler.run(&context, payload)).catch_unwind();
        let result = match timeout(limit, running).await {
            Ok(Ok(Ok(result))) => result,
            Ok(Ok(Err(error))) => return Err(status(&error.into_request_error())),
            Ok(Err(_)) => {
                tracing::error!(action = spec.name, "a handler panicked");
                return Err(refusal(ErrorCode::ProcessingFailed, "the handler panicked".into()));
            }
            Err(_) => {
                let message = format!("it took longer than {} ms", limit.as_millis());
                return Err(refusal(ErrorCode::Timeout, message));
            }
        };
        let largest = self.options.limits.max_payload_bytes;
        if result.len() > largest {
            let message = format!(
                "the result must be at most {largest} bytes (limits.max_payload_bytes), is {}",
                result.len()
            );
            return Err(refusal(ErrorCode::ProcessingFailed, message));
        }
        Ok(result)
    }
}

#[tonic::async_trait]
impl ExecutionService for ExecutionApi {
    type WatchActionsStream = BoxStream<'static, Result<WatchActionsResponse, Status>>;

    async fn execute(
        &self,
        request: Request<ExecuteRequest>,
    ) -> Result<Response<ExecuteResponse>, Status> {
        self.metrics.sync_calls.inc();
        match self.execute_now(request).await {
            Ok(result) => Ok(Response::new(ExecuteResponse { result: Some(json_payload(result)) })),
            Err(status) => {
                self.metrics.sync_failures.inc();
                Err(status)
            }
        }
    }

    async fn wake(&self, request: Request<WakeRequest>) -> Result<Response<WakeResponse>, Status> {
        let request = request.into_inner();
        let not_before = request.not_before.map(|at| Timestamp::from_millis(millis(&at)));
        self.dispatcher.wake(parse_uid(&request.uid)?, &request.action, not_before);
        Ok(Response::new(WakeResponse {}))
    }

    async fn signal_cancel(
        &self,
        request: Request<SignalCancelRequest>,
    ) -> Result<Response<SignalCancelResponse>, Status> {
        let request = request.into_inner();
        self.dispatcher.signal_cancel(parse_uid(&request.uid)?, &request.reason);
        Ok(Response::new(SignalCancelResponse {}))
    }

    async fn watch_actions(
        &self,
        _: Request<WatchActionsRequest>,
    ) -> Result<Response<Self::WatchActionsStream>, Status> {
        let threshold = self.options.sync_threshold;
        let actions = self.handlers.specs().map(|spec| to_proto(spec, threshold)).collect();
        // In-process handlers never change; the stream stays open, which says that we live.
        let first = tokio_stream::once(Ok(WatchActionsResponse { actions }));
        Ok(Response::new(Box::pin(first.chain(tokio_stream::pending()))))
    }
}

fn to_proto(spec: &ActionSpec, threshold: Duration) -> Action {
    let millis = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    Action {
        name: spec.name.clone(),
        description: spec.description.clone(),
        sync: spec.is_sync(threshold),
        estimated_duration_ms: millis(spec.estimated_duration),
        max_attempts: i32::try_from(spec.retry.max_attempts).unwrap_or(i32::MAX),
        start_to_close_ms: spec.start_to_close.map_or(0, millis),
        permission: spec.permission.clone().unwrap_or_default(),
        max_concurrency: i32::try_from(spec.max_concurrency.unwrap_or(0)).unwrap_or(i32::MAX),
        payload_schema: spec.payload_schema.clone().unwrap_or_default(),
        initial_backoff_ms: millis(spec.retry.initial_backoff),
        max_backoff_ms: millis(spec.retry.max_backoff),
    }
}

fn parse_uid(bytes: &[u8]) -> Result<Uid, Status> {
    Uid::from_slice(bytes)
        .ok_or_else(|| refusal(ErrorCode::ValidationError, "uid must be 16 bytes".into()))
}

fn refusal(code: ErrorCode, message: String) -> Status {
    status(&RequestError::new(code, message))
}
