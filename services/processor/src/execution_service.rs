//! Implementation of `streamer.internal.v1.ExecutionService`.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::{FutureExt, StreamExt, stream::BoxStream};
use prost::Message;
use streamer_auth::{Authenticator, caller_of};
use streamer_core::{ActionSpec, AttemptNumber, ErrorCode, RequestError, Timestamp, Uid, saturate};
use streamer_handler::{AttemptInfo, Context, DynHandler, ReportQueue};
use streamer_proto::{
    internal::v1::{
        ActionDeclaration, ExecuteRequest, ExecuteResponse, FindActionRequest, FindActionResponse,
        NotifyQueuedRequest, NotifyQueuedResponse, SignalCancelRequest, SignalCancelResponse,
        WatchActionsRequest, WatchActionsResponse, execution_service_server::ExecutionService,
    },
    millis,
};
use streamer_rpc::{
    NOT_ADMITTED, error_status, json_payload, parse_uid, payload_into_parts, status,
};
use streamer_telemetry::{InScope, Scope, TraceContext, is_sampled};
use tokio::time::timeout;
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, metadata::MetadataValue};

use crate::{
    actions::{Actions, Runner},
    attempt::{handler_span, record_failure},
    dispatcher::Dispatcher,
    metrics::{ProcessorMetrics, SyncTimer},
    options::ProcessorOptions,
    scheduler::{Hint, concurrency_limiter::ConcurrencyLimiter},
    workers::{
        remote_handler::{Assignment, RemoteHandler},
        remote_task::RemoteTask,
        worker_pool::WorkerSlotPermit,
    },
};

/// Maximum size of one message of the action list in bytes, unless a single action is larger.
const MAX_LIST_MESSAGE_BYTES: usize = 256 * 1024;
/// Delay after which a caller may retry while all sync slots are in use. It is short because sync actions are short.
const SYNC_RETRY_AFTER: Duration = Duration::from_millis(100);

/// Handler of a call that a worker executes, with the permit for the worker's slot.
type RemoteCall = (Arc<RemoteHandler>, WorkerSlotPermit);

/// Execution API for routers.
pub struct ExecutionApi {
    dispatcher: Arc<Dispatcher>,
    actions: Arc<Actions>,
    authenticator: Arc<Authenticator>,
    metrics: ProcessorMetrics,
    options: ProcessorOptions,
    sync_limiter: Arc<ConcurrencyLimiter>,
}

impl ExecutionApi {
    pub(crate) fn new(
        dispatcher: Arc<Dispatcher>,
        actions: Arc<Actions>,
        authenticator: Arc<Authenticator>,
        metrics: ProcessorMetrics,
        options: ProcessorOptions,
    ) -> Self {
        let total = saturate::to_u32(options.max_concurrent_sync);
        let sync_limiter = Arc::new(ConcurrencyLimiter::new(total, options.tenant_share));
        Self { dispatcher, actions, authenticator, metrics, options, sync_limiter }
    }

