//! Clients of the services that the router calls.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{
    future::join_all,
    stream::{FuturesUnordered, StreamExt},
};
use http::HeaderValue;
use streamer_cluster::{Instance, Instances, is_safe_to_retry, with_route};
use streamer_core::{Limits, Timestamp, Uid};
use streamer_proto::{
    common::v1::{Event, Payload, Request},
    internal::v1::{
        AnnounceRequest, ExecuteRequest, FindActionRequest, NotifyQueuedRequest,
        NotifyQueuedResponse, SignalCancelRequest,
    },
    stubs::{EventLogServiceStub, ExecutionServiceStub, ProgressServiceStub},
    timestamp,
};
use streamer_rpc::{Channel, NOT_ADMITTED, with_authorization};
use streamer_store::RequestRecord;
use tokio::{sync::Semaphore, time::timeout};
use tonic::{Code, Status};

/// Timeout of a hint. A lost hint only causes a delay, because its receiver also polls the store.
const HINT_TIMEOUT: Duration = Duration::from_secs(2);

/// Maximum number of concurrent lookups of unknown actions.
const MAX_CONCURRENT_LOOKUPS: usize = 64;

/// Maximum number of processors that are notified of a queued request.
const MAX_NOTIFIED: usize = 3;

/// Error of a sync action.
pub(crate) enum ExecuteError {
    /// No processor has started the action.
    Rejected(Status),
    /// A processor may have started the action.
    Failed(Status),
}

impl ExecuteError {
    pub(crate) fn into_status(self) -> Status {
        match self {
            Self::Rejected(status) | Self::Failed(status) => status,
        }
    }
}

/// Clients of the processors and of the progress service.
pub(crate) struct Upstreams {
    pub(crate) processors: Instances,
    event_log: EventLogServiceStub,
    progress: ProgressServiceStub,
    limits: Limits,
    push_notifications: bool,
    rotation: AtomicUsize,
    /// Permits for lookups of unknown actions.
    lookup_permits: Semaphore,
}

impl Upstreams {
    pub(crate) fn new(
        processors: Instances,
        event_log: Channel,
        progress: Channel,
        limits: Limits,
        push_notifications: bool,
    ) -> Self {
        Self {
            processors,
            event_log: EventLogServiceStub::new(event_log),
            progress: ProgressServiceStub::new(progress)
                .max_decoding_message_size(limits.max_message_bytes().saturating_mul(2)),
            limits,
            push_notifications,
            rotation: AtomicUsize::new(0),
            lookup_permits: Semaphore::new(MAX_CONCURRENT_LOOKUPS),
        }
    }

    pub(crate) fn processor(&self, instance: &Instance) -> ExecutionServiceStub {
        ExecutionServiceStub::new(instance.channel.clone())
            // The declaration of an action may be larger than a payload.
            .max_decoding_message_size(self.limits.max_worker_message_bytes())
            .max_encoding_message_size(self.limits.max_message_bytes())
    }

    /// Returns the processors with the given names, or all processors if no name matches, in the order in which
    /// to call them.
    fn candidates(&self, names: &[Arc<str>]) -> Vec<Instance> {
        let all = self.processors.all();
        if all.len() == 1 {
            return all.to_vec();
        }
        let named = all.iter().filter(|instance| names.contains(&instance.name));
        let mut found: Vec<_> = named.cloned().collect();
        if found.is_empty() {
            found = all.to_vec();
        }
        if found.len() > 1 {
            let start = self.rotation.fetch_add(1, Ordering::Relaxed) % found.len();
            found.rotate_left(start);
            // Unhealthy processors are called only if none is healthy.
            if found.iter().any(Instance::is_reachable) {
                found.retain(Instance::is_reachable);
            }
        }
        found
    }

    pub(crate) fn progress(&self) -> ProgressServiceStub {
        self.progress.clone()
    }

    /// Runs a sync action on one of the given processors, authenticated with the caller's token.
    pub(crate) async fn execute(
        &self,
        authorization: HeaderValue,
        request: ExecuteRequest,
        processors: &[Arc<str>],
    ) -> Result<Option<Payload>, ExecuteError> {
        let mut last = None;
        let mut instances = self.candidates(processors).into_iter().peekable();
        let mut request = Some(request);
        while let Some(instance) = instances.next() {
            // The last candidate receives the request itself instead of a copy.
            let message = if instances.peek().is_some() { request.clone() } else { request.take() };
            let Some(message) = message else { break };
            let call = with_authorization(message, authorization.clone());
            match self.processor(&instance).execute(call).await {
                Ok(response) => return Ok(response.into_inner().result),
                Err(status) if is_safe_to_retry(&status) => {
                    instance.record_reachable(false);
                    last = Some(status);
                }
                Err(mut status) if status.metadata().contains_key(NOT_ADMITTED) => {
                    status.metadata_mut().remove(NOT_ADMITTED);
                    last = Some(status);
                }
                Err(status) => return Err(ExecuteError::Failed(status)),
            }
        }
        let unavailable = || Status::unavailable("no processor is available");
        Err(ExecuteError::Rejected(last.unwrap_or_else(unavailable)))
    }

