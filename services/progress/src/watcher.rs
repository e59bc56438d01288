//! One watch stream: a cursor in the log of a request.

use std::sync::Arc;

use futures_util::stream::{self, BoxStream};
use prometheus_client::metrics::gauge::Gauge;
use streamer_core::{Seq, WatchPermit};
use streamer_handler::Reservation;
use streamer_proto::{
    common::v1::{Event, PayloadEncoding},
    progress::v1::{WatchRequest, WatchResponse},
};
use streamer_rpc::{encode_event, is_terminal, store_status};
use streamer_store::{EventNumbers, RequestNumbers, Store};
use tonic::Status;

use crate::{
    topics::{Position, Read, Subscription, Topics},
    unread_budget::UnreadBudget,
};

/// Maximum number of events in a message.
const MAX_EVENTS: usize = 512;
/// Approximate maximum bytes of a message; a single event may be larger.
const MAX_BYTES: usize = 256 * 1024;

/// Watch of one request.
pub(crate) struct Watcher {
    subscription: Subscription,
    topics: Arc<Topics>,
    store: Arc<dyn Store>,
    /// `seq` of the last event that was sent or skipped.
    cursor: Seq,
    /// Whether the watch starts at the snapshot, which determines the cursor.
    starts_at_snapshot: bool,
    position: Position,
    encoding: PayloadEncoding,
    /// Whether to send only the terminal event.
    outcome_only: bool,
    snapshot_sent: bool,
    ended: bool,
    _gauge: GaugeGuard,
    /// Permit that counts the watch as an open watch of the user; `None` if a gateway or another instance counts it.
    _open_watch: Option<WatchPermit>,
    /// Budget for unread messages; `None` for a watch from a gateway.
    budget: Option<UnreadBudget>,
    /// Reservation for the last message, which the client may not have read.
    unread: Reservation,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.subscription.topic.remove_watcher(self.position);
    }
}

