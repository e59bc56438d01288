//! The services that the router talks to.

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
use streamer_core::{Limits, Timestamp, Uid};
use streamer_proto::{
    common::v1::{Event, Payload, Request},
    internal::v1::{
        AnnounceRequest, ExecuteRequest, FindActionRequest, SignalCancelRequest, WakeRequest,
        WakeResponse, event_log_service_client::EventLogServiceClient,
        execution_service_client::ExecutionServiceClient,
    },
    progress::v1::progress_service_client::ProgressServiceClient,
    timestamp,
};
use streamer_rpc::{
    Channel, Member, Members, NOT_TAKEN, is_unsent, with_authorization, with_route,
};
use streamer_store::RequestRecord;
use tokio::{sync::Semaphore, time::timeout};
use tonic::{Code, Status};

/// What a hint tells is found without it too, after a while.
const HINT_TIMEOUT: Duration = Duration::from_secs(2);

/// Unknown actions that processors are asked for at the same time, at most.
const MAX_ASKING: usize = 64;

/// Processors that a request is offered to at most.
const MAX_OFFERS: usize = 3;

pub(crate) struct Peers {
    pub(crate) processors: Members,
    event_log: EventLogServiceClient<Channel>,
    progress: ProgressServiceClient<Channel>,
    limits: Limits,
    hints: bool,
    turn: AtomicUsize,
    /// Unknown actions that processors are asked for at the same time.
    asking: Semaphore,
}

impl Peers {
    pub(crate) fn new(
        processors: Members,
        event_log: Channel,
        progress: Channel,
        limits: Limits,
        hints: bool,
    ) -> Self {
        Self {
            processors,
            event_log: EventLogServiceClient::new(event_log),
            progress: ProgressServiceClient::new(progress)
                .max_decoding_message_size(limits.max_message_bytes().saturating_mul(2)),
            limits,
            hints,
            turn: AtomicUsize::new(0),
            asking: Semaphore::new(MAX_ASKING),
        }
    }

    pub(crate) fn processor(&self, member: &Member) -> ExecutionServiceClient<Channel> {
        ExecutionServiceClient::new(member.channel.clone())
            // A declared action may be larger than a payload.
            .max_decoding_message_size(self.limits.max_worker_message_bytes())
            .max_encoding_message_size(self.limits.max_message_bytes())
    }

