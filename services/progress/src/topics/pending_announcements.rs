//! Counts the events of a topic that were found in the store before their announcement. Performs no I/O.

use std::time::Duration;

use streamer_core::Seq;
use tokio::time::Instant;

/// Maximum delay of an announcement after its event was found in the store. A slow store or a busy
/// machine can delay the response to an append long after readers see its events. A longer delay counts
/// as a lost announcement.
const ANNOUNCEMENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Latest gap between the announced and the stored events.
#[derive(Debug, Default)]
pub(crate) struct PendingAnnouncements {
    /// `seq` of the last event before the gap.
    after_seq: Seq,
    /// `seq` of the last event in the gap.
    last_seq: Seq,
    /// Number of events in the gap that have not been announced.
    pending: i64,
    /// Time at which the gap was found.
    since: Option<Instant>,
}

impl PendingAnnouncements {
    /// Records that the events after `known`, up to `stored`, were found in the store. Returns their number.
    pub(crate) fn record_found(&mut self, known: Seq, stored: Seq, now: Instant) -> i64 {
        if self.pending == 0 {
            self.after_seq = known;
            self.since = Some(now);
        }
        self.last_seq = stored;
        let found = stored.events_since(known);
        self.pending += found;
        found
    }

    /// Records that the events from `first` to `last` were announced. Returns the number of these events that were
    /// pending.
    pub(crate) fn record_announced(&mut self, first: Seq, last: Seq) -> i64 {
        let first_pending = first.max(self.after_seq.next());
        let announced = last.min(self.last_seq).events_since(first_pending) + 1;
        let confirmed = announced.clamp(0, self.pending);
        self.pending -= confirmed;
        if first <= self.after_seq.next() {
            // A repeated announcement must not confirm further events.
            self.after_seq = self.after_seq.max(last.min(self.last_seq));
        }
        confirmed
    }

    /// Returns and resets the number of pending events if they are overdue; otherwise returns 0.
    pub(crate) fn take_lost(&mut self, now: Instant) -> i64 {
        match self.since {
            Some(since) if now.saturating_duration_since(since) >= ANNOUNCEMENT_TIMEOUT => {
                std::mem::take(self).pending
            }
            _ => 0,
        }
    }

    pub(crate) fn is_pending(&self) -> bool {
        self.pending > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(pending: &mut PendingAnnouncements, known: u32, stored: u32, now: Instant) -> i64 {
        pending.record_found(known.into(), stored.into(), now)
    }

    fn announced(pending: &mut PendingAnnouncements, first: u32, last: u32) -> i64 {
        pending.record_announced(first.into(), last.into())
    }

    #[test]
    fn a_delayed_announcement_is_not_lost() {
        let now = Instant::now();
        let mut pending = PendingAnnouncements::default();
        assert_eq!(announced(&mut pending, 1, 9), 0, "no event was found in the store");
        assert_eq!(found(&mut pending, 3, 6, now), 3);
        assert_eq!(announced(&mut pending, 1, 3), 0);
        assert_eq!(announced(&mut pending, 2, 5), 2);
        assert_eq!(announced(&mut pending, 2, 5), 0, "a repeated announcement");
        assert!(pending.is_pending());
        assert_eq!(announced(&mut pending, 6, 9), 1);
        assert!(!pending.is_pending());
        assert_eq!(pending.take_lost(now + 2 * ANNOUNCEMENT_TIMEOUT), 0);
    }

    #[test]
    fn an_overdue_announcement_is_lost() {
        let now = Instant::now();
        let mut pending = PendingAnnouncements::default();
        found(&mut pending, 3, 6, now);
        announced(&mut pending, 5, 5);
        assert_eq!(found(&mut pending, 6, 8, now + ANNOUNCEMENT_TIMEOUT / 2), 2);
        assert_eq!(pending.take_lost(now + ANNOUNCEMENT_TIMEOUT / 2), 0);
        assert_eq!(pending.take_lost(now + ANNOUNCEMENT_TIMEOUT), 4);
        assert_eq!(pending.take_lost(now + 2 * ANNOUNCEMENT_TIMEOUT), 0, "lost events count once");
        assert_eq!(announced(&mut pending, 4, 8), 0);
    }
}
