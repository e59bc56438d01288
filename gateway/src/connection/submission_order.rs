//! Order of the submissions of one connection.

use streamer_core::{Timestamp, Uid};

/// Assigns increasing UIDs, and finds the submission that a pipelined one must follow.
#[derive(Default)]
pub(crate) struct SubmissionOrder {
    last_uid: Option<Uid>,
    /// Latest submission, until its response arrives.
    unanswered: Option<Submission>,
    /// Latest action whose response was its result. The requests of sync actions are not queued, and have no order.
    sync_action: Option<String>,
}

struct Submission {
    uid: Uid,
    action: String,
    priority: i32,
    /// Whether the caller waits for the outcome, so that also the response to an async submission may contain it.
    waits: bool,
}

/// UID of a submission, and its place in the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) uid: Uid,
    /// Whether later submissions may have to follow this one.
    pub(crate) is_ordered: bool,
    /// The unanswered submission before this one, if it has the same action and priority.
    pub(crate) after: Option<Uid>,
}

impl SubmissionOrder {
    /// Returns the place of a new submission.
    pub(crate) fn next(
        &mut self,
        action: &str,
        priority: i32,
        waits: bool,
        now: Timestamp,
    ) -> Place {
        let uid = self.last_uid.map_or_else(|| Uid::new(now), |last| last.next(now));
        self.last_uid = Some(uid);
        if self.sync_action.as_deref() == Some(action) {
            return Place { uid, is_ordered: false, after: None };
        }
        let before = self.unanswered.take();
        let before = before.filter(|before| before.action == action && before.priority == priority);
        self.unanswered = Some(Submission { uid, action: action.to_owned(), priority, waits });
        Place { uid, is_ordered: true, after: before.map(|before| before.uid) }
    }

    /// Records the response to a submission. `has_result` states whether it contained the outcome.
    pub(crate) fn answered(&mut self, uid: Uid, has_result: bool) {
        let Some(submission) = self.unanswered.take_if(|submission| submission.uid == uid) else {
            // The action may have become async.
            if !has_result {
                self.sync_action = None;
            }
            return;
        };
        if has_result && !submission.waits {
            self.sync_action = Some(submission.action);
        } else if self.sync_action.as_ref() == Some(&submission.action) {
            self.sync_action = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1000);

    #[test]
    fn a_pipelined_submission_follows_the_one_before_it() {
        let mut order = SubmissionOrder::default();
        let Place { uid: first, after: before, .. } = order.next("a", 0, false, NOW);
        assert_eq!(before, None);
        let Place { uid: second, after: before, .. } = order.next("a", 0, false, NOW);
        assert_eq!(before, Some(first));
        assert!(first < second);
        order.answered(first, false);
        let Place { uid: third, after: before, .. } =
            order.next("a", 0, false, Timestamp::default());
        assert_eq!(before, Some(second), "its response has not arrived");
        assert!(second < third, "the clock was set back");
        order.answered(third, false);
        assert_eq!(order.next("a", 0, false, NOW).after, None);
    }

    #[test]
    fn submissions_with_another_action_or_priority_have_no_order() {
        let mut order = SubmissionOrder::default();
        order.next("a", 0, false, NOW);
        assert_eq!(order.next("b", 0, false, NOW).after, None);
        assert_eq!(order.next("b", 1, false, NOW).after, None);
    }

    #[test]
    fn sync_actions_have_no_order() {
        let mut order = SubmissionOrder::default();
        let first = order.next("a", 0, false, NOW).uid;
        order.answered(first, true);
        let second = order.next("a", 0, false, NOW).uid;
        let third = order.next("a", 0, false, NOW);
        assert_eq!((third.is_ordered, third.after), (false, None));
        order.answered(second, false);
        let third = order.next("a", 0, false, NOW).uid;
        assert_eq!(order.next("a", 0, false, NOW).after, Some(third), "the action is async now");
        order.answered(third, true);
        let other = order.next("b", 0, true, NOW).uid;
        order.answered(other, true);
        let other = order.next("b", 0, false, NOW).uid;
        assert_eq!(order.next("b", 0, false, NOW).after, Some(other), "the caller waited");
    }
}
