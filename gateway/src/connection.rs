//! One WebSocket connection: a state machine driven by its socket, its calls and its inbox.
//!
//! A connection is one future without timers and, while idle, without buffers. Input is read into a
//! buffer that all connections of a thread share, and handled immediately; the reply of a sync action
//! that completes immediately is sent in the same iteration. Pending output is bounded: above the
//! high-water mark, the connection stops accepting events, which remain in the topic or the log, and
//! stops reading.

mod calls;
mod delivery;
mod in_flight;
mod reply;
mod session;
mod submission_order;
mod subscription;
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
use streamer_core::{CloseCode, ErrorCode, RequestError, saturate};
use streamer_rpc::Peer;
use streamer_telemetry::TraceContext;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    connection_handle::ConnectionHandle,
    gateway::Gateway,
    protocol::{client_message, server_message},
    ws::{
        decoder::{Decoder, Flow, Message, Violation},
        frame,
        send_buffer::SendBuffer,
    },
};
use in_flight::{Call, Cost, InFlight};
use reply::Reply;
use session::Session;

/// Size of the read buffer that the connections of a thread share, in bytes.
const READ_BUFFER_BYTES: usize = 64 * 1024;
/// Number of bytes of pending output at which a connection stops accepting work.
const HIGH_WATER: usize = 64 * 1024;
/// Number of bytes of messages with pending calls at which a connection stops accepting work.
const MAX_PENDING_BYTES: usize = 16 * 1024 * 1024;
/// Maximum number of pending calls whose replies may be large.
const MAX_LARGE_CALLS: usize = 8;
/// Maximum number of consecutive rejected messages. A connection that exceeds it is closed.
const MAX_CONSECUTIVE_REJECTIONS: u32 = 20_000;
/// Maximum number of iterations before a connection yields to other tasks.
const MAX_ITERATIONS: u32 = 32;

thread_local! {
    static READ_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BUFFER_BYTES].into_boxed_slice());
}

pub(crate) struct Connection<S> {
    socket: S,
    /// Input that was read before the upgrade completed.
    early: Bytes,
    decoder: Decoder,
    out: SendBuffer,
    calls: FuturesUnordered<InFlight>,
    /// Total cost of the pending calls.
    pending: Cost,
    session: Session,
    phase: Phase,
}

