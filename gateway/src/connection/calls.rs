//! What a client asks for: each message becomes a call, each call a reply.

use std::{borrow::Cow, sync::Arc};

use bytes::Bytes;
use futures_util::FutureExt;
use serde_json::value::RawValue;
use streamer_auth::Caller;
use streamer_core::{OpenWatch, RequestError, Timestamp, Uid};
use streamer_proto::{
    common::v1::{Event, Request},
    router::v1::{
        CancelRequest, GetRequest, ListRequest, SubmitRequest, SubmitResponse,
        submit_response::Outcome,
    },
};
use streamer_rpc::{
    REQUEST_UID, is_server_error, json_payload, request_error, state_from_proto, state_to_proto,
};
use streamer_telemetry::{InScope, Scope, TraceContext, trace_span};
use tonic::Status;
use tracing::field::Empty;

use super::{Call, Session, delivery::Subscription};
use crate::{
    handle::close_code,
    hub::Opened,
    messages::{self, Names},
    protocol::{ClientMessage, RequestMessage},
    topic::Link,
    ws::outbox::Outbox,
};

/// What became of a call.
pub(crate) enum Reply {
    /// To be sent as it is.
    Frame(Bytes),
    /// A request was submitted; its events are wanted from now on.
    Submitted {
        outcome: Result<Box<SubmitResponse>, Status>,
        name: String,
        latest: bool,
        trace: Option<Box<TraceContext>>,
    },
    /// A request was opened for a subscription.
    Opened { outcome: Result<Box<Opened>, Status>, name: String, latest: bool },
    /// A page of a log was read.
    CaughtUp(Arc<Link>, Result<Vec<Event>, Status>),
    /// A fresh token was verified.
    Authenticated(Caller),
    /// A call failed.
    Failed { request_id: Option<String>, error: RequestError },
}

