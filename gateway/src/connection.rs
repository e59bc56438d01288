//! One WebSocket connection: a state machine that moves whenever its socket, its calls or its
//! inbox have something.
//!
//! It is one future without timers of its own and without buffers while it is idle. What a client
//! sends is read into a buffer shared by the thread and dealt with on the spot; a sync action that
//! answers at once is answered in the same turn. What waits to be written is bounded: beyond the
//! high-water mark the connection stops taking events (they stay in the topic, then in the log)
//! and stops reading.

mod calls;
mod delivery;
mod in_flight;
mod subscriptions;

use std::{
    cell::RefCell,
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::{StreamExt, stream::FuturesUnordered};
use streamer_core::{ErrorCode, RateLimiter, RequestError, Uid, WatchesOfUser};
use streamer_rpc::Peer;
use streamer_telemetry::TraceContext;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    buffers::Counted,
    handle::{ConnectionHandle, close_code},
    messages, protocol,
    server::Gateway,
    ws::{
        decoder::{Decoder, Flow, Message, Violation},
        frame,
        outbox::Outbox,
    },
};
use calls::Reply;
use in_flight::{Call, Cost, InFlight};
use subscriptions::Subscriptions;

/// Bytes read at a time, by all connections of a thread in turn.
const READ_BUFFER: usize = 64 * 1024;
/// Bytes that wait to be written beyond which a connection takes no more on.
const HIGH_WATER: usize = 64 * 1024;
/// Bytes of messages whose calls are unanswered, beyond which a connection takes no more on.
const MAX_UNANSWERED_BYTES: usize = 16 * 1024 * 1024;
/// Unanswered calls whose answers may be large at most.
const MAX_LARGE_CALLS: usize = 8;
/// Refused messages in a row after which a client is taken for broken.
const MAX_REFUSED_IN_A_ROW: u32 = 20_000;
/// Turns of the loop before other tasks get theirs.
const MAX_TURNS: u32 = 32;

thread_local! {
    static READ: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BUFFER].into_boxed_slice());
}

pub(crate) struct Connection<S> {
    socket: S,
    /// What was read before the socket was handed over.
    early: Bytes,
    decoder: Decoder,
    out: Outbox,
    calls: FuturesUnordered<InFlight>,
    /// Of all calls that have not been answered.
    unanswered: Cost,
    session: Session,
    phase: Phase,
}

/// Where a connection is in its life.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// Our close frame is queued or sent; what still comes is thrown away, until the client's own.
    Closing,
    /// The client has closed: what is queued is written, then it is over.
    Closed,
}

