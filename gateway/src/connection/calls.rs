//! Calls of a connection: each client message starts a call, and each call returns a reply.

use std::borrow::Cow;

use bytes::Bytes;
use futures_util::FutureExt;
use serde_json::value::RawValue;
use streamer_cluster::RouteKey;
use streamer_core::{CloseCode, RequestError, Seq, Timestamp, Uid, WatchPermit};
use streamer_proto::{
    common::v1::Request,
    router::v1::{
        CancelRequest, GetRequest, ListRequest, SubmitRequest, SubmitResponse,
        submit_response::Outcome,
    },
};
use streamer_rpc::{
    AFTER_UID, REQUEST_UID, is_server_error, json_payload, request_error, state_from_proto,
    state_to_proto,
};
use streamer_telemetry::{InScope, Scope, TraceContext, trace_span};
use tonic::Status;
use tracing::field::Empty;

use super::{Call, Reply, Session, submission_order::Place, subscription::Subscription};
use crate::{
    fanout::OpenedWatch,
    protocol::{
        client_message::{ClientMessage, RequestMessage},
        server_message::{self, RequestIds},
    },
    topic::Subscriber,
    ws::send_buffer::SendBuffer,
};

impl Session {
    /// Starts the call that a message requests.
    pub(crate) fn start_call(&mut self, message: ClientMessage<'_>, now: Timestamp) -> Call {
        match message {
            ClientMessage::Request(request) => self.submit(&request),
            ClientMessage::Subscribe { request_id, after_seq, latest } => {
                self.subscribe(request_id.into_owned(), after_seq, latest)
            }
            ClientMessage::Unsubscribe { request_id } => self.end_subscription(&request_id),
            ClientMessage::Cancel { request_id, reason } => {
                self.cancel(request_id.into_owned(), reason.into_owned())
            }
            ClientMessage::Get { request_id } => self.get(request_id.into_owned()),
            ClientMessage::List { states, limit, page_token } => {
                let states = states.into_iter().map(|state| state_to_proto(state).into()).collect();
                self.list(states, limit, page_token.into_owned())
            }
            ClientMessage::Auth { token } => self.authenticate(token),
            ClientMessage::Ping => {
                let pong = server_message::pong(now);
                Box::pin(std::future::ready(Reply::Frame(pong)))
            }
        }
    }

    /// Reserves a subscription that is about to open. Returns a rejected call if a limit is reached.
    fn reserve_subscription(&mut self, request_id: &str) -> Result<(), Call> {
        let limit = self.gateway.options.max_subscriptions;
        if self.subscriptions.count() >= limit {
            let message = format!("more than {limit} subscriptions of one connection");
            let error = RequestError::limited("gateway.max_subscriptions", &message, None);
            return Err(rejected_call(request_id, error));
        }
        let watches = self.watches.get_or_insert_with(|| {
            let owner = self.handle.owner();
            self.gateway.open_watches.of(&owner.tenant, &owner.user)
        });
        let watch = watches.open().map_err(|error| rejected_call(request_id, error))?;
        self.subscriptions.add_pending(request_id, watch);
        Ok(())
    }