/// Phase of a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// A close frame is queued or sent. Input is discarded until the client's close frame arrives.
    Closing,
    /// The client has sent a close frame. The connection ends after its pending output is written.
    Closed,
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
        let decoder = Decoder::new(gateway.options.max_message_bytes);
        Self {
            socket,
            early,
            decoder,
            out: SendBuffer::default(),
            calls: FuturesUnordered::new(),
            pending: Cost::default(),
            session: Session::new(gateway, handle, trace, peer),
            phase: Phase::Open,
        }
    }

    /// Queues the message `connected`.
    pub(crate) fn send_connected(&mut self) {
        let frame = {
            let Session { gateway, handle, .. } = &self.session;
            let principal = handle.principal();
            let connected = server_message::Connected {
                connection_id: &handle.id.to_string(),
                user_id: &principal.user,
                tenant_id: &principal.tenant,
                heartbeat_ms: saturate::to_millis(gateway.options.heartbeat),
                max_message_bytes: gateway.options.max_message_bytes,
                expires_at: principal.expires_at,
            };
            server_message::connected(&connected, gateway.clock.now())
        };
        self.send(frame);
    }

    fn send(&mut self, frame: Bytes) {
        self.session.gateway.metrics.bytes_out.inc_by(frame.len() as u64);
        self.out.push(frame);
    }

    /// Queues a close frame and starts the closing handshake.
    pub(crate) fn close(&mut self, code: CloseCode, reason: &str) {
        if self.phase == Phase::Open {
            self.session.close_code = Some(code);
            self.send(frame::close(code, reason));
            self.phase = Phase::Closing;
            let now = self.session.gateway.registry.seconds();
            self.session.handle.liveness.closing_since.store(now.max(1), Ordering::Relaxed);
        }
    }

    /// Handles the items of the inbox. Returns whether the inbox contained any items; `None` if the
    /// connection must be dropped.
    fn drain_inbox(&mut self) -> Option<bool> {
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

    /// Reads from the socket once and handles the input.
    fn read(&mut self, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        if self.decoder.is_paused() {
            self.feed(&mut [], context);
            return Poll::Ready(Ok(()));
        }
        if !self.early.is_empty() {
            let mut early = std::mem::take(&mut self.early).to_vec();
            self.feed(&mut early, context);
            return Poll::Ready(Ok(()));
        }
        READ_BUFFER.with_borrow_mut(|buffer| {
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
            self.feed(&mut buffer[..count], context);
            Poll::Ready(Ok(()))
        })
    }

    fn feed(&mut self, input: &mut [u8], context: &mut Context<'_>) {
        let Session { gateway, handle, .. } = &self.session;
        gateway.metrics.bytes_in.inc_by(input.len() as u64);
        handle.liveness.last_frame.store(gateway.registry.seconds(), Ordering::Relaxed);
        // Messages borrow the decoder's buffer, so it is moved out of `self`.
        let mut decoder = std::mem::replace(&mut self.decoder, Decoder::new(0));
        let mut any_message = false;
        let fed = decoder.feed(input, |message| {
            // Control frames may arrive between the fragments of a message.
            any_message |= !matches!(message, Message::Ping(_) | Message::Pong);
            self.on_message(&message, context)
        });
        self.decoder = decoder;
        let fed = fed.and_then(|()| self.reserve_buffered(any_message));
        if let Err(Violation { code, reason }) = fed {
            // The buffered bytes are no longer needed.
            self.decoder = Decoder::new(self.session.gateway.options.max_message_bytes);
            let released = self.reserve_buffered(true);
            debug_assert_eq!(released, Ok(()), "a smaller reservation never fails");
            if self.phase == Phase::Open {
                self.session.gateway.metrics.message_rejected(ErrorCode::ValidationError);
                self.close(code, &reason);
            }
        }
    }

    /// Reserves the bytes of an incomplete message. `is_new` states that the previous message has ended.
    fn reserve_buffered(&mut self, is_new: bool) -> Result<(), Violation> {
        let Session { gateway, handle, reservation, .. } = &mut self.session;
        let buffered = self.decoder.buffered_bytes();
        let since = &handle.liveness.partial_since;
        if !self.decoder.is_in_message() {
            since.store(0, Ordering::Relaxed);
        } else if is_new || since.load(Ordering::Relaxed) == 0 {
            since.store(gateway.registry.seconds().max(1), Ordering::Relaxed);
        }
        if !reservation.differs(buffered) {
            return Ok(());
        }
        let outcome = gateway.registry.buffer_budget.update(&handle.owner(), reservation, buffered);
        outcome.map_err(|option| Violation {
            code: CloseCode::LimitExceeded,
            reason: format!("too many bytes of incomplete messages ({option})"),
        })
    }

    fn on_message(&mut self, message: &Message<'_>, context: &mut Context<'_>) -> Flow {
        match message {
            Message::Close(code) => {
                if self.phase == Phase::Open {
                    let code = code.unwrap_or(CloseCode::Normal);
                    self.session.close_code = Some(code);
                    self.send(frame::close(code, ""));
                }
                self.phase = Phase::Closed;
                return Flow::Stop;
            }
            _ if self.phase != Phase::Open => return Flow::Continue,
            Message::Ping(payload) => self.send(frame::pong(payload)),
            Message::Pong => {}
            Message::Binary => {
                let rule = "streamer.v1.json does not support binary messages: send text";
                self.reject(None, &RequestError::new(ErrorCode::ValidationError, rule));
            }
            Message::Text(text) => self.on_text(text, context),
        }
        match self.phase {
            Phase::Open if self.has_room() => Flow::Continue,
            Phase::Open => Flow::Pause,
            // The remaining input may contain the client's close frame.
            Phase::Closing => Flow::Continue,
            Phase::Closed => Flow::Stop,
        }
    }

    /// Returns whether the connection accepts more work.
    fn has_room(&self) -> bool {
        let Cost { calls, bytes, large } = self.pending;
        calls < self.session.gateway.options.max_in_flight_requests
            && bytes < MAX_PENDING_BYTES
            && large < MAX_LARGE_CALLS
            && self.out.bytes() < HIGH_WATER
    }

    fn on_text(&mut self, text: &str, context: &mut Context<'_>) {
        let gateway = self.session.gateway.clone();
        let now = gateway.clock.now();
        if let Err(wait) = self.session.rate.admit(now) {
            let limit = gateway.options.rate_limit;
            let error = RequestError::limited(
                "gateway.rate_limit",
                &format!("more than {limit} messages per second"),
                Some(wait),
            );
            self.reject(client_message::request_id(text).as_deref(), &error);
            return;
        }
        match client_message::parse(text) {
            Ok(message) => {
                self.session.consecutive_rejections = 0;
                gateway.metrics.message_received(message.kind());
                let large = usize::from(message.has_large_reply());
                let call = self.session.start_call(message, now);
                self.start(call, Cost { calls: 1, bytes: text.len(), large }, context);
            }
            Err(invalid) => {
                let details = streamer_rpc::violations_details(&invalid.violations);
                let mut error =
                    RequestError::new(ErrorCode::ValidationError, invalid.violations.to_string());
                error.details = Some(details);
                self.reject(invalid.request_id.as_deref(), &error);
            }
        }
    }

    fn reject(&mut self, request_id: Option<&str>, error: &RequestError) {
        self.session.gateway.metrics.message_rejected(error.code);
        self.session.consecutive_rejections += 1;
        if self.session.consecutive_rejections > MAX_CONSECUTIVE_REJECTIONS {
            let code = if error.code == ErrorCode::RateLimited {
                CloseCode::LimitExceeded
            } else {
                CloseCode::InvalidRequest
            };
            self.close(code, "too many consecutive messages were rejected");
            return;
        }
        let now = self.session.gateway.clock.now();
        self.send(server_message::error(request_id, error, now));
    }

    /// Starts a call. Most sync actions complete immediately and are not queued.
    fn start(&mut self, mut call: Call, cost: Cost, context: &mut Context<'_>) {
        match call.as_mut().poll(context) {
            Poll::Ready(reply) => self.handle_reply(reply),
            Poll::Pending => {
                self.pending.add(cost);
                self.calls.push(InFlight { call, cost });
            }
        }
    }

    fn handle_reply(&mut self, reply: Reply) {
        if self.phase != Phase::Open {
            return; // no frame may follow a close frame
        }
        let before = self.out.bytes();
        let close = self.session.finish_call(reply, &mut self.out);
        let queued = self.out.bytes().saturating_sub(before);
        self.session.gateway.metrics.bytes_out.inc_by(queued as u64);
        if let Some((code, reason)) = close {
            self.close(code, &reason);
        }
    }

    /// Runs one iteration. Returns `true` if another iteration is required, `false` if the connection
    /// has ended.
    fn iterate(&mut self, context: &mut Context<'_>) -> Poll<bool> {
        let Some(mut progressed) = self.drain_inbox() else { return Poll::Ready(false) };
        let can_read = self.phase != Phase::Open || self.has_room();
        self.session.handle.liveness.reading.store(can_read, Ordering::Relaxed);
        if can_read && self.phase != Phase::Closed {
            match self.read(context) {
                Poll::Ready(Ok(())) => progressed = true,
                Poll::Ready(Err(_)) => return Poll::Ready(false),
                Poll::Pending => {}
            }
        }
        // Calls are polled only while their replies can be queued.
        while self.out.bytes() < HIGH_WATER
            && let Poll::Ready(Some((reply, cost))) = self.calls.poll_next_unpin(context)
        {
            self.pending.subtract(cost);
            self.handle_reply(reply);
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

    /// Queues events. Returns whether it started calls, which must be polled.
    fn deliver(&mut self) -> bool {
        let before = self.out.bytes();
        let calls = self.session.deliver(&mut self.out, HIGH_WATER);
        let queued = self.out.bytes().saturating_sub(before);
        self.session.gateway.metrics.bytes_out.inc_by(queued as u64);
        let any = !calls.is_empty();
        for call in calls {
            let cost = Cost { calls: 1, ..Cost::default() };
            self.pending.add(cost);
            self.calls.push(InFlight { call, cost });
        }
        any
    }

    /// Writes pending output. Returns whether any output was written and the buffer accepts more.
    fn write(&mut self, context: &mut Context<'_>) -> std::io::Result<bool> {
        if self.out.is_empty() {
            return Ok(false);
        }
        let before = self.out.bytes();
        let written = self.out.poll_write(&mut self.socket, context);
        let liveness = &self.session.handle.liveness;
        let moved = self.out.bytes() < before;
        match written {
            Poll::Ready(Err(error)) => return Err(error),
            Poll::Ready(Ok(())) => liveness.blocked_since.store(0, Ordering::Relaxed),
            Poll::Pending if moved || liveness.blocked_since.load(Ordering::Relaxed) == 0 => {
                let now = self.session.gateway.registry.seconds();
                liveness.blocked_since.store(now.max(1), Ordering::Relaxed);
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
        // The waker is registered before the inbox is read, so that every later change wakes this task.
        connection.session.handle.waker.register(context.waker());
        for _ in 0..MAX_ITERATIONS {
            match connection.iterate(context) {
                Poll::Ready(true) => {}
                Poll::Ready(false) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}