    /// The processors of these names, or all when there are none, in the order in which they should
    /// be asked.
    fn candidates(&self, names: &[Arc<str>]) -> Vec<Member> {
        let all = self.processors.all();
        if all.len() == 1 {
            return all.to_vec();
        }
        let named = all.iter().filter(|member| names.contains(&member.name));
        let mut found: Vec<_> = named.cloned().collect();
        if found.is_empty() {
            found = all.to_vec();
        }
        if found.len() > 1 {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed) % found.len();
            found.rotate_left(turn);
            // Whoever is down is not waited for, unless all seem to be.
            if found.iter().any(Member::seems_up) {
                found.retain(Member::seems_up);
            }
        }
        found
    }

    pub(crate) fn progress(&self) -> ProgressServiceClient<Channel> {
        self.progress.clone()
    }

    /// Runs a sync action, in the caller's name, at one of these processors.
    pub(crate) async fn execute(
        &self,
        authorization: HeaderValue,
        request: ExecuteRequest,
        processors: &[Arc<str>],
    ) -> Result<Option<Payload>, Status> {
        let mut last = None;
        let mut members = self.candidates(processors).into_iter().peekable();
        let mut request = Some(request);
        while let Some(member) = members.next() {
            // A copy is only needed where there is another one to ask.
            let message = if members.peek().is_some() { request.clone() } else { request.take() };
            let Some(message) = message else { break };
            let call = with_authorization(message, authorization.clone());
            match self.processor(&member).execute(call).await {
                Ok(response) => return Ok(response.into_inner().result),
                Err(status) if is_unsent(&status) => {
                    member.note(false);
                    last = Some(status);
                }
                Err(mut status) if status.metadata().contains_key(NOT_TAKEN) => {
                    status.metadata_mut().remove(NOT_TAKEN);
                    last = Some(status);
                }
                Err(status) => return Err(status),
            }
        }
        Err(last.unwrap_or_else(|| Status::unavailable("no processor is known")))
    }

    /// Whether a processor says that this action is declared for this tenant; `None` when some did not answer.
    pub(crate) async fn is_declared(&self, action: &str, tenant: &str) -> Option<bool> {
        let _permit = self.asking.acquire().await.ok()?;
        let request = FindActionRequest { action: action.to_owned(), tenant_id: tenant.to_owned() };
        let members = self.candidates(&[]);
        let answers = members.iter().map(|member| {
            let (mut client, request) = (self.processor(member), request.clone());
            async move { timeout(HINT_TIMEOUT, client.find_action(request)).await }
        });
        let mut answers: FuturesUnordered<_> = answers.collect();
        let mut all_answered = true;
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(Ok(answer)) if answer.get_ref().declared => return Some(true),
                Ok(Ok(_)) => {}
                // An earlier version, whose list is all that there is.
                Ok(Err(status)) if status.code() == Code::Unimplemented => {}
                Ok(Err(_)) | Err(_) => all_answered = false,
            }
        }
        all_answered.then_some(false)
    }

    /// Tells the progress service of a durable event; a hint.
    pub(crate) async fn announce(&self, uid: Uid, event: Event, created: Option<Request>) {
        let uid_bytes = uid.to_bytes().to_vec().into();
        let request = AnnounceRequest { uid: uid_bytes, events: vec![event], created };
        let request = with_route(request, uid);
        match timeout(HINT_TIMEOUT, self.event_log.clone().announce(request)).await {
            Ok(Ok(_)) => {}
            Ok(Err(status)) => tracing::warn!(%uid, %status, "could not announce an event"),
            Err(_) => tracing::warn!(%uid, "could not announce an event in time"),
        }
    }

    /// Tells one of these processors that a request waits, which is a hint, and hears how it looks
    /// there.
    pub(crate) async fn wake(
        &self,
        record: &RequestRecord,
        not_before: Option<Timestamp>,
        processors: &[Arc<str>],
    ) -> Option<WakeResponse> {
        if !self.hints {
            return None;
        }
        let uid = record.uid;
        let request = WakeRequest {
            uid: uid.to_bytes().to_vec().into(),
            action: record.action.clone(),
            tenant_id: record.owner.tenant.clone(),
            not_before: not_before.map(|at| timestamp(at.as_millis())),
        };
        let mut outlook: Option<WakeResponse> = None;
        for member in self.candidates(processors).into_iter().take(MAX_OFFERS) {
            match timeout(HINT_TIMEOUT, self.processor(&member).wake(request.clone())).await {
                Ok(Ok(response)) => {
                    let response = response.into_inner();
                    let done = response.started || not_before.is_some();
                    outlook = Some(joined(outlook, response));
                    if done {
                        break;
                    }
                }
                Ok(Err(status)) => {
                    tracing::warn!(%uid, %status, "could not wake a processor; its poll will find it");
                    member.note(false);
                }
                Err(_) => {
                    tracing::warn!(%uid, "a processor does not answer; another's poll will find it");
                    member.note(false);
                }
            }
        }
        outlook
    }

    /// Tells the processors that cancellation was asked for; a hint.
    pub(crate) async fn signal_cancel(&self, uid: Uid, reason: &str) {
        let uid_bytes = uid.to_bytes().to_vec().into();
        let request = SignalCancelRequest { uid: uid_bytes, reason: reason.to_owned() };
        let members = self.candidates(&[]);
        join_all(members.iter().map(|member| {
            let (mut client, request) = (self.processor(member), request.clone());
            async move {
                let outcome = timeout(HINT_TIMEOUT, client.signal_cancel(request)).await;
                if !matches!(outcome, Ok(Ok(_))) {
                    tracing::warn!(%uid, "could not signal a cancellation; the lease renewal will");
                }
            }
        }))
        .await;
    }
}

/// How it looks at several processors.
fn joined(before: Option<WakeResponse>, news: WakeResponse) -> WakeResponse {
    let Some(before) = before else { return news };
    WakeResponse {
        started: before.started || news.started,
        slots: before.slots.saturating_add(news.slots),
        usual_run_ms: news.usual_run_ms.or(before.usual_run_ms),
    }
}
