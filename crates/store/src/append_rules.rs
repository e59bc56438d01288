//! Decides whether a writer may append events to a log. Both engines use these rules, so that their decisions agree.

use streamer_core::{AttemptNumber, RequestState, Seq, Timestamp};

use crate::{AppendOutcome, Writer};

/// State of a request that determines whether an append is allowed.
#[derive(Clone, Copy, Debug)]
pub struct LogHead {
    /// State of the request.
    pub state: RequestState,
    /// Number of the latest attempt; 0 before the first attempt.
    pub attempt: AttemptNumber,
    /// `seq` of the latest event.
    pub last_seq: Seq,
    /// Time at which the lease expires; used only for [`Writer::ExpiredLease`].
    pub lease_until: Timestamp,
}

impl LogHead {
    /// Returns whether events up to `last_seq` may already be stored. If so, the engine compares them with the log: an
    /// append of events that the log already contains is a repeated call and counts as applied.
    #[must_use]
    pub fn may_contain(&self, last_seq: Option<Seq>) -> bool {
        last_seq.is_some_and(|last_seq| last_seq <= self.last_seq)
    }

    /// Returns [`AppendOutcome::Fenced`] if `writer` may not append, at the time `now`, events that begin with
    /// `first_seq`. If `first_seq` is `None`, the append contains only a checkpoint.
    #[must_use]
    pub fn fence(
        &self,
        writer: Writer,
        first_seq: Option<Seq>,
        now: Timestamp,
    ) -> Option<AppendOutcome> {
        let (state, attempt) = writer.required();
        let is_expired = !matches!(writer, Writer::ExpiredLease(_)) || self.lease_until <= now;
        let follows = first_seq.is_none_or(|first_seq| first_seq == self.last_seq.next());
        if self.state == state && self.attempt == attempt && is_expired && follows {
            return None;
        }
        Some(AppendOutcome::Fenced {
            state: self.state,
            attempt: self.attempt,
            last_seq: self.last_seq,
        })
    }
}

impl Writer {
    /// Returns the state and the attempt number that the request must have for an append by this writer.
    #[must_use]
    pub fn required(&self) -> (RequestState, AttemptNumber) {
        match *self {
            Self::Attempt(attempt) | Self::ExpiredLease(attempt) => {
                (RequestState::Running, attempt)
            }
            Self::Queued(attempt) => (RequestState::Queued, attempt),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(state: RequestState, attempt: u16) -> LogHead {
        let (attempt, last_seq) = (AttemptNumber::from(attempt), Seq::from(7));
        LogHead { state, attempt, last_seq, lease_until: Timestamp::from_millis(100) }
    }

    fn attempt(number: u16) -> Writer {
        Writer::Attempt(number.into())
    }

    fn queued(number: u16) -> Writer {
        Writer::Queued(number.into())
    }

    fn expired(number: u16) -> Writer {
        Writer::ExpiredLease(number.into())
    }

    fn is_allowed(head: LogHead, writer: Writer, first_seq: Option<u32>, now: i64) -> bool {
        head.fence(writer, first_seq.map(Seq::from), Timestamp::from_millis(now)).is_none()
    }

    #[test]
    fn only_the_current_attempt_of_a_running_request_appends() {
        let running = head(RequestState::Running, 2);
        assert!(is_allowed(running, attempt(2), Some(8), 0));
        assert!(!is_allowed(running, attempt(1), Some(8), 0));
        assert!(!is_allowed(running, attempt(3), Some(8), 0));
        assert!(!is_allowed(running, queued(2), Some(8), 0));
        let others = RequestState::ALL.iter().copied();
        for state in others.filter(|state| *state != RequestState::Running) {
            assert!(!is_allowed(head(state, 2), attempt(2), Some(8), 0), "{state:?}");
        }
    }

    #[test]
    fn a_queued_request_is_appended_to_by_its_attempt_number() {
        assert!(is_allowed(head(RequestState::Queued, 1), queued(1), Some(8), 0));
        assert!(!is_allowed(head(RequestState::Queued, 2), queued(1), Some(8), 0));
        assert!(!is_allowed(head(RequestState::Cancelled, 1), queued(1), Some(8), 0));
    }

    #[test]
    fn an_expired_lease_fences_its_attempt_from_the_time_of_expiry_on() {
        let running = head(RequestState::Running, 1);
        assert!(!is_allowed(running, expired(1), Some(8), 99));
        assert!(is_allowed(running, expired(1), Some(8), 100));
        assert!(!is_allowed(running, expired(2), Some(8), 100));
    }

    #[test]
    fn events_follow_the_log_without_gap_or_overlap() {
        let running = head(RequestState::Running, 1);
        for (first_seq, is_right) in
            [(Some(8), true), (None, true), (Some(7), false), (Some(9), false)]
        {
            assert_eq!(is_allowed(running, attempt(1), first_seq, 0), is_right, "{first_seq:?}");
        }
        let fenced = running.fence(attempt(1), Some(Seq::from(9)), Timestamp::default());
        let expected = AppendOutcome::Fenced {
            state: RequestState::Running,
            attempt: AttemptNumber::FIRST,
            last_seq: Seq::from(7),
        };
        assert_eq!(fenced, Some(expected));
    }

    #[test]
    fn events_up_to_the_head_may_be_stored() {
        let running = head(RequestState::Running, 1);
        let may_contain = |last_seq: u32| running.may_contain(Some(last_seq.into()));
        assert!(may_contain(7) && may_contain(1));
        assert!(!may_contain(8) && !running.may_contain(None));
    }
}