    async fn execute_now(
        &self,
        request: Request<ExecuteRequest>,
        timer: &mut SyncTimer<'_>,
    ) -> Result<bytes::Bytes, Status> {
        let caller = caller_of(&self.authenticator, request.metadata().as_ref()).await;
        let caller = caller.map_err(not_admitted)?;
        let request = request.into_inner();
        let declared = self.actions.find(&request.action, &caller.principal.tenant);
        let Some(declared) = declared else {
            let message =
                format!("no handler or worker is available for action {:?}", request.action);
            return Err(not_admitted(error_status(ErrorCode::Unavailable, message)));
        };
        timer.set_declaration(&declared);
        let Some(_permit) = self.sync_limiter.try_acquire(&declared, &caller.principal.tenant)
        else {
            return Err(not_admitted(status(&RequestError::limited(
                "execution.max_concurrent_sync, execution.max_tenant_share_percent, max_concurrency",
                "too many concurrent sync actions",
                Some(SYNC_RETRY_AFTER),
            ))));
        };
        let spec = declared.spec.clone();
        let limit = spec.start_to_close.unwrap_or(self.options.sync_timeout);
        let cancellation = CancellationToken::new();
        // Notifies a handler that is still running in a different task after the timeout.
        let _cancelled_on_drop = cancellation.clone().drop_guard();
        let (content_type, payload) = payload_into_parts(request.payload);
        let scope = if is_sampled() {
            Scope::inline(handler_span(!self.actions.is_local(&request.action)))
        } else {
            Scope::default()
        };
        let trace = scope.trace_context().or_else(TraceContext::current);
        let context = Context::new(
            AttemptInfo {
                uid: request.uid.parse().unwrap_or_else(|_| Uid::new(Timestamp::default())),
                request_id: request.request_id,
                tenant: caller.principal.tenant.clone(),
                user: caller.principal.user.clone(),
                action: request.action,
                content_type,
                attempt: AttemptNumber::FIRST,
                checkpoint: None,
                trace_parent: trace.as_ref().map(TraceContext::header),
                trace_state: trace.as_ref().and_then(TraceContext::trace_state),
                deadline: Some(self.dispatcher.now().plus(limit)),
            },
            // A sync action has no log: its reports are discarded.
            Arc::new(ReportQueue::discarding()),
            cancellation,
            self.options.limits,
            None,
        );
        let (handler, remote) = self.acquire_handler(&spec, &context)?;
        // Keeps the streams of workers open until a call that a worker executes has ended.
        let _call = match &remote {
            None => None,
            Some(_) => Some(self.dispatcher.track_call().ok_or_else(|| {
                not_admitted(error_status(ErrorCode::Unavailable, "the processor is shutting down"))
            })?),
        };
        timer.set_started();
        let running = AssertUnwindSafe(handler.run(&context, payload)).catch_unwind();
        let span = scope.span();
        let running = running.in_scope(scope);
        let ended = timeout(limit, running).await;
        if let (Ok(_), Some((remote, _))) = (&ended, &remote) {
            remote.send_ended();
        }
        if let Ok(Ok(ended)) = &ended {
            record_failure(&span, ended);
        }
        drop(span);
        let result = match ended {
            Ok(Ok(Ok(result))) => result,
            Ok(Ok(Err(error))) => return Err(status(&error.into_request_error())),
            Ok(Err(_)) => {
                tracing::error!(action = spec.name, "handler panicked");
                return Err(error_status(ErrorCode::ProcessingFailed, "the handler panicked"));
            }
            Err(_) => {
                let message = format!("the action timed out after {} ms", limit.as_millis());
                return Err(error_status(ErrorCode::Timeout, message));
            }
        };
        let checked = self.options.limits.check_result(result.len());
        checked.map_err(|rule| error_status(ErrorCode::ProcessingFailed, rule))?;
        Ok(result)
    }
}

impl ExecutionApi {
    /// Acquires the handler for the given call, with the permit for the worker's slot if the handler is remote.
    fn acquire_handler(
        &self,
        spec: &Arc<ActionSpec>,
        context: &Context,
    ) -> Result<(Arc<dyn DynHandler>, Option<RemoteCall>), Status> {
        match self.actions.acquire_runner(&spec.name, context.tenant()) {
            Some(Runner::Local(handler)) => Ok((handler, None)),
            Some(Runner::Remote(permit)) => {
                let budget = self.dispatcher.output_budget();
                let task = RemoteTask::sync(context.uid(), &spec.name, context.tenant(), budget);
                let remote = Arc::new(RemoteHandler::new(
                    permit.worker.clone(),
                    spec.clone(),
                    task,
                    Some(Assignment { sync: true }),
                    None,
                    Duration::ZERO,
                ));
                Ok((remote.clone(), Some((remote, permit))))
            }
            None if self.actions.slots(&spec.name, context.tenant(), u32::MAX) == 0 => {
                let message = format!("no worker is available for action {:?}", spec.name);
                Err(not_admitted(error_status(ErrorCode::Unavailable, message)))
            }
            None => Err(not_admitted(status(&RequestError::limited(
                "worker slots",
                "all workers are busy",
                Some(SYNC_RETRY_AFTER),
            )))),
        }
    }
}

