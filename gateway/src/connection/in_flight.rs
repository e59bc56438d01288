//! Pending calls of a connection and their cost.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use super::reply::Reply;

pub(super) type Call = Pin<Box<dyn Future<Output = Reply> + Send>>;

/// A pending call and its cost.
pub(super) struct InFlight {
    pub(super) call: Call,
    pub(super) cost: Cost,
}

impl Future for InFlight {
    type Output = (Reply, Cost);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<(Reply, Cost)> {
        let cost = self.cost;
        self.call.as_mut().poll(context).map(|reply| (reply, cost))
    }
}

/// Resources that pending calls use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cost {
    pub(super) calls: usize,
    pub(super) bytes: usize,
    /// Number of calls whose replies may be large.
    pub(super) large: usize,
}

impl Cost {
    pub(super) fn add(&mut self, other: Self) {
        self.calls += other.calls;
        self.bytes += other.bytes;
        self.large += other.large;
    }

    pub(super) fn subtract(&mut self, other: Self) {
        self.calls -= other.calls;
        self.bytes -= other.bytes;
        self.large -= other.large;
    }
}
