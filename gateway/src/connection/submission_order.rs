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

impl SubmissionOrder {
    /// Returns the UID of a new submission, and that of the unanswered submission before it, if it has the same action
    /// and priority.
    pub(crate) fn next(
        &mut self,
        action: &str,
        priority: i32,
        waits: bool,
        now: Timestamp,
    ) -> (Uid, Option<Uid>) {
        let uid = self.last_uid.map_or_else(|| Uid::new(now), |last| last.next(now));
        self.last_uid = Some(uid);
        if self.sync_action.as_deref() == Some(action) {
            return (uid, None);
        }
        let before = self.unanswered.take();
        let before = before.filter(|before| before.action == action && before.priority == priority);
        self.unanswered = Some(Submission { uid, action: action.to_owned(), priority, waits });
        (uid, before.map(|before| before.uid))
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
        let (first, before) = order.next("a", 0, false, NOW);
        assert_eq!(before, None);
        let (second, before) = order.next("a", 0, false, NOW);
        assert_eq!(before, Some(first));
        assert!(first < second);
        order.answered(first, false);
        let (third, before) = order.next("a", 0, false, Timestamp::default());
        assert_eq!(before, Some(second), "its response has not arrived");
        assert!(second < third, "the clock was set back");
        order.answered(third, false);
        assert_eq!(order.next("a", 0, false, NOW).1, None);
    }

    #[test]
    fn submissions_with_another_action_or_priority_have_no_order() {
        let mut order = SubmissionOrder::default();
        order.next("a", 0, false, NOW);
        assert_eq!(order.next("b", 0, false, NOW).1, None);
        assert_eq!(order.next("b", 1, false, NOW).1, None);
    }

    #[test]
    fn sync_actions_have_no_order() {
        let mut order = SubmissionOrder::default();
        let (first, _) = order.next("a", 0, false, NOW);
        order.answered(first, true);
        let (second, _) = order.next("a", 0, false, NOW);
        assert_eq!(order.next("a", 0, false, NOW).1, None);
        order.answered(second, false);
        let (third, _) = order.next("a", 0, false, NOW);
        assert_eq!(order.next("a", 0, false, NOW).1, Some(third), "the action is async now");
        order.answered(third, true);
        let (other, _) = order.next("b", 0, true, NOW);
        order.answered(other, true);
        let (other, _) = order.next("b", 0, false, NOW);
        assert_eq!(order.next("b", 0, false, NOW).1, Some(other), "the caller waited");
    }
}