#[tonic::async_trait]
impl ExecutionService for ExecutionApi {
    type WatchActionsStream = BoxStream<'static, Result<WatchActionsResponse, Status>>;

    async fn execute(
        &self,
        request: Request<ExecuteRequest>,
    ) -> Result<Response<ExecuteResponse>, Status> {
        let mut timer = self.metrics.sync_request();
        let result = self.execute_now(request, &mut timer).await;
        timer.record(result.is_ok());
        Ok(Response::new(ExecuteResponse { result: Some(json_payload(result?)) }))
    }

    async fn notify_queued(
        &self,
        request: Request<NotifyQueuedRequest>,
    ) -> Result<Response<NotifyQueuedResponse>, Status> {
        let request = request.into_inner();
        let not_before = request.not_before.map(|at| Timestamp::from_millis(millis(&at)));
        let uid = parse_uid(&request.uid)?;
        let hint = Hint { tenant: &request.tenant_id, user: &request.user_id, not_before };
        let estimate = self.dispatcher.notify_queued(uid, &request.action, hint);
        Ok(Response::new(NotifyQueuedResponse {
            started: estimate.started,
            slots: saturate::to_i32(estimate.slots),
            mean_run_ms: estimate.mean_run_duration.map(saturate::to_millis),
        }))
    }

    async fn signal_cancel(
        &self,
        request: Request<SignalCancelRequest>,
    ) -> Result<Response<SignalCancelResponse>, Status> {
        let request = request.into_inner();
        self.dispatcher.signal_cancel(parse_uid(&request.uid)?, &request.reason);
        Ok(Response::new(SignalCancelResponse {}))
    }

    async fn find_action(
        &self,
        request: Request<FindActionRequest>,
    ) -> Result<Response<FindActionResponse>, Status> {
        let FindActionRequest { action, tenant_id } = request.into_inner();
        let declared = self.actions.find(&action, &tenant_id).is_some();
        Ok(Response::new(FindActionResponse { declared }))
    }

    async fn watch_actions(
        &self,
        _: Request<WatchActionsRequest>,
    ) -> Result<Response<Self::WatchActionsStream>, Status> {
        // An incomplete list would make routers reject requests for declared actions.
        self.actions.wait_until_loaded().await;
        let actions = self.actions.clone();
        let changes = WatchStream::new(self.actions.workers.subscribe_changes());
        // The streams end on shutdown, so that routers that watch the list do not delay it.
        let lists = changes
            .flat_map(move |_| tokio_stream::iter(split_list(actions.list())))
            .take_until(self.dispatcher.stopped());
        Ok(Response::new(Box::pin(lists)))
    }
}

/// Splits a list into messages of bounded size, because declarations can be large and numerous.
fn split_list(actions: Vec<ActionDeclaration>) -> Vec<Result<WatchActionsResponse, Status>> {
    let mut messages = vec![WatchActionsResponse::default()];
    let mut bytes = 0;
    for action in actions {
        bytes += action.encoded_len();
        if bytes > MAX_LIST_MESSAGE_BYTES
            && messages.last().is_some_and(|message| !message.actions.is_empty())
        {
            bytes = action.encoded_len();
            messages.push(WatchActionsResponse::default());
        }
        if let Some(message) = messages.last_mut() {
            message.actions.push(action);
        }
    }
    let last = messages.len() - 1;
    messages.iter_mut().take(last).for_each(|message| message.more = true);
    messages.into_iter().map(Ok).collect()
}

/// Marks an error that occurred before the call was admitted.
fn not_admitted(mut status: Status) -> Status {
    status.metadata_mut().insert(NOT_ADMITTED, MetadataValue::from_static("1"));
    status
}
