//! Events of a topic that were found in the store before their announcement: a pure count.

use std::time::Duration;

use tokio::time::Instant;

/// How long an announcement may come after its event was found in the store. A slow store, or a busy
/// machine, can hold up the answer to an append long after readers see what it has stored; an
/// announcement that takes longer than this is lost.
const GRACE: Duration = Duration::from_secs(5);

/// The latest gap between what was announced and what is stored.
#[derive(Debug, Default)]
pub(crate) struct Unannounced {
    /// Events after this one were found, up to `last_seq`.
    after_seq: i64,
    last_seq: i64,
    /// Events of the gap whose announcement has not come.
    pending: i64,
    /// When the gap was found.
    since: Option<Instant>,
}

impl Unannounced {
    /// Events after `known`, up to `stored`, were found in the store. Returns how many.
    pub(crate) fn note_found(&mut self, known: i64, stored: i64, now: Instant) -> i64 {
        if self.pending == 0 {
            self.after_seq = known;
            self.since = Some(now);
        }
        self.last_seq = stored;
        self.pending += stored - known;
        stored - known
    }

    /// Events from `first` to `last` were announced. Returns how many of them were pending.
    pub(crate) fn note_announced(&mut self, first: i64, last: i64) -> i64 {
        let announced = last.min(self.last_seq) - first.max(self.after_seq + 1) + 1;
        let confirmed = announced.clamp(0, self.pending);
        self.pending -= confirmed;
        if first <= self.after_seq + 1 {
            // A repeat confirms nothing more.
            self.after_seq = self.after_seq.max(last.min(self.last_seq));
        }
        confirmed
    }

    /// Returns how many were pending if their time is over, and forgets them.
    pub(crate) fn take_lost(&mut self, now: Instant) -> i64 {
        match self.since {
            Some(since) if now.saturating_duration_since(since) >= GRACE => {
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
    fn an_announcement_that_comes_late_is_not_lost() {
        let now = Instant::now();
        let mut unannounced = Unannounced::default();
        assert_eq!(unannounced.note_announced(1, 9), 0, "nothing was found");
        assert_eq!(unannounced.note_found(3, 6, now), 3);
        assert_eq!(unannounced.note_announced(1, 3), 0);
        assert_eq!(unannounced.note_announced(2, 5), 2);
        assert_eq!(unannounced.note_announced(2, 5), 0, "a repeat");
        assert!(unannounced.is_pending());
        assert_eq!(unannounced.note_announced(6, 9), 1);
        assert!(!unannounced.is_pending());
        assert_eq!(unannounced.take_lost(now + 2 * GRACE), 0);
    }

    #[test]
    fn an_announcement_that_does_not_come_in_time_is_lost() {
        let now = Instant::now();
        let mut unannounced = Unannounced::default();
        unannounced.note_found(3, 6, now);
        unannounced.note_announced(5, 5);
        assert_eq!(unannounced.note_found(6, 8, now + GRACE / 2), 2);
        assert_eq!(unannounced.take_lost(now + GRACE / 2), 0);
        assert_eq!(unannounced.take_lost(now + GRACE), 4);
        assert_eq!(unannounced.take_lost(now + 2 * GRACE), 0, "they count once");
        assert_eq!(unannounced.note_announced(4, 8), 0);
    }
}
