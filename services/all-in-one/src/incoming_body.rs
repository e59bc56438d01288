//! Bodies of gRPC calls: messages that are not whole yet are bounded in bytes and in time.
//!
//! A message is decoded once it is whole; until then its bytes are kept. A caller that sends
//! all of a message but its last byte, in many calls at once, would fill the memory.

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
use streamer_core::{ErrorCode, RequestError};
use streamer_proto::public_methods;
use streamer_rpc::status;
use streamer_telemetry::Metrics;
use tokio::time::{Instant, Sleep, sleep};
use tonic::Status;

/// Approximate memory of an unfinished message beyond its bytes.
const OVERHEAD_BYTES: usize = 32 * 1024;
/// Paths of the services that anyone may call begin with this: health and reflection.
const FOR_ANYONE: &str = "/grpc.";
/// Before each message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;
/// Paths of the methods that take one message: all of it must come in time.
static UNARY: LazyLock<HashSet<String>> = LazyLock::new(|| {
    let unary = public_methods().into_iter().filter(|method| !method.client_streaming);
    unary.map(|method| method.path).chain(["/grpc.health.v1.Health/Check".into()]).collect()
});

/// Bytes of unfinished messages, over all calls of a server.
#[derive(Clone)]
pub(crate) struct Undecoded(Arc<Budget>);

struct Budget {
    bytes: AtomicUsize,
    max: usize,
    patience: Duration,
    gauge: Gauge,
    /// Of the services that anyone may call.
    anyone: Arc<Share>,
    /// Of each token, by its hash, as long as something is held in its name.
    tokens: Mutex<Tokens>,
    hasher: RandomState,
}

#[derive(Default)]
struct Tokens {
    shares: HashMap<u64, Weak<Share>>,
    /// Shares that are no longer in use are removed when there are this many.
    clean_at: usize,
}

/// A part of the budget.
struct Share {
    bytes: AtomicUsize,
    max: usize,
}

impl Undecoded {
    /// At most this many bytes in all, a quarter of them in the name of one token, and a sixteenth without
    /// one; a message must be whole within `patience`.
    pub(crate) fn new(max: usize, patience: Duration, metrics: &Metrics) -> Self {
        let limit = metrics.gauge(
            "streamer_server_undecoded_bytes_limit",
            "Limit of streamer_server_undecoded_bytes (server.max_undecoded_bytes)",
        );
        limit.set(i64::try_from(max).unwrap_or(i64::MAX));
        let gauge = metrics.gauge(
            "streamer_server_undecoded_bytes",
            "Bytes of messages of calls that are not whole yet, and of what keeps them",
        );
        let anyone = Arc::new(Share { bytes: AtomicUsize::new(0), max: max / 16 });
        Self(Arc::new(Budget {
            bytes: AtomicUsize::new(0),
            max,
            patience,
            gauge,
            anyone,
            tokens: Mutex::default(),
            hasher: RandomState::new(),
        }))
    }
}

impl Budget {
    fn show(&self) {
        let bytes = i64::try_from(self.bytes.load(Ordering::Relaxed)).unwrap_or(i64::MAX);
        self.gauge.set(bytes);
    }

    /// Returns the share of this token. All calls without a token have one share.
    fn share(&self, authorization: Option<&HeaderValue>) -> Arc<Share> {
        let Some(token) = authorization else { return self.anyone.clone() };
        let hash = self.hasher.hash_one(token.as_bytes());
        let mut tokens = self.tokens.lock();
        if let Some(share) = tokens.shares.get(&hash).and_then(Weak::upgrade) {
            return share;
        }
        if tokens.shares.len() >= tokens.clean_at {
            tokens.shares.retain(|_, share| share.strong_count() > 0);
            tokens.clean_at = 2 * tokens.shares.len() + 64;
        }
        let share = Arc::new(Share { bytes: AtomicUsize::new(0), max: self.max / 4 });
        tokens.shares.insert(hash, Arc::downgrade(&share));
        share
    }
}

/// Where a stream of messages stands.
#[derive(Debug, Default, PartialEq, Eq)]
struct Framing {
    prefix: [u8; PREFIX_BYTES],
    prefix_bytes: usize,
    /// Bytes of the message that came, and that are still to come.
    came: usize,
    to_come: usize,
}

impl Framing {
    /// Bytes of the message that is not whole yet.
    fn held(&self) -> usize {
        self.prefix_bytes + self.came
    }