    fn submit(&mut self, message: &RequestMessage<'_>) -> Call {
        if let Err(rejected) = self.reserve_subscription(&message.id) {
            return rejected;
        }
        let payload = |raw: &RawValue| json_payload(Bytes::copy_from_slice(raw.get().as_bytes()));
        let millis = |millis: i64| (millis > 0).then(|| duration(millis));
        let request = SubmitRequest {
            id: message.id.to_string(),
            action: message.action.to_string(),
            payload: message.payload.map(payload),
            metadata: message.metadata.map(payload),
            wait: millis(message.wait_ms),
            priority: message.priority,
            delay: millis(message.delay_ms),
            ..SubmitRequest::default()
        };
        let latest = message.latest;
        let request_id = request.id.clone();
        let mut router = self.gateway.upstreams.router();
        let mut request = self.handle.call(request);
        // The `uid` identifies the request if the channel retries the call.
        let now = self.gateway.clock.now();
        let waits = message.wait_ms > 0;
        let Place { uid, is_ordered, after } =
            self.submission_order.next(&message.action, message.priority, waits, now);
        if let Ok(uid) = uid.to_string().parse() {
            request.metadata_mut().insert(REQUEST_UID, uid);
        }
        if let Some(after) = after.and_then(|after| after.to_string().parse().ok()) {
            request.metadata_mut().insert(AFTER_UID, after);
        }
        // The async submissions of a connection go to the same router, as long as it is reachable.
        if is_ordered {
            request.extensions_mut().insert(RouteKey(self.handle.id));
        }
        let scope = self.trace(message);
        let span = scope.span();
        let call = async move {
            let outcome = router.submit(request).await;
            match &outcome {
                Ok(response) => {
                    span.record("streamer.uid", &response.get_ref().uid);
                }
                Err(status) => {
                    span.record("error.type", request_error(status).code.as_str());
                    if is_server_error(status.code()) {
                        span.record("otel.status_code", "ERROR");
                    }
                }
            }
            drop(span);
            let outcome = outcome.map(|response| Box::new(response.into_inner()));
            let is_stored = outcome
                .as_ref()
                .is_ok_and(|response| matches!(response.outcome, Some(Outcome::Acknowledgment(_))));
            let trace = if is_stored { TraceContext::current().map(Box::new) } else { None };
            Reply::Submitted { uid, outcome, request_id, latest, trace }
        };
        Box::pin(call.in_scope(scope))
    }

    /// Opens the trace scope of a submission, which decides whether it is traced.
    fn trace(&self, message: &RequestMessage<'_>) -> Scope {
        let caller = message.trace.as_ref().or(self.trace.as_deref());
        self.gateway.traces.admit(caller.cloned(), false, || {
            trace_span!(
                "websocket.request",
                otel.kind = "server",
                otel.status_code = Empty,
                streamer.action = &*message.action,
                streamer.request_id = &*message.id,
                streamer.tenant = self.handle.principal().tenant,
                streamer.uid = Empty,
                error.type = Empty,
            )
        })
    }

    fn subscribe(&mut self, request_id: String, after_seq: Option<Seq>, latest: bool) -> Call {
        if let Err(rejected) = self.reserve_subscription(&request_id) {
            return rejected;
        }
        let fanout = self.gateway.fanout.clone();
        let authorization = self.handle.authorization();
        Box::pin(async move {
            let outcome =
                fanout.open(request_id.clone(), after_seq, authorization).await.map(Box::new);
            Reply::Opened { outcome, request_id, latest }
        })
    }

    fn end_subscription(&mut self, request_id: &str) -> Call {
        if let Some(uid) = self.subscriptions.find(request_id) {
            self.unsubscribe(uid);
        }
        self.subscriptions.cancel_pending(request_id);
        let frame = server_message::unsubscribed(request_id, self.gateway.clock.now());
        Box::pin(std::future::ready(Reply::Frame(frame)))
    }

    fn cancel(&self, request_id: String, reason: String) -> Call {
        let mut router = self.gateway.upstreams.router();
        let clock = self.gateway.clock.clone();
        let call = self.handle.call(CancelRequest { request_id: request_id.clone(), reason });
        Box::pin(async move {
            match router.cancel(call).await {
                Ok(response) => {
                    let request = response.into_inner().request.unwrap_or_default();
                    let (status, message) = if request.cancel_requested {
                        ("cancelling".to_owned(), "cancellation was requested")
                    } else {
                        (state_name(&request), "the request has already ended")
                    };
                    let ids = request_ids(&request);
                    let content = server_message::Acknowledgment {
                        status: &status,
                        message,
                        duplicate: false,
                        last_seq: request.last_seq,
                        queue_position: None,
                        trace_id: None,
                    };
                    Reply::Frame(server_message::acknowledgment(&ids, &content, clock.now()))
                }
                Err(status) => failed(request_id, &status),
            }
        })
    }

