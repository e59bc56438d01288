//! Bodies of gRPC calls on their way in: what is not whole yet is bounded in bytes and in time.
//!
//! A message is decoded once it is whole; until then its bytes are kept. A caller that sends
//! all of a message but its last byte, in many calls at once, would fill the memory.

use std::{
    collections::HashSet,
    pin::Pin,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use hyper::body::{Body, Frame, SizeHint};
use prometheus_client::metrics::gauge::Gauge;
use streamer_core::{ErrorCode, RequestError};
use streamer_proto::public_methods;
use streamer_rpc::status;
use streamer_telemetry::Metrics;
use tokio::time::{Sleep, sleep};
use tonic::Status;

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
}

/// The part of one connection in it.
#[derive(Clone)]
pub(crate) struct OfConnection {
    all: Arc<Budget>,
    bytes: Arc<AtomicUsize>,
}

impl Undecoded {
    /// At most so many bytes in all, a quarter of them from one connection; a message must be whole
    /// within `patience`.
    pub(crate) fn new(max: usize, patience: Duration, metrics: &Metrics) -> Self {
        let limit = metrics.gauge(
            "streamer_server_undecoded_bytes_limit",
            "Most bytes of unfinished messages (server.max_undecoded_bytes)",
        );
        limit.set(i64::try_from(max).unwrap_or(i64::MAX));
        let gauge = metrics.gauge(
            "streamer_server_undecoded_bytes",
            "Bytes of messages of calls that are not whole yet",
        );
        Self(Arc::new(Budget { bytes: AtomicUsize::new(0), max, patience, gauge }))
    }

    pub(crate) fn of_connection(&self) -> OfConnection {
        OfConnection { all: self.0.clone(), bytes: Arc::default() }
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

    /// Takes in what came; says whether a message began in it that is not whole.
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
    /// What is counted of this body.
    counted: usize,
    budget: OfConnection,
    /// The whole body is to come in time, not just each message that has begun.
    is_unary: bool,
    timer: Option<Pin<Box<Sleep>>>,
}

impl IncomingBody {
    pub(crate) fn new(body: hyper::body::Incoming, path: &str, budget: OfConnection) -> Self {
        let is_unary = UNARY.contains(path);
        Self { body, framing: Framing::default(), counted: 0, budget, is_unary, timer: None }
    }

    /// Counts what is held now.
    fn count(&mut self, held: usize) -> Result<(), Status> {
        let OfConnection { all, bytes } = &self.budget;
        if held <= self.counted {
            let less = self.counted - held;
            self.counted = held;
            if less > 0 {
                all.bytes.fetch_sub(less, Ordering::Relaxed);
                bytes.fetch_sub(less, Ordering::Relaxed);
                all.show();
            }
            return Ok(());
        }
        let more = held - self.counted;
        self.counted = held;
        let in_all = all.bytes.fetch_add(more, Ordering::Relaxed) + more;
        let of_connection = bytes.fetch_add(more, Ordering::Relaxed) + more;
        all.show();
        if in_all <= all.max && of_connection <= all.max / 4 {
            return Ok(());
        }
        let message = "too many bytes of messages that are not whole yet";
        let pause = Some(Duration::from_secs(1));
        Err(status(&RequestError::limited("server.max_undecoded_bytes", message, pause)))
    }
}

impl Budget {
    fn show(&self) {
        let bytes = i64::try_from(self.bytes.load(Ordering::Relaxed)).unwrap_or(i64::MAX);
        self.gauge.set(bytes);
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
        match Pin::new(&mut this.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    let is_new = this.framing.feed(data.chunk());
                    let held = this.framing.held();
                    if !this.is_unary && (is_new || held == 0) {
                        this.timer = None;
                    }
                    if let Err(refusal) = this.count(held) {
                        return Poll::Ready(Some(Err(axum::Error::new(refusal))));
                    }
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(axum::Error::new(error)))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => {
                if !this.is_unary && this.framing.held() == 0 {
                    return Poll::Pending;
                }
                let patience = this.budget.all.patience;
                let timer = this.timer.get_or_insert_with(|| Box::pin(sleep(patience)));
                ready!(timer.as_mut().poll(context));
                let rule = format!(
                    "the message was not whole within {} s (server.body_timeout_ms)",
                    patience.as_secs_f64()
                );
                let late = status(&RequestError::new(ErrorCode::Timeout, rule));
                Poll::Ready(Some(Err(axum::Error::new(late))))
            }
        }
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
        // Less is never refused.
        drop(self.count(0));
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