    /// Returns whether any processor reports that `action` is declared for `tenant`; `None` if no processor reports
    /// it and at least one did not respond.
    pub(crate) async fn is_declared(&self, action: &str, tenant: &str) -> Option<bool> {
        let _permit = self.lookup_permits.acquire().await.ok()?;
        let request = FindActionRequest { action: action.to_owned(), tenant_id: tenant.to_owned() };
        let instances = self.candidates(&[]);
        let answers = instances.iter().map(|instance| {
            let (mut client, request) = (self.processor(instance), request.clone());
            async move { timeout(HINT_TIMEOUT, client.find_action(request)).await }
        });
        let mut answers: FuturesUnordered<_> = answers.collect();
        let mut all_answered = true;
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(Ok(answer)) if answer.get_ref().declared => return Some(true),
                Ok(Ok(_)) => {}
                // The processor has an earlier version, whose list contains all declared actions.
                Ok(Err(status)) if status.code() == Code::Unimplemented => {}
                Ok(Err(_)) | Err(_) => all_answered = false,
            }
        }
        all_answered.then_some(false)
    }

    /// Announces a durable event to the progress service, as a hint.
    pub(crate) async fn announce(&self, uid: Uid, event: Event, created: Option<Request>) {
        let uid_bytes = uid.to_bytes().to_vec().into();
        let request = AnnounceRequest { uid: uid_bytes, events: vec![event], created };
        let request = with_route(request, uid);
        match timeout(HINT_TIMEOUT, self.event_log.clone().announce(request)).await {
            Ok(Ok(_)) => {}
            Ok(Err(status)) => tracing::warn!(%uid, %status, "failed to announce an event"),
            Err(_) => tracing::warn!(%uid, "timed out announcing an event"),
        }
    }

    /// Notifies up to [`MAX_NOTIFIED`] of the given processors of a queued request, as a hint, until one starts it.
    /// Returns their merged estimate.
    pub(crate) async fn notify_queued(
        &self,
        record: &RequestRecord,
        not_before: Option<Timestamp>,
        processors: &[Arc<str>],
    ) -> Option<NotifyQueuedResponse> {
        if !self.push_notifications {
            return None;
        }
        let uid = record.uid;
        let request = NotifyQueuedRequest {
            uid: uid.to_bytes().to_vec().into(),
            action: record.action.clone(),
            tenant_id: record.owner.tenant.clone(),
            user_id: record.owner.user.clone(),
            not_before: not_before.map(|at| timestamp(at.as_millis())),
        };
        let mut estimate: Option<NotifyQueuedResponse> = None;
        for instance in self.candidates(processors).into_iter().take(MAX_NOTIFIED) {
            match timeout(HINT_TIMEOUT, self.processor(&instance).notify_queued(request.clone()))
                .await
            {
                Ok(Ok(response)) => {
                    let response = response.into_inner();
                    let done = response.started || not_before.is_some();
                    estimate = Some(merge_estimates(estimate, response));
                    if done {
                        break;
                    }
                }
                Ok(Err(status)) => {
                    tracing::warn!(%uid, %status, "failed to notify a processor; polling will find the request");
                    instance.record_reachable(false);
                }
                Err(_) => {
                    tracing::warn!(%uid, "timed out notifying a processor; polling will find the request");
                    instance.record_reachable(false);
                }
            }
        }
        estimate
    }

    /// Notifies all processors of a requested cancellation, as a hint.
    pub(crate) async fn signal_cancel(&self, uid: Uid, reason: &str) {
        let uid_bytes = uid.to_bytes().to_vec().into();
        let request = SignalCancelRequest { uid: uid_bytes, reason: reason.to_owned() };
        let instances = self.candidates(&[]);
        join_all(instances.iter().map(|instance| {
            let (mut client, request) = (self.processor(instance), request.clone());
            async move {
                let outcome = timeout(HINT_TIMEOUT, client.signal_cancel(request)).await;
                if !matches!(outcome, Ok(Ok(_))) {
                    tracing::warn!(%uid, "failed to signal a cancellation; a lease renewal will report it");
                }
            }
        }))
        .await;
    }
}

/// Merges the estimate of one processor into the estimate of the previous ones.
fn merge_estimates(
    merged: Option<NotifyQueuedResponse>,
    response: NotifyQueuedResponse,
) -> NotifyQueuedResponse {
    let Some(merged) = merged else { return response };
    NotifyQueuedResponse {
        started: merged.started || response.started,
        slots: merged.slots.saturating_add(response.slots),
        mean_run_ms: response.mean_run_ms.or(merged.mean_run_ms),
    }
}
