//! Body of an incoming gRPC call. Limits the bytes of incomplete messages and the time to receive them.
//!
//! A message is decoded when it is complete; until then, its bytes are buffered. Without a limit, a
//! caller that omits only the last byte of many messages could exhaust the memory.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    pin::Pin,
    sync::{
        Arc, LazyLock, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http::{HeaderValue, header, request::Parts};
use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use streamer_core::{ErrorCode, RequestError, saturate};
use streamer_proto::public_methods;
use streamer_rpc::status;
use streamer_telemetry::Metrics;
use tokio::time::{Instant, Sleep, sleep};
use tonic::Status;

/// Approximate memory overhead of an incomplete message, in bytes.
const OVERHEAD_BYTES: usize = 32 * 1024;
/// Path prefix of the unauthenticated services: health and reflection.
const UNAUTHENTICATED_PREFIX: &str = "/grpc.";
/// Size of the prefix of each message, in bytes: compression flag and length.
const PREFIX_BYTES: usize = 5;
/// Paths of the methods whose request is a single message, which must arrive completely within the timeout.
static UNARY: LazyLock<HashSet<String>> = LazyLock::new(|| {
    let unary = public_methods().into_iter().filter(|method| !method.client_streaming);
    unary.map(|method| method.path).chain(["/grpc.health.v1.Health/Check".into()]).collect()
});

/// Budget of bytes for incomplete messages, across all calls of a server.
#[derive(Clone)]
pub(crate) struct UndecodedBudget(Arc<Budget>);

struct Budget {
    bytes: AtomicUsize,
    max: usize,
    timeout: Duration,
    gauge: Gauge,
    /// Share of calls without a token.
    unauthenticated: Arc<Share>,
    /// Shares of tokens, by the hash of the token. A share exists while it has reserved bytes.
    tokens: Mutex<Tokens>,
    hasher: RandomState,
}

#[derive(Default)]
struct Tokens {
    shares: HashMap<u64, Weak<Share>>,
    /// Number of shares at which unused shares are removed.
    cleanup_threshold: usize,
}

/// Part of the budget for one token, or for all calls without a token.
struct Share {
    bytes: AtomicUsize,
    max: usize,
}

impl UndecodedBudget {
    /// Creates a budget of `max` bytes in total, a quarter of `max` per token, and a sixteenth of `max` for
    /// calls without a token. A message must be complete within `timeout`.
    pub(crate) fn new(max: usize, timeout: Duration, metrics: &Metrics) -> Self {
        let limit = metrics.gauge(
            "streamer_server_undecoded_bytes_limit",
            "Limit of streamer_server_undecoded_bytes (server.max_undecoded_bytes)",
        );
        limit.set(saturate::to_i64(max));
        let gauge = metrics.gauge(
            "streamer_server_undecoded_bytes",
            "Bytes of incomplete messages of calls, including overhead",
        );
        let unauthenticated = Arc::new(Share { bytes: AtomicUsize::new(0), max: max / 16 });
        Self(Arc::new(Budget {
            bytes: AtomicUsize::new(0),
            max,
            timeout,
            gauge,
            unauthenticated,
            tokens: Mutex::default(),
            hasher: RandomState::new(),
        }))
    }
}

impl Budget {
    fn update_gauge(&self) {
        let bytes = saturate::to_i64(self.bytes.load(Ordering::Relaxed));
        self.gauge.set(bytes);
    }

    /// Returns the share of the given token. All calls without a token have one share.
    fn share(&self, authorization: Option<&HeaderValue>) -> Arc<Share> {
        let Some(token) = authorization else { return self.unauthenticated.clone() };
        let hash = self.hasher.hash_one(token.as_bytes());
        let mut tokens = self.tokens.lock();
        if let Some(share) = tokens.shares.get(&hash).and_then(Weak::upgrade) {
            return share;
        }
        if tokens.shares.len() >= tokens.cleanup_threshold {
            tokens.shares.retain(|_, share| share.strong_count() > 0);
            tokens.cleanup_threshold = 2 * tokens.shares.len() + 64;
        }
        let share = Arc::new(Share { bytes: AtomicUsize::new(0), max: self.max / 4 });
        tokens.shares.insert(hash, Arc::downgrade(&share));
        share
    }
}

/// Position in a stream of messages.
#[derive(Debug, Default, PartialEq, Eq)]
struct Framing {
    prefix: [u8; PREFIX_BYTES],
    prefix_bytes: usize,
    /// Number of received bytes of the message.
    received: usize,
    /// Number of missing bytes of the message.
    remaining: usize,
}

impl Framing {
    /// Returns the number of buffered bytes of an incomplete message.
    fn buffered(&self) -> usize {
        self.prefix_bytes + self.received
    }

    /// Processes received data. Returns whether an incomplete message begins in it.
    fn feed(&mut self, mut data: &[u8]) -> bool {
        let mut is_new = false;
        while !data.is_empty() {
            if self.prefix_bytes < PREFIX_BYTES {
                is_new |= self.prefix_bytes == 0;
                let count = data.len().min(PREFIX_BYTES - self.prefix_bytes);
                self.prefix[self.prefix_bytes..][..count].copy_from_slice(&data[..count]);
                self.prefix_bytes += count;
                data = &data[count..];
                if self.prefix_bytes < PREFIX_BYTES {
                    break;
                }
                let [_, length @ ..] = self.prefix;
                self.remaining = saturate::to_usize(u32::from_be_bytes(length));
            }
            let count = data.len().min(self.remaining);
            self.received += count;
            self.remaining -= count;
            data = &data[count..];
            if self.remaining == 0 {
                *self = Self::default();
                is_new = false;
            }
        }
        is_new
    }
}

/// Body of an incoming call.
pub(crate) struct IncomingBody {
    body: hyper::body::Incoming,
    framing: Framing,
    budget: UndecodedBudget,
    /// Share of the budget; `None` while no bytes are reserved.
    share: Option<Arc<Share>>,
    authorization: Option<HeaderValue>,
    /// Number of bytes reserved for this body.
    reserved: usize,
    /// Whether the timeout applies to the whole body instead of each message that has begun.
    is_unary: bool,
    /// Time spent waiting for data of the message, excluding the current wait.
    waited: Duration,
    wait: Option<Wait>,
}

struct Wait {
    since: Instant,
    timer: Pin<Box<Sleep>>,
}

impl IncomingBody {
    pub(crate) fn new(body: hyper::body::Incoming, head: &Parts, budget: UndecodedBudget) -> Self {
        let path = head.uri.path();
        // Unauthenticated services do not verify tokens, so a token does not have a separate share.
        let is_unauthenticated = path.starts_with(UNAUTHENTICATED_PREFIX);
        let authorization = head.headers.get(header::AUTHORIZATION).filter(|_| !is_unauthenticated);
        Self {
            body,
            framing: Framing::default(),
            budget,
            share: None,
            authorization: authorization.cloned(),
            reserved: 0,
            is_unary: UNARY.contains(path),
            waited: Duration::ZERO,
            wait: None,
        }
    }

    /// Sets the reservation to the number of buffered bytes and their overhead.
    fn reserve(&mut self, buffered: usize) -> Result<(), Status> {
        let buffered = if buffered == 0 { 0 } else { buffered.saturating_add(OVERHEAD_BYTES) };
        if buffered == self.reserved {
            return Ok(());
        }
        let UndecodedBudget(budget) = &self.budget;
        let share = self.share.get_or_insert_with(|| budget.share(self.authorization.as_ref()));
        let before = std::mem::replace(&mut self.reserved, buffered);
        if buffered < before {
            budget.bytes.fetch_sub(before - buffered, Ordering::Relaxed);
            share.bytes.fetch_sub(before - buffered, Ordering::Relaxed);
            budget.update_gauge();
            if buffered == 0 {
                self.share = None;
            }
            return Ok(());
        }
        let more = buffered - before;
        let total = budget.bytes.fetch_add(more, Ordering::Relaxed).saturating_add(more);
        let of_share = share.bytes.fetch_add(more, Ordering::Relaxed).saturating_add(more);
        budget.update_gauge();
        if total <= budget.max && of_share <= share.max {
            return Ok(());
        }
        let message = "too many bytes of incomplete messages";
        let pause = Some(Duration::from_secs(1));
        Err(status(&RequestError::limited("server.max_undecoded_bytes", message, pause)))
    }

    /// Waits for more data until the timeout. Time during which the body is not read does not count.
    fn wait(&mut self, context: &mut Context<'_>) -> Poll<Status> {
        let timeout = self.budget.0.timeout;
        let left = timeout.saturating_sub(self.waited);
        let wait = self
            .wait
            .get_or_insert_with(|| Wait { since: Instant::now(), timer: Box::pin(sleep(left)) });
        ready!(wait.timer.as_mut().poll(context));
        let rule = format!(
            "the message was not complete within {} s (server.body_timeout)",
            timeout.as_secs_f64()
        );
        Poll::Ready(status(&RequestError::new(ErrorCode::Timeout, rule)))
    }
}

impl Body for IncomingBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        let Poll::Ready(next) = Pin::new(&mut this.body).poll_frame(context) else {
            if !this.is_unary && this.framing.buffered() == 0 {
                return Poll::Pending;
            }
            let late = ready!(this.wait(context));
            return Poll::Ready(Some(Err(axum::Error::new(late))));
        };
        if let Some(wait) = this.wait.take() {
            this.waited += wait.since.elapsed();
        }
        let Some(frame) = next else { return Poll::Ready(None) };
        let frame = frame.map_err(axum::Error::new)?;
        if let Some(data) = frame.data_ref() {
            let is_new = this.framing.feed(data.chunk());
            let buffered = this.framing.buffered();
            if !this.is_unary && (is_new || buffered == 0) {
                this.waited = Duration::ZERO;
            }
            this.reserve(buffered).map_err(axum::Error::new)?;
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for IncomingBody {
    fn drop(&mut self) {
        let released = self.reserve(0);
        debug_assert!(released.is_ok(), "a smaller reservation never fails");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: u32) -> Vec<u8> {
        let mut message = vec![0];
        message.extend(length.to_be_bytes());
        message.resize(PREFIX_BYTES + usize::try_from(length).unwrap(), b'x');
        message
    }

    #[test]
    fn incomplete_messages_are_counted_however_the_input_is_split() {
        let all = [message(0), message(3), message(300), message(0), message(7)].concat();
        let ends: HashSet<usize> = [5, 13, 318, 323, 335].into();
        let mut last = 0;
        let mut framing = Framing::default();
        for (position, byte) in all.iter().enumerate() {
            framing.feed(std::slice::from_ref(byte));
            last = if ends.contains(&(position + 1)) { position + 1 } else { last };
            assert_eq!(framing.buffered(), position + 1 - last, "{position}");
        }
        for size in [2, 3, 7, 100, 1000] {
            let mut framing = Framing::default();
            all.chunks(size).for_each(|piece| {
                framing.feed(piece);
            });
            assert_eq!(framing, Framing::default(), "{size}");
        }
    }

    #[test]
    fn the_start_of_an_incomplete_message_is_reported() {
        let mut framing = Framing::default();
        assert!(framing.feed(&message(10)[..7]));
        assert!(!framing.feed(b"xxx"));
        let rest = [&b"xxxxx"[..], &message(9)[..3]].concat();
        assert!(framing.feed(&rest));
        assert!(!framing.feed(&message(9)[3..]));
    }
}
