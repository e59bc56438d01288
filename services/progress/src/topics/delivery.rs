//! Counts the watchers of a topic that have its newest event. Performs no I/O.

use std::time::Duration;

use streamer_core::Seq;
use tokio::time::Instant;

/// Delivery state of the watchers of one topic that have been up to date at least once.
#[derive(Debug, Default)]
pub(crate) struct Delivery {
    newest_seq: Seq,
    newest_at: Option<Instant>,
    /// Number of watchers that have the newest event.
    up_to_date: usize,
    /// Number of watchers that were up to date before and do not have the newest event.
    behind: usize,
}

/// State of one watcher in a [`Delivery`]: `seq` of the newest event when the watcher was last up to date; `None`
/// during the initial replay of the watcher.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Position(Option<Seq>);

impl Delivery {
    /// Records that the topic has events up to `seq`.
    pub(crate) fn record_newest(&mut self, seq: Seq, now: Instant) {
        if seq > self.newest_seq {
            self.newest_seq = seq;
            self.newest_at = Some(now);
            self.behind += std::mem::take(&mut self.up_to_date);
        }
    }

    /// Records that a watcher has all events up to `seq`.
    pub(crate) fn record_delivered(&mut self, position: &mut Position, seq: Seq) {
        if seq < self.newest_seq || position.0 == Some(self.newest_seq) {
            return;
        }
        if position.0.is_some() {
            self.behind -= 1;
        }
        self.up_to_date += 1;
        position.0 = Some(self.newest_seq);
    }

    /// Removes a watcher.
    pub(crate) fn remove(&mut self, position: Position) {
        match position.0 {
            None => {}
            Some(seq) if seq == self.newest_seq => self.up_to_date -= 1,
            Some(_) => self.behind -= 1,
        }
    }

    /// Returns the time for which the newest event has not reached every watcher; zero if all watchers have it.
    pub(crate) fn undelivered_for(&self, now: Instant) -> Duration {
        match self.newest_at {
            Some(at) if self.behind > 0 => now.saturating_duration_since(at),
            _ => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_event_is_undelivered_from_its_arrival_until_every_watcher_has_it() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut delivery = Delivery::default();
        let (mut one, mut other, mut replaying) = Default::default();
        delivery.record_newest(Seq::from(1), start);
        delivery.record_delivered(&mut one, Seq::from(1));
        delivery.record_delivered(&mut other, Seq::from(1));
        delivery.record_delivered(&mut replaying, Seq::from(0));
        assert_eq!(
            delivery.undelivered_for(at(9)),
            Duration::ZERO,
            "a replay does not count as delay"
        );

        delivery.record_newest(Seq::from(3), at(10));
        assert_eq!(delivery.undelivered_for(at(12)), Duration::from_secs(2));
        delivery.record_delivered(&mut one, Seq::from(2));
        delivery.record_delivered(&mut one, Seq::from(3));
        delivery.record_delivered(&mut one, Seq::from(3));
        assert_eq!(delivery.undelivered_for(at(13)), Duration::from_secs(3));
        delivery.remove(other);
        assert_eq!(delivery.undelivered_for(at(14)), Duration::ZERO);

        delivery.record_delivered(&mut replaying, Seq::from(3));
        delivery.remove(one);
        delivery.record_newest(Seq::from(4), at(20));
        assert_eq!(delivery.undelivered_for(at(21)), Duration::from_secs(1));
        delivery.remove(replaying);
        assert_eq!((delivery.up_to_date, delivery.behind), (0, 0));
    }
}