/// What a connection knows, apart from its socket.
pub(crate) struct Session {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) handle: Arc<ConnectionHandle>,
    pub(crate) subscriptions: Subscriptions,
    /// How many the user has, over all connections.
    watches: Option<Arc<WatchesOfUser>>,
    /// Requests with something to send, in turn.
    pub(crate) ready: Vec<Uid>,
    /// Reads of logs that are underway.
    pub(crate) catching_up: usize,
    rate: RateLimiter,
    refused_in_a_row: u32,
    /// What is counted of a message that is not whole.
    counted: Counted,
    /// Counts as an open connection of the server as long as this lives.
    _peer: Option<Peer>,
    /// From the handshake: where requests belong to that do not say so themselves.
    trace: Option<Box<TraceContext>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    pub(crate) fn new(
        socket: S,
        early: Bytes,
        gateway: Arc<Gateway>,
        handle: Arc<ConnectionHandle>,
        trace: Option<TraceContext>,
        peer: Option<Peer>,
    ) -> Self {
        let options = &gateway.options;
        let decoder = Decoder::new(options.max_message_bytes);
        let rate = RateLimiter::new(options.messages_per_second, options.message_burst);
        Self {
            socket,
            early,
            decoder,
            out: Outbox::default(),
            calls: FuturesUnordered::new(),
            unanswered: Cost::default(),
            session: Session {
                gateway,
                handle,
                subscriptions: Subscriptions::default(),
                watches: None,
                ready: Vec::new(),
                catching_up: 0,
                rate,
                refused_in_a_row: 0,
                counted: Counted::default(),
                _peer: peer,
                trace: trace.map(Box::new),
            },
            phase: Phase::Open,
        }
    }

    /// Queues the first message.
    pub(crate) fn greet(&mut self) {
        let frame = {
            let Session { gateway, handle, .. } = &self.session;
            let principal = handle.principal();
            let connected = messages::Connected {
                connection_id: &handle.id.to_string(),
                user_id: &principal.user,
                tenant_id: &principal.tenant,
                heartbeat_ms: i64::try_from(gateway.options.heartbeat.as_millis())
                    .unwrap_or(i64::MAX),
                max_message_bytes: gateway.options.max_message_bytes,
                expires_at: principal.expires_at,
            };
            messages::connected(&connected, gateway.clock.now())
        };
        self.send(frame);
    }

    fn send(&mut self, frame: Bytes) {
        self.session.gateway.metrics.bytes_out.inc_by(frame.len() as u64);
        self.out.push(frame);
    }

    /// Says why and begins to close.
    pub(crate) fn close(&mut self, code: u16, reason: &str) {
        if self.phase == Phase::Open {
            if code == close_code::TOO_SLOW {
                self.session.gateway.metrics.slow_consumers.inc();
            }
            self.send(frame::close(code, reason));
            self.phase = Phase::Closing;
            let now = self.session.gateway.registry.seconds();
            self.session.handle.pulse.closing_since.store(now.max(1), Ordering::Relaxed);
        }
    }

    /// Looks at what others have left here. Says whether there was anything, or `None` when the
    /// connection is to be dropped.
    fn look_at_inbox(&mut self) -> Option<bool> {
        let inbox = self.session.handle.take_inbox(self.out.bytes() < HIGH_WATER);
        if inbox.abort {
            return None;
        }
        let anything = !inbox.ready.is_empty() || !inbox.frames.is_empty() || inbox.close.is_some();
        self.session.ready.extend(inbox.ready);
        if self.phase == Phase::Open {
            inbox.frames.into_iter().for_each(|frame| self.send(frame));
        }
        if let Some((code, reason)) = inbox.close {
            self.close(code, &reason);
        }
        Some(anything)
    }

    /// Reads once and deals with what came.
    fn read(&mut self, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        if self.decoder.is_paused() {
            self.take_in(&mut [], context);
            return Poll::Ready(Ok(()));
        }
        if !self.early.is_empty() {
            let mut early = std::mem::take(&mut self.early).to_vec();
            self.take_in(&mut early, context);
            return Poll::Ready(Ok(()));
        }
        READ.with_borrow_mut(|buffer| {
            let mut read = ReadBuf::new(buffer);
            match Pin::new(&mut self.socket).poll_read(context, &mut read) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(())) => {}
            }
            let count = read.filled().len();
            if count == 0 {
                return Poll::Ready(Err(std::io::ErrorKind::UnexpectedEof.into()));
            }
            self.take_in(&mut buffer[..count], context);
            Poll::Ready(Ok(()))
        })
    }

    fn take_in(&mut self, input: &mut [u8], context: &mut Context<'_>) {
        let Session { gateway, handle, .. } = &self.session;
        gateway.metrics.bytes_in.inc_by(input.len() as u64);
        handle.pulse.seen.store(gateway.registry.seconds(), Ordering::Relaxed);
        // The decoder lends its buffer to the messages it finds, so it stands apart from the rest.
        let mut decoder = std::mem::replace(&mut self.decoder, Decoder::new(0));
        let mut any = false;
        let fed = decoder.feed(input, |message| {
            // Control frames may come in the midst of a message.
            any |= !matches!(message, Message::Ping(_) | Message::Pong);
            self.on_message(&message, context)
        });
        self.decoder = decoder;
        let fed = fed.and_then(|()| self.count_held(any));
        if let Err(Violation { code, reason }) = fed {
            // What is held is of no use any longer.
            self.decoder = Decoder::new(self.session.gateway.options.max_message_bytes);
            let released = self.count_held(true);
            debug_assert_eq!(released, Ok(()), "less is never refused");
            if self.phase == Phase::Open {
                self.session.gateway.metrics.invalid_messages.inc();
                self.close(code, &reason);
            }
        }
    }

    /// Counts the bytes of the message that is not whole; `is_new` if the one before it has ended.
    fn count_held(&mut self, is_new: bool) -> Result<(), Violation> {
        let Session { gateway, handle, counted, .. } = &mut self.session;
        let held = self.decoder.held();
        let since = &handle.pulse.partial_since;
        if !self.decoder.is_in_message() {
            since.store(0, Ordering::Relaxed);
        } else if is_new || since.load(Ordering::Relaxed) == 0 {
            since.store(gateway.registry.seconds().max(1), Ordering::Relaxed);
        }
        if !counted.differs(held) {
            return Ok(());
        }
        let outcome = gateway.registry.buffers.count(&handle.owner(), counted, held);
        outcome.map_err(|option| Violation {
            code: close_code::TOO_MANY,
            reason: format!("too many bytes of messages that are not whole ({option})"),
        })
    }

    fn on_message(&mut self, message: &Message<'_>, context: &mut Context<'_>) -> Flow {
        match message {
            Message::Close(code) => {
                if self.phase == Phase::Open {
                    self.send(frame::close(code.unwrap_or(1000), ""));
                }
                self.phase = Phase::Closed;
                return Flow::Stop;
            }
            _ if self.phase != Phase::Open => return Flow::Next,
            Message::Ping(payload) => self.send(frame::pong(payload)),
            Message::Pong => {}
            Message::Binary => {
                let rule = "binary frames are not part of streamer.v1.json: send text";
                self.refuse(None, &RequestError::new(ErrorCode::ValidationError, rule));
            }
            Message::Text(text) => self.on_text(text, context),
        }
        match self.phase {
            Phase::Open if self.has_room() => Flow::Next,
            Phase::Open => Flow::Pause,
            // Its own close frame may be among what is left.
            Phase::Closing => Flow::Next,
            Phase::Closed => Flow::Stop,
        }
    }

    /// Whether it can take on more.
    fn has_room(&self) -> bool {
        let Cost { calls, bytes, large } = self.unanswered;
        calls < self.session.gateway.options.max_in_flight
            && bytes < MAX_UNANSWERED_BYTES
            && large < MAX_LARGE_CALLS
            && self.out.bytes() < HIGH_WATER
    }

    fn on_text(&mut self, text: &str, context: &mut Context<'_>) {
        let gateway = self.session.gateway.clone();
        gateway.metrics.messages_in.inc();
        let now = gateway.clock.now();
        if let Err(wait) = self.session.rate.admit(now) {
            gateway.metrics.rate_limited.inc();
            let limit = gateway.options.messages_per_second;
            let error = RequestError::limited(
                "gateway.messages_per_second",
                &format!("more than {limit} messages a second"),
                Some(wait),
            );
            self.refuse(protocol::request_id(text).as_deref(), &error);
            return;
        }
        match protocol::parse(text) {
            Ok(message) => {
                self.session.refused_in_a_row = 0;
                let large = usize::from(message.has_large_answer());
                let call = self.session.begin(message, now);
                self.start(call, Cost { calls: 1, bytes: text.len(), large }, context);
            }
            Err(refusal) => {
                let details = streamer_rpc::violations_details(&refusal.violations);
                let mut error =
                    RequestError::new(ErrorCode::ValidationError, refusal.violations.to_string());
                error.details = Some(details);
                self.refuse(refusal.request_id.as_deref(), &error);
            }
        }
    }

    fn refuse(&mut self, request_id: Option<&str>, error: &RequestError) {
        self.session.gateway.metrics.invalid_messages.inc();
        self.session.refused_in_a_row += 1;
        if self.session.refused_in_a_row > MAX_REFUSED_IN_A_ROW {
            let code = if error.code == ErrorCode::RateLimited {
                close_code::TOO_MANY
            } else {
                close_code::BAD_PROTOCOL
            };
            self.close(code, "too many messages in a row were refused");
            return;
        }
        let now = self.session.gateway.clock.now();
        self.send(messages::error(request_id, error, now));
    }

    /// Starts a call. Most sync actions answer at once, and are then not queued at all.
    fn start(&mut self, mut call: Call, cost: Cost, context: &mut Context<'_>) {
        match call.as_mut().poll(context) {
            Poll::Ready(reply) => self.finish(reply),
            Poll::Pending => {
                self.unanswered.add(cost);
                self.calls.push(InFlight { call, cost });
            }
        }
    }

    fn finish(&mut self, reply: Reply) {
        if self.phase != Phase::Open {
            return; // nothing may follow a close frame
        }
        let before = self.out.bytes();
        let close = self.session.conclude(reply, &mut self.out);
        let queued = self.out.bytes().saturating_sub(before);
        self.session.gateway.metrics.bytes_out.inc_by(queued as u64);
        if let Some((code, reason)) = close {
            self.close(code, &reason);
        }
    }

    /// One turn: `true` when there may be more to do, `false` when the connection is over.
    fn turn(&mut self, context: &mut Context<'_>) -> Poll<bool> {
        let Some(mut progressed) = self.look_at_inbox() else { return Poll::Ready(false) };
        let may_read = self.phase != Phase::Open || self.has_room();
        self.session.handle.pulse.reading.store(may_read, Ordering::Relaxed);
        if may_read && self.phase != Phase::Closed {
            match self.read(context) {
                Poll::Ready(Ok(())) => progressed = true,
                Poll::Ready(Err(_)) => return Poll::Ready(false),
                Poll::Pending => {}
            }
        }
        // An answer that cannot be sent yet is better not made.
        while self.out.bytes() < HIGH_WATER
            && let Poll::Ready(Some((reply, cost))) = self.calls.poll_next_unpin(context)
        {
            self.unanswered.take_off(cost);
            self.finish(reply);
            progressed = true;
        }
        if self.phase == Phase::Open {
            progressed |= self.deliver();
        }
        match self.write(context) {
            Ok(moved) => progressed |= moved,
            Err(_) => return Poll::Ready(false),
        }
        if self.phase == Phase::Closed && self.out.is_empty() {
            return Poll::Ready(false);
        }
        if progressed { Poll::Ready(true) } else { Poll::Pending }
    }

    /// Says whether there are new calls, which have to be polled.
    fn deliver(&mut self) -> bool {
        let before = self.out.bytes();
        let calls = self.session.deliver(&mut self.out, HIGH_WATER);
        let queued = self.out.bytes().saturating_sub(before);
        self.session.gateway.metrics.bytes_out.inc_by(queued as u64);
        let any = !calls.is_empty();
        for call in calls {
            let cost = Cost { calls: 1, ..Cost::default() };
            self.unanswered.add(cost);
            self.calls.push(InFlight { call, cost });
        }
        any
    }

    /// Writes what waits. Says whether there is now room for more.
    fn write(&mut self, context: &mut Context<'_>) -> std::io::Result<bool> {
        if self.out.is_empty() {
            return Ok(false);
        }
        let before = self.out.bytes();
        let written = self.out.poll_write(&mut self.socket, context);
        let pulse = &self.session.handle.pulse;
        let moved = self.out.bytes() < before;
        match written {
            Poll::Ready(Err(error)) => return Err(error),
            Poll::Ready(Ok(())) => pulse.blocked_since.store(0, Ordering::Relaxed),
            Poll::Pending if moved || pulse.blocked_since.load(Ordering::Relaxed) == 0 => {
                let now = self.session.gateway.registry.seconds();
                pulse.blocked_since.store(now.max(1), Ordering::Relaxed);
            }
            Poll::Pending => {}
        }
        Ok(moved && self.out.bytes() < HIGH_WATER)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Future for Connection<S> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let connection = self.get_mut();
        // Before looking, so that whatever is left here from now on wakes us.
        connection.session.handle.waker.register(context.waker());
        for _ in 0..MAX_TURNS {
            match connection.turn(context) {
                Poll::Ready(true) => {}
                Poll::Ready(false) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for subscription in self.subscriptions.values() {
            self.gateway.hub.leave(&subscription.topic, self.handle.id);
        }
        let registry = &self.gateway.registry;
        if self.counted.differs(0) {
            let released = registry.buffers.count(&self.handle.owner(), &mut self.counted, 0);
            debug_assert_eq!(released, Ok(()), "less is never refused");
        }
        registry.remove(&self.handle);
    }
}