    fn get(&self, request_id: String) -> Call {
        let mut router = self.gateway.upstreams.router();
        let clock = self.gateway.clock.clone();
        let get = GetRequest { request_id: request_id.clone(), ..GetRequest::default() };
        let call = self.handle.call(get);
        Box::pin(async move {
            match router.get(call).await {
                Ok(response) => {
                    let request = response.into_inner().request.unwrap_or_default();
                    Reply::Frame(server_message::request(&request, clock.now()))
                }
                Err(status) => failed(request_id, &status),
            }
        })
    }

    fn list(&self, states: Vec<i32>, page_size: i32, page_token: String) -> Call {
        let mut router = self.gateway.upstreams.router();
        let clock = self.gateway.clock.clone();
        let list = ListRequest { states, page_size, page_token, ..ListRequest::default() };
        let call = self.handle.call(list);
        Box::pin(async move {
            match router.list(call).await {
                Ok(response) => {
                    let page = response.into_inner();
                    let next = page.next_page_token;
                    Reply::Frame(server_message::requests(&page.requests, &next, clock.now()))
                }
                Err(status) => Reply::Failed { request_id: None, error: request_error(&status) },
            }
        })
    }

    fn authenticate(&self, token: Cow<'_, str>) -> Call {
        let authenticator = self.gateway.authenticator.clone();
        let token = token.into_owned();
        let call = async move {
            match authenticator.authenticate(&token).await {
                Ok(caller) => Reply::Authenticated(caller),
                Err(error) => Reply::Failed {
                    request_id: None,
                    error: RequestError::new(error.code(), error.to_string()),
                },
            }
        };
        call.boxed()
    }

    /// Queues the reply of a call. Returns the close code and reason if the connection must be closed.
    pub(crate) fn finish_call(
        &mut self,
        reply: Reply,
        out: &mut SendBuffer,
    ) -> Option<(CloseCode, String)> {
        let now = self.gateway.clock.now();
        match reply {
            Reply::Frame(frame) => out.push(frame),
            Reply::Failed { request_id, error } => {
                out.push(server_message::error(request_id.as_deref(), &error, now));
            }
            Reply::LogPage(subscriber, page) => self.handle_log_page(&subscriber, page, out),
            Reply::Submitted { uid, outcome, request_id, latest, trace } => {
                let is_completed = |response: &SubmitResponse| {
                    matches!(response.outcome, Some(Outcome::Completed(_)))
                };
                let has_result = outcome.as_ref().is_ok_and(|response| is_completed(response));
                self.submission_order.answered(uid, has_result);
                let watch = self.subscriptions.take_pending(&request_id);
                match outcome {
                    Ok(response) => self.submitted(*response, watch, latest, trace, out),
                    Err(status) => {
                        let request_id = (!request_id.is_empty()).then_some(request_id.as_str());
                        out.push(server_message::error(request_id, &request_error(&status), now));
                    }
                }
            }
            Reply::Opened { outcome, request_id, latest } => {
                let watch = self.subscriptions.take_pending(&request_id);
                match (outcome, watch) {
                    (Ok(opened), Some(watch)) => self.opened(*opened, watch, latest, out),
                    (Ok(_), None) => {}
                    (Err(status), _) => {
                        out.push(server_message::error(
                            Some(&request_id),
                            &request_error(&status),
                            now,
                        ));
                    }
                }
            }
            Reply::Authenticated(credentials) => {
                let (old, new) = (self.handle.principal(), &credentials.principal);
                if (&old.tenant, &old.user) != (&new.tenant, &new.user) {
                    let reason = "token subject does not match this connection".to_owned();
                    return Some((CloseCode::Forbidden, reason));
                }
                out.push(server_message::authenticated(new.expires_at, now));
                self.handle.set_credentials(credentials);
            }
        }
        None
    }

