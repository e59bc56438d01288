//! Limits the memory of messages that were sent to watchers and not read.
//!
//! An encoded message stays in memory until its client reads it. Small messages are not counted.

use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt};
use prost::Message;
use streamer_auth::Principal;
use streamer_core::WatchPermit;
use streamer_handler::{MemoryBudget, Reservation};
use streamer_proto::progress::v1::WatchResponse;
use tonic::Status;

/// Maximum size of a message that is not counted, in bytes.
const UNCOUNTED_BYTES: usize = 16 * 1024;

/// Budget of one watcher for unread messages. All watchers of a user share one part of the total budget.
pub(crate) struct UnreadBudget {
    budget: Arc<MemoryBudget>,
    user: Arc<str>,
}

impl UnreadBudget {
    pub(crate) fn for_user(budget: &Arc<MemoryBudget>, principal: &Principal) -> Self {
        // Names contain no control characters, so that the key is unambiguous.
        let user = format!("{}\n{}", principal.tenant, principal.user);
        Self { budget: budget.clone(), user: user.into() }
    }

    /// Reserves the bytes of a message if they are available; otherwise returns the number of bytes as an error.
    pub(crate) fn try_reserve(&self, message: &WatchResponse) -> Result<Reservation, usize> {
        match message.encoded_len() {
            0..=UNCOUNTED_BYTES => Ok(Reservation::default()),
            bytes => self.budget.try_reserve(&self.user, bytes).ok_or(bytes),
        }
    }

    /// Reserves the given number of bytes; waits until they are available.
    pub(crate) async fn reserve(&self, bytes: usize) -> Reservation {
        self.budget.reserve(&self.user, bytes).await
    }
}

/// Relays a watch from another instance. The watch counts as open while the returned stream exists.
pub(crate) fn relay(
    watch: BoxStream<'static, Result<WatchResponse, Status>>,
    open_watch: Option<WatchPermit>,
    budget: Option<UnreadBudget>,
) -> BoxStream<'static, Result<WatchResponse, Status>> {
    let state = (watch, open_watch, budget, Reservation::default());
    let relayed = stream::unfold(state, |(mut watch, open_watch, budget, unread)| async move {
        // The client has read the previous message.
        drop(unread);
        let item = watch.next().await?;
        let unread = match (&item, &budget) {
            (Ok(message), Some(budget)) => match budget.try_reserve(message) {
                Ok(unread) => unread,
                Err(bytes) => budget.reserve(bytes).await,
            },
            _ => Reservation::default(),
        };
        Some((item, (watch, open_watch, budget, unread)))
    });
    Box::pin(relayed)
}
