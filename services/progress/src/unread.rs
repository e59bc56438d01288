//! Bounds what watchers have been sent and have not read.
//!
//! A message waits in memory, encoded for its stream, until its client reads it. Small ones are not counted.

use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt};
use prost::Message;
use streamer_auth::Principal;
use streamer_core::OpenWatch;
use streamer_handler::{OutputBudget, Reservation};
use streamer_proto::progress::v1::WatchResponse;
use tonic::Status;

/// Messages of at most this many bytes are not counted.
const UNCOUNTED_BYTES: usize = 16 * 1024;

/// What one watcher may have unread: it shares the budget of all with the other watchers of its user.
pub(crate) struct UnreadBudget {
    budget: Arc<OutputBudget>,
    user: Arc<str>,
}

impl UnreadBudget {
    pub(crate) fn of(budget: &Arc<OutputBudget>, principal: &Principal) -> Self {
        // Neither name has control characters.
        let user = format!("{}\n{}", principal.tenant, principal.user);
        Self { budget: budget.clone(), user: user.into() }
    }

    /// Reserves what a message takes, if there is room now; returns its bytes otherwise.
    pub(crate) fn try_reserve(&self, message: &WatchResponse) -> Result<Reservation, usize> {
        match message.encoded_len() {
            0..=UNCOUNTED_BYTES => Ok(Reservation::default()),
            bytes => self.budget.try_reserve(&self.user, bytes).ok_or(bytes),
        }
    }

    /// Reserves so many bytes; waits until there is room.
    pub(crate) async fn reserve(&self, bytes: usize) -> Reservation {
        self.budget.reserve(&self.user, bytes).await
    }
}

/// Relays the watch of another instance, which counts as open for as long as this stream lives.
pub(crate) fn relay(
    watch: BoxStream<'static, Result<WatchResponse, Status>>,
    counted: Option<OpenWatch>,
    budget: Option<UnreadBudget>,
) -> BoxStream<'static, Result<WatchResponse, Status>> {
    let state = (watch, counted, budget, Reservation::default());
    let relayed = stream::unfold(state, |(mut watch, counted, budget, unread)| async move {
        // The message before was read.
        drop(unread);
        let item = watch.next().await?;
        let unread = match (&item, &budget) {
            (Ok(message), Some(budget)) => match budget.try_reserve(message) {
                Ok(unread) => unread,
                Err(bytes) => budget.reserve(bytes).await,
            },
            _ => Reservation::default(),
        };
        Some((item, (watch, counted, budget, unread)))
    });
    Box::pin(relayed)
}