    /// Reads data; says whether a message began in it that is not whole.
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
                self.to_come = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
            }
            let count = data.len().min(self.to_come);
            self.came += count;
            self.to_come -= count;
            data = &data[count..];
            if self.to_come == 0 {
                *self = Self::default();
                is_new = false;
            }
        }
        is_new
    }
}

/// The body of a call.
pub(crate) struct IncomingBody {
    body: hyper::body::Incoming,
    framing: Framing,
    budget: Undecoded,
    /// Whose share of the budget it takes, once it takes any.
    share: Option<Arc<Share>>,
    authorization: Option<HeaderValue>,
    /// What is counted of this body.
    counted: usize,
    /// The whole body is to come in time, not just each message that has begun.
    is_unary: bool,
    /// Time spent waiting for the message, without the current wait.
    waited: Duration,
    wait: Option<Wait>,
}

struct Wait {
    since: Instant,
    timer: Pin<Box<Sleep>>,
}

impl IncomingBody {
    pub(crate) fn new(body: hyper::body::Incoming, head: &Parts, budget: Undecoded) -> Self {
        let path = head.uri.path();
        // What anyone may call is not counted in the name of a token that is not looked at.
        let is_for_anyone = path.starts_with(FOR_ANYONE);
        let authorization = head.headers.get(header::AUTHORIZATION).filter(|_| !is_for_anyone);
        Self {
            body,
            framing: Framing::default(),
            budget,
            share: None,
            authorization: authorization.cloned(),
            counted: 0,
            is_unary: UNARY.contains(path),
            waited: Duration::ZERO,
            wait: None,
        }
    }

    /// Counts what is held now.
    fn count(&mut self, held: usize) -> Result<(), Status> {
        let held = if held == 0 { 0 } else { held.saturating_add(OVERHEAD_BYTES) };
        if held == self.counted {
            return Ok(());
        }
        let Undecoded(all) = &self.budget;
        let share = self.share.get_or_insert_with(|| all.share(self.authorization.as_ref()));
        let before = std::mem::replace(&mut self.counted, held);
        if held < before {
            all.bytes.fetch_sub(before - held, Ordering::Relaxed);
            share.bytes.fetch_sub(before - held, Ordering::Relaxed);
            all.show();
            if held == 0 {
                self.share = None;
            }
            return Ok(());
        }
        let more = held - before;
        let in_all = all.bytes.fetch_add(more, Ordering::Relaxed).saturating_add(more);
        let of_share = share.bytes.fetch_add(more, Ordering::Relaxed).saturating_add(more);
        all.show();
        if in_all <= all.max && of_share <= share.max {
            return Ok(());
        }
        let message = "too many bytes of messages that are not whole yet";
        let pause = Some(Duration::from_secs(1));
        Err(status(&RequestError::limited("server.max_undecoded_bytes", message, pause)))
    }

    /// Waits for more; refuses what takes too long. Time in which nothing is read does not count.
    fn wait(&mut self, context: &mut Context<'_>) -> Poll<Status> {
        let patience = self.budget.0.patience;
        let left = patience.saturating_sub(self.waited);
        let wait = self
            .wait
            .get_or_insert_with(|| Wait { since: Instant::now(), timer: Box::pin(sleep(left)) });
        ready!(wait.timer.as_mut().poll(context));
        let rule = format!(
            "the message was not whole within {} s (server.body_timeout_ms)",
            patience.as_secs_f64()
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
            if !this.is_unary && this.framing.held() == 0 {
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
            let held = this.framing.held();
            if !this.is_unary && (is_new || held == 0) {
                this.waited = Duration::ZERO;
            }
            this.count(held).map_err(axum::Error::new)?;
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
        let released = self.count(0);
        debug_assert!(released.is_ok(), "less is never refused");
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
    fn what_is_not_whole_is_counted_whatever_the_pieces() {
        let all = [message(0), message(3), message(300), message(0), message(7)].concat();
        let ends: HashSet<usize> = [5, 13, 318, 323, 335].into();
        let mut last = 0;
        let mut framing = Framing::default();
        for (position, byte) in all.iter().enumerate() {
            framing.feed(std::slice::from_ref(byte));
            last = if ends.contains(&(position + 1)) { position + 1 } else { last };
            assert_eq!(framing.held(), position + 1 - last, "{position}");
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
    fn a_message_that_begins_is_noticed() {
        let mut framing = Framing::default();
        assert!(framing.feed(&message(10)[..7]));
        assert!(!framing.feed(b"xxx"));
        let rest = [&b"xxxxx"[..], &message(9)[..3]].concat();
        assert!(framing.feed(&rest));
        assert!(!framing.feed(&message(9)[3..]));
    }
}
