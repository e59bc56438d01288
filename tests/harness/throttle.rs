//! A DynamoDB that has too much to do: in front of a real one, it refuses some of the calls.

use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicU64, Ordering},
};

use axum::{extract::Request, response::Response};

use crate::front::{self, Answer, Upstream, exception};

/// Which calls are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Throttling {
    /// None.
    Nothing = 0,
    /// Every third.
    EveryThird = 1,
    /// All.
    Everything = 2,
}

/// A running one.
pub struct Throttle {
    /// Where it is asked.
    pub endpoint: String,
    state: Arc<Inner>,
}

struct Inner {
    upstream: Upstream,
    throttling: AtomicU8,
    calls: AtomicU64,
    refused: AtomicU64,
}

impl Throttle {
    /// Starts one in front of this endpoint.
    pub async fn start(target: &str) -> Self {
        let state = Arc::new(Inner {
            upstream: Upstream::new(target),
            throttling: AtomicU8::new(Throttling::Nothing as u8),
            calls: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        Self { endpoint: front::start(state.clone()).await, state }
    }

    /// From now on these calls are refused.
    pub fn set(&self, throttling: Throttling) {
        self.state.throttling.store(throttling as u8, Ordering::SeqCst);
    }

    /// How many calls were refused.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.state.refused.load(Ordering::SeqCst)
    }
}

impl Answer for Inner {
    async fn answer(&self, request: Request) -> Response {
        let number = self.calls.fetch_add(1, Ordering::SeqCst);
        let refuse = match self.throttling.load(Ordering::SeqCst) {
            1 => number.is_multiple_of(3),
            2 => true,
            _ => false,
        };
        if refuse {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return exception("ProvisionedThroughputExceededException");
        }
        self.upstream.forward(request).await
    }
}