    fn submitted(
        &mut self,
        response: SubmitResponse,
        watch: Option<WatchPermit>,
        latest: bool,
        trace: Option<Box<TraceContext>>,
        out: &mut SendBuffer,
    ) {
        let now = self.gateway.clock.now();
        let ids = RequestIds { request_id: response.request_id, uid: response.uid };
        let acknowledgment = match response.outcome {
            Some(Outcome::Acknowledgment(acknowledgment)) => acknowledgment,
            Some(Outcome::Completed(completed)) => {
                out.push(server_message::completed(&ids, &completed, now));
                return;
            }
            None => return,
        };
        // A duplicate submission belongs to the trace of the first submission.
        let trace = trace.filter(|_| !acknowledgment.duplicate);
        let state = state_from_proto(acknowledgment.state);
        let status = state.map_or("unknown", streamer_core::RequestState::as_str).to_lowercase();
        let message = if acknowledgment.duplicate {
            "this ID was submitted before; no new request was started"
        } else {
            "accepted for execution"
        };
        let content = server_message::Acknowledgment {
            status: &status,
            message,
            duplicate: acknowledgment.duplicate,
            last_seq: acknowledgment.last_seq,
            queue_position: acknowledgment.queue_position.as_ref(),
            trace_id: trace.as_ref().map(|trace| trace.trace_id()),
        };
        out.push(server_message::acknowledgment(&ids, &content, now));
        let Ok(uid) = ids.uid.parse::<Uid>() else { return };
        // A completed subscription is replaced, so that the events are replayed.
        if self.subscriptions.get(uid).is_some_and(Subscription::is_complete) {
            self.unsubscribe(uid);
        }
        let Some(watch) = watch.filter(|_| self.subscriptions.get(uid).is_none()) else { return };
        // The acknowledgment replaces the first event. All later events follow, even if a client
        // submits again because the acknowledgment was lost.
        let cursor = Seq::FIRST;
        let subscriber = Subscriber::new(uid, self.handle.clone());
        let topic = self.gateway.fanout.join_submitted(uid, ids, cursor, subscriber.clone());
        // The first events may precede the acknowledgment.
        let submitted = uid.time();
        let subscription = Subscription::new(topic, subscriber, watch, cursor, latest, submitted)
            .with_trace(trace);
        self.subscriptions.insert(uid, subscription);
        self.ready.push(uid);
    }

    fn opened(
        &mut self,
        opened: OpenedWatch,
        watch: WatchPermit,
        latest: bool,
        out: &mut SendBuffer,
    ) {
        let uid = opened.uid;
        let now = self.gateway.clock.now();
        out.push(server_message::subscribed(&opened.snapshot, now));
        // A repeated subscription replaces the previous one and its cursor.
        self.unsubscribe(uid);
        let subscriber = Subscriber::new(uid, self.handle.clone());
        let (topic, cursor) = self.gateway.fanout.join(opened, subscriber.clone());
        let subscription = Subscription::new(topic, subscriber, watch, cursor, latest, now);
        self.subscriptions.insert(uid, subscription);
        self.ready.push(uid);
    }
}

fn rejected_call(request_id: &str, error: RequestError) -> Call {
    let request_id = (!request_id.is_empty()).then(|| request_id.to_owned());
    Box::pin(std::future::ready(Reply::Failed { request_id, error }))
}

fn failed(request_id: String, status: &Status) -> Reply {
    Reply::Failed { request_id: Some(request_id), error: request_error(status) }
}

fn request_ids(request: &Request) -> RequestIds {
    RequestIds { request_id: request.request_id.clone(), uid: request.uid.clone() }
}

fn state_name(request: &Request) -> String {
    let state = state_from_proto(request.state);
    state.map_or("unknown", streamer_core::RequestState::as_str).to_lowercase()
}

fn duration(millis: i64) -> prost_types::Duration {
    prost_types::Duration {
        seconds: millis / 1000,
        nanos: i32::try_from(millis % 1000).unwrap_or(0) * 1_000_000,
    }
}