/// Counts an open stream until it is dropped.
struct GaugeGuard(Gauge);

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Watcher {
    /// Creates a watch that starts after `after_seq`, or at the snapshot if `after_seq` is absent. A watch that
    /// starts at the snapshot of an ended request also sends the terminal event.
    pub(crate) fn new(
        subscription: Subscription,
        topics: Arc<Topics>,
        store: Arc<dyn Store>,
        request: &WatchRequest,
        after_seq: Option<Seq>,
        (open_watch, budget): (Option<WatchPermit>, Option<UnreadBudget>),
    ) -> Self {
        let watchers = topics.metrics().watchers.clone();
        watchers.inc();
        Self {
            subscription,
            topics,
            store,
            cursor: after_seq.unwrap_or_default(),
            starts_at_snapshot: after_seq.is_none(),
            position: Position::default(),
            encoding: request.payload_encoding(),
            outcome_only: request.outcome_only,
            snapshot_sent: false,
            ended: false,
            _gauge: GaugeGuard(watchers),
            _open_watch: open_watch,
            budget,
            unread: Reservation::default(),
        }
    }

    pub(crate) fn into_stream(self) -> BoxStream<'static, Result<WatchResponse, Status>> {
        Box::pin(stream::unfold(self, |mut watcher| async move {
            let item = watcher.next_within_budget().await?;
            watcher.ended |= item.is_err();
            Some((item, watcher))
        }))
    }

    /// Returns the next message once the budget has capacity for it. The stream calls this after the client has read
    /// the previous message.
    async fn next_within_budget(&mut self) -> Option<Result<WatchResponse, Status>> {
        self.unread = Reservation::default();
        let checkpoint = (self.cursor, self.snapshot_sent, self.ended);
        let item = self.next().await?;
        let (Ok(message), Some(budget)) = (&item, &self.budget) else { return Some(item) };
        let bytes = match budget.try_reserve(message) {
            Ok(unread) => {
                self.unread = unread;
                return Some(item);
            }
            Err(bytes) => bytes,
        };
        // While the watcher waits, it does not keep the message in memory; it reads the message again afterwards.
        drop(item);
        (self.cursor, self.snapshot_sent, self.ended) = checkpoint;
        tokio::select! {
            unread = budget.reserve(bytes) => self.unread = unread,
            status = self.topics.until_watches_end() => return Some(Err(status)),
        }
        self.next().await
    }

    async fn next(&mut self) -> Option<Result<WatchResponse, Status>> {
        if self.ended {
            return None;
        }
        if !self.snapshot_sent {
            self.snapshot_sent = true;
            return Some(self.first_message().await);
        }
        match self.next_events().await {
            Ok(events) if events.is_empty() => None,
            Ok(events) => Some(Ok(self.message(events))),
            Err(status) => Some(Err(status)),
        }
    }

    /// Returns the snapshot with the events that are available.
    async fn first_message(&mut self) -> Result<WatchResponse, Status> {
        if self.subscription.topic.snapshot().is_none() {
            // Events have arrived after a gap, so that the topic has no snapshot.
            let result = self.topics.catch_up(&self.subscription.topic).await;
            result.map_err(|error| store_status(&error))?;
        }
        let snapshot = self.subscription.topic.snapshot();
        if let Some(snapshot) = snapshot.as_ref().filter(|_| self.starts_at_snapshot) {
            let state = streamer_rpc::state_from_proto(snapshot.state);
            let ended = state.is_some_and(streamer_core::RequestState::is_terminal);
            let last_seq = snapshot.last_seq();
            self.cursor = if ended { last_seq.previous() } else { last_seq };
        }
        let events = self.read().await?.unwrap_or_default();
        Ok(WatchResponse { snapshot, ..self.message(events) })
    }

    fn message(&mut self, mut events: Vec<Event>) -> WatchResponse {
        if let Some(last) = events.last() {
            self.cursor = last.seq();
            self.ended = is_terminal(last);
        }
        for event in &mut events {
            encode_event(event, self.encoding);
        }
        WatchResponse { snapshot: None, events }
    }

    /// Waits for the next events and returns them; returns no events if no event will follow.
    async fn next_events(&mut self) -> Result<Vec<Event>, Status> {
        loop {
            if let Some(events) = self.read().await? {
                return Ok(events);
            }
            tokio::select! {
                changed = self.subscription.updates.changed() => {
                    changed.map_err(|_| Status::unavailable("the progress service is shutting down"))?;
                }
                status = self.topics.until_watches_end() => return Err(status),
            }
        }
    }

    /// Reads the next events to send. Returns `None` if no newer event exists yet, and no events if no event will
    /// follow.
    async fn read(&mut self) -> Result<Option<Vec<Event>>, Status> {
        if !self.outcome_only {
            return self.read_all().await;
        }
        loop {
            // Only the last event can be terminal.
            self.cursor = self.cursor.max(self.subscription.topic.last_seq().previous());
            let Some(mut events) = self.read_all().await? else { return Ok(None) };
            let Some(last) = events.pop() else { return Ok(Some(events)) };
            self.cursor = last.seq();
            if is_terminal(&last) {
                return Ok(Some(vec![last]));
            }
        }
    }

    async fn read_all(&mut self) -> Result<Option<Vec<Event>>, Status> {
        // Marked as seen before the read, so that an event that arrives in between wakes this watcher.
        self.subscription.updates.borrow_and_update();
        let topic = &self.subscription.topic;
        match topic.read_for_watcher(&mut self.position, self.cursor, MAX_EVENTS, MAX_BYTES) {
            Read::Events(events) => Ok(Some(events)),
            Read::UpToDate => Ok(None),
            Read::Ended => Ok(Some(Vec::new())),
            Read::InStore => {
                let page = self
                    .store
                    .read_events(topic.uid, self.cursor, MAX_EVENTS, MAX_BYTES)
                    .await
                    .map_err(|error| store_status(&error))?;
                self.topics.metrics().replayed.inc_by(page.events.len() as u64);
                if page.events.is_empty() {
                    // The request was deleted during the watch.
                    return Err(streamer_rpc::not_found(&topic.uid.to_string()));
                }
                Ok(Some(page.events))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use streamer_core::{Timestamp, Uid};
    use streamer_proto::common::v1::{Accepted, Progress, Request, Succeeded, event::Kind};
    use streamer_telemetry::Metrics;

    use super::*;
    use crate::metrics::ProgressMetrics;

    fn event(seq: i64, kind: Kind) -> Event {
        Event { seq, attempt: 1, time: None, kind: Some(kind) }
    }

    #[tokio::test]
    async fn an_outcome_only_watch_receives_only_the_terminal_event() {
        let data = tempfile::tempdir().unwrap();
        let store = streamer_store_sqlite::open(data.path()).unwrap();
        let metrics = ProgressMetrics::new(&Metrics::new());
        let topics = Arc::new(Topics::new(store.clone(), metrics, None, false));
        let uid = Uid::new(Timestamp::default());
        let accepted = event(1, Kind::Accepted(Accepted::default()));
        topics.create(uid, &Request { last_seq: 1, ..Request::default() }, &[accepted]);
        let request = WatchRequest { outcome_only: true, ..WatchRequest::default() };
        let subscription = topics.subscribe_loaded(uid).unwrap();
        let mut watch =
            Watcher::new(subscription, topics.clone(), store, &request, None, (None, None))
                .into_stream();
        let first = watch.next().await.unwrap().unwrap();
        assert!(first.snapshot.is_some() && first.events.is_empty(), "{first:?}");
        let progress = |seq| event(seq, Kind::Progress(Progress::default()));
        topics.push(uid, &[progress(2)]);
        let mut next = watch.next();
        assert!(futures_util::FutureExt::now_or_never(&mut next).is_none());
        topics.push(uid, &[progress(3), event(4, Kind::Succeeded(Succeeded::default()))]);
        let seqs: Vec<_> = next.await.unwrap().unwrap().events.iter().map(|e| e.seq).collect();
        assert_eq!(seqs, [4]);
        assert!(watch.next().await.is_none());
    }
}