impl Session {
    /// Begins to do what a message asks for.
    pub(crate) fn begin(&mut self, message: ClientMessage<'_>, now: Timestamp) -> Call {
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
                let pong = messages::pong(now);
                Box::pin(std::future::ready(Reply::Frame(pong)))
            }
        }
    }

    /// Notes that a subscription is on its way, if one more is allowed.
    fn may_open(&mut self, name: &str) -> Result<(), Call> {
        let limit = self.gateway.options.max_subscriptions;
        if self.subscriptions.count() >= limit {
            let message = format!("more than {limit} subscriptions of one connection");
            let error = RequestError::limited("gateway.max_subscriptions", &message, None);
            return Err(refused(name, error));
        }
        let watches = self.watches.get_or_insert_with(|| {
            let owner = self.handle.owner();
            self.gateway.open_watches.of(&owner.tenant, &owner.user)
        });
        let watch = watches.open().map_err(|error| refused(name, error))?;
        self.subscriptions.begin_opening(name, watch);
        Ok(())
    }

    fn submit(&mut self, message: &RequestMessage<'_>) -> Call {
        if let Err(refusal) = self.may_open(&message.id) {
            return refusal;
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
        let name = request.id.clone();
        let mut router = self.gateway.peers.router();
        let mut request = self.handle.call(request);
        // A repeat by the channel is then the same request.
        let uid = Uid::new(self.gateway.clock.now()).to_string();
        if let Ok(uid) = uid.parse() {
            request.metadata_mut().insert(REQUEST_UID, uid);
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
            Reply::Submitted { outcome, name, latest, trace }
        };
        Box::pin(call.in_scope(scope))
    }

    /// Admits a request: decides whether it is traced.
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

    fn subscribe(&mut self, name: String, after_seq: Option<i64>, latest: bool) -> Call {
        if let Err(refusal) = self.may_open(&name) {
            return refusal;
        }
        let hub = self.gateway.hub.clone();
        let authorization = self.handle.authorization();
        Box::pin(async move {
            let outcome = hub.open(name.clone(), after_seq, authorization).await.map(Box::new);
            Reply::Opened { outcome, name, latest }
        })
    }

    fn end_subscription(&mut self, name: &str) -> Call {
        if let Some(uid) = self.subscriptions.find(name) {
            self.unsubscribe(uid);
        }
        self.subscriptions.cancel_opening(name);
        let frame = messages::unsubscribed(name, self.gateway.clock.now());
        Box::pin(std::future::ready(Reply::Frame(frame)))
    }

    fn cancel(&self, request_id: String, reason: String) -> Call {
        let mut router = self.gateway.peers.router();
        let clock = self.gateway.clock.clone();
        let name = request_id.clone();
        let call = self.handle.call(CancelRequest { request_id, reason });
        Box::pin(async move {
            match router.cancel(call).await {
                Ok(response) => {
                    let request = response.into_inner().request.unwrap_or_default();
                    let (status, message) = if request.cancel_requested {
                        ("cancelling".to_owned(), "cancellation was asked for")
                    } else {
                        (state_name(&request), "the request has ended")
                    };
                    let names = names(&request);
                    let said = messages::Acknowledged {
                        status: &status,
                        message,
                        duplicate: false,
                        last_seq: request.last_seq,
                        queue_position: None,
                        trace_id: None,
                    };
                    Reply::Frame(messages::acknowledgment(&names, &said, clock.now()))
                }
                Err(status) => failed(name, &status),
            }
        })
    }

    fn get(&self, request_id: String) -> Call {
        let mut router = self.gateway.peers.router();
        let clock = self.gateway.clock.clone();
        let name = request_id.clone();
        let call = self.handle.call(GetRequest { request_id, ..GetRequest::default() });
        Box::pin(async move {
            match router.get(call).await {
                Ok(response) => {
                    let request = response.into_inner().request.unwrap_or_default();
                    Reply::Frame(messages::request(&request, clock.now()))
                }
                Err(status) => failed(name, &status),
            }
        })
    }

    fn list(&self, states: Vec<i32>, page_size: i32, page_token: String) -> Call {
        let mut router = self.gateway.peers.router();
        let clock = self.gateway.clock.clone();
        let list = ListRequest { states, page_size, page_token, ..ListRequest::default() };
        let call = self.handle.call(list);
        Box::pin(async move {
            match router.list(call).await {
                Ok(response) => {
                    let page = response.into_inner();
                    let next = page.next_page_token;
                    Reply::Frame(messages::requests(&page.requests, &next, clock.now()))
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

    /// Sends what a call has brought. Returns code and reason when the connection has to close.
    pub(crate) fn conclude(&mut self, reply: Reply, out: &mut Outbox) -> Option<(u16, String)> {
        let now = self.gateway.clock.now();
        match reply {
            Reply::Frame(frame) => out.push(frame),
            Reply::Failed { request_id, error } => {
                out.push(messages::error(request_id.as_deref(), &error, now));
            }
            Reply::CaughtUp(link, page) => self.caught_up(&link, page, out),
            Reply::Submitted { outcome, name, latest, trace } => {
                let watch = self.subscriptions.finish_opening(&name);
                match outcome {
                    Ok(response) => self.submitted(*response, watch, latest, trace, out),
                    Err(status) => {
                        let name = (!name.is_empty()).then_some(name.as_str());
                        out.push(messages::error(name, &request_error(&status), now));
                    }
                }
            }
            Reply::Opened { outcome, name, latest } => {
                let watch = self.subscriptions.finish_opening(&name);
                match (outcome, watch) {
                    (Ok(opened), Some(watch)) => self.opened(*opened, watch, latest, out),
                    (Ok(_), None) => {}
                    (Err(status), _) => {
                        out.push(messages::error(Some(&name), &request_error(&status), now));
                    }
                }
            }
            Reply::Authenticated(credentials) => {
                let (old, new) = (self.handle.principal(), &credentials.principal);
                if (&old.tenant, &old.user) != (&new.tenant, &new.user) {
                    let reason = "the fresh token is another user's".to_owned();
                    return Some((close_code::FORBIDDEN, reason));
                }
                out.push(messages::authenticated(new.expires_at, now));
                self.handle.set_credentials(credentials);
            }
        }
        None
    }

    fn submitted(
        &mut self,
        response: SubmitResponse,
        watch: Option<OpenWatch>,
        latest: bool,
        trace: Option<Box<TraceContext>>,
        out: &mut Outbox,
    ) {
        let now = self.gateway.clock.now();
        let names = Names { request_id: response.request_id, uid: response.uid };
        let acknowledgment = match response.outcome {
            Some(Outcome::Acknowledgment(acknowledgment)) => acknowledgment,
            Some(Outcome::Completed(completed)) => {
                out.push(messages::completed(&names, &completed, now));
                return;
            }
            None => return,
        };
        // A request that was submitted before belongs to the trace of that time.
        let trace = trace.filter(|_| !acknowledgment.duplicate);
        let state = state_from_proto(acknowledgment.state);
        let status = state.map_or("unknown", streamer_core::RequestState::as_str).to_lowercase();
        let message = if acknowledgment.duplicate {
            "this id was submitted before; nothing new was started"
        } else {
            "accepted; it will run"
        };
        let said = messages::Acknowledged {
            status: &status,
            message,
            duplicate: acknowledgment.duplicate,
            last_seq: acknowledgment.last_seq,
            queue_position: acknowledgment.queue_position.as_ref(),
            trace_id: trace.as_ref().map(|trace| trace.trace_id()),
        };
        out.push(messages::acknowledgment(&names, &said, now));
        let Ok(uid) = names.uid.parse::<Uid>() else { return };
        // One that has brought everything makes room for the replay.
        if self.subscriptions.get(uid).is_some_and(Subscription::is_over) {
            self.unsubscribe(uid);
        }
        let Some(watch) = watch.filter(|_| self.subscriptions.get(uid).is_none()) else { return };
        // The acknowledgement stands for the first event; everything after it follows, also for
        // somebody who submits again because the acknowledgement was lost.
        let cursor = 1;
        let link = Link::new(uid, self.handle.clone());
        let topic = self.gateway.hub.join_submitted(uid, names, cursor, link.clone());
        let subscription = Subscription::new(topic, link, watch, cursor, latest).traced(trace);
        self.subscriptions.insert(uid, subscription);
        self.ready.push(uid);
    }

    fn opened(&mut self, opened: Opened, watch: OpenWatch, latest: bool, out: &mut Outbox) {
        let uid = opened.uid;
        out.push(messages::subscribed(&opened.snapshot, self.gateway.clock.now()));
        // Subscribing again moves the cursor.
        self.unsubscribe(uid);
        let link = Link::new(uid, self.handle.clone());
        let (topic, cursor) = self.gateway.hub.join(opened, link.clone());
        self.subscriptions.insert(uid, Subscription::new(topic, link, watch, cursor, latest));
        self.ready.push(uid);
    }
}

fn refused(name: &str, error: RequestError) -> Call {
    let request_id = (!name.is_empty()).then(|| name.to_owned());
    Box::pin(std::future::ready(Reply::Failed { request_id, error }))
}

fn failed(name: String, status: &Status) -> Reply {
    Reply::Failed { request_id: Some(name), error: request_error(status) }
}

fn names(request: &Request) -> Names {
    Names { request_id: request.request_id.clone(), uid: request.uid.clone() }
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
