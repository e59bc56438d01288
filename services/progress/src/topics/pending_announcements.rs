//! Counts the events of a topic that were found in the store before their announcement. Performs no I/O.

use std::time::Duration;

use tokio::time::Instant;

/// Maximum delay of an announcement after its event was found in the store. A slow store or a busy
/// machine can delay the response to an append long after readers see its events. A longer delay counts
/// as a lost announcement.
const ANNOUNCEMENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Latest gap between the announced and the stored events.
#[derive(Debug, Default)]
pub(crate) struct PendingAnnouncements {
    /// `seq` of the last event before the gap.
    after_seq: i64,
    /// `seq` of the last event in the gap.
    last_seq: i64,
    /// Number of events in the gap that have not been announced.
    pending: i64,
    /// Time at which the gap was found.
    since: Option<Instant>,
}

impl PendingAnnouncements {
    /// Records that the events after `known`, up to `stored`, were found in the store. Returns their number.
    pub(crate) fn record_found(&mut self, known: i64, stored: i64, now: Instant) -> i64 {
        if self.pending == 0 {
            self.after_seq = known;
            self.since = Some(now);
        }
        self.last_seq = stored;
        self.pending += stored - known;
        stored - known
    }

    /// Records that the events from `first` to `last` were announced. Returns the number of these events that were
    /// pending.
    pub(crate) fn record_announced(&mut self, first: i64, last: i64) -> i64 {
        let announced = last.min(self.last_seq) - first.max(self.after_seq + 1) + 1;
        let confirmed = announced.clamp(0, self.pending);
        self.pending -= confirmed;
        if first <= self.after_seq + 1 {
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

    #[test]
    fn a_delayed_announcement_is_not_lost() {
        let now = Instant::now();
        let mut pending = PendingAnnouncements::default();
        assert_eq!(pending.record_announced(1, 9), 0, "no event was found in the store");
        assert_eq!(pending.record_found(3, 6, now), 3);
        assert_eq!(pending.record_announced(1, 3), 0);
        assert_eq!(pending.record_announced(2, 5), 2);
        assert_eq!(pending.record_announced(2, 5), 0, "a repeated announcement");
        assert!(pending.is_pending());
        assert_eq!(pending.record_announced(6, 9), 1);
        assert!(!pending.is_pending());
        assert_eq!(pending.take_lost(now + 2 * ANNOUNCEMENT_TIMEOUT), 0);
    }

    #[test]
    fn an_overdue_announcement_is_lost() {
        let now = Instant::now();
        let mut pending = PendingAnnouncements::default();
        pending.record_found(3, 6, now);
        pending.record_announced(5, 5);
        assert_eq!(pending.record_found(6, 8, now + ANNOUNCEMENT_TIMEOUT / 2), 2);
        assert_eq!(pending.take_lost(now + ANNOUNCEMENT_TIMEOUT / 2), 0);
        assert_eq!(pending.take_lost(now + ANNOUNCEMENT_TIMEOUT), 4);
        assert_eq!(pending.take_lost(now + 2 * ANNOUNCEMENT_TIMEOUT), 0, "lost events count once");
        assert_eq!(pending.record_announced(4, 8), 0);
    }
}
