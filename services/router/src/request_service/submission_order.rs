//! Order of submissions that a client has pipelined: they are stored, and announced to processors, one after the other.
//!
//! The gateway names the submission before each one, if its response has not arrived. Both calls usually reach the same
//! router. The order is kept without waiting for a response, so that the store can commit the submissions together.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use streamer_core::Uid;
use tokio::{sync::watch, time::timeout};

/// Maximum time to wait for the arrival of a submission, which another router may have received, or rejected.
const ARRIVAL_TIMEOUT: Duration = Duration::from_millis(250);
/// Maximum time to wait for a submission that has arrived.
const STAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Number of submissions that are known to have ended.
const MAX_ENDED: usize = 4096;

/// What a submission has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// A later submission waits for it.
    Expected,
    /// The submission has arrived.
    Arrived,
    /// The store has received the request, and commits it before those that it receives later.
    Queued,
    /// A processor was notified, or the submission has failed.
    Ended,
}

/// Submissions in progress.
#[derive(Clone, Default)]
pub(crate) struct SubmissionOrder(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    stages: HashMap<Uid, watch::Sender<Stage>>,
    ended: HashSet<Uid>,
    /// The order in which the submissions in `ended` are forgotten.
    ended_order: VecDeque<Uid>,
}

/// A submission in progress. It ends when it is dropped.
pub(crate) struct Turn {
    order: SubmissionOrder,
    uid: Uid,
}

impl SubmissionOrder {
    /// Begins a submission.
    pub(crate) fn begin(&self, uid: Uid) -> Turn {
        self.advance(uid, Stage::Arrived);
        Turn { order: self.clone(), uid }
    }

    /// Waits until a submission has reached a stage. Returns whether it has.
    pub(crate) async fn wait(&self, uid: Uid, stage: Stage) -> bool {
        let Some(mut reached) = self.subscribe(uid) else { return true };
        // The result contains a read lock and is dropped immediately.
        let arrived = reached.wait_for(|reached| *reached >= Stage::Arrived);
        if timeout(ARRIVAL_TIMEOUT, arrived).await.is_err() {
            self.forget_expected(uid);
            return false;
        }
        let reached = reached.wait_for(|reached| *reached >= stage);
        timeout(STAGE_TIMEOUT, reached).await.is_ok()
    }

    /// Returns the stages of a submission; `None` if it has ended.
    fn subscribe(&self, uid: Uid) -> Option<watch::Receiver<Stage>> {
        let mut state = self.0.lock();
        if state.ended.contains(&uid) {
            return None;
        }
        let stages = state.stages.entry(uid);
        Some(stages.or_insert_with(|| watch::Sender::new(Stage::Expected)).subscribe())
    }

    fn advance(&self, uid: Uid, stage: Stage) {
        let mut state = self.0.lock();
        let stages = state.stages.entry(uid).or_insert_with(|| watch::Sender::new(stage));
        stages.send_if_modified(|reached| {
            let is_later = *reached < stage;
            *reached = stage.max(*reached);
            is_later
        });
    }

    fn end(&self, uid: Uid) {
        let mut state = self.0.lock();
        if let Some(stages) = state.stages.remove(&uid) {
            stages.send_replace(Stage::Ended);
        }
        if state.ended.insert(uid) {
            state.ended_order.push_back(uid);
        }
        if state.ended_order.len() > MAX_ENDED
            && let Some(oldest) = state.ended_order.pop_front()
        {
            state.ended.remove(&oldest);
        }
    }

    /// Forgets a submission that has not arrived.
    fn forget_expected(&self, uid: Uid) {
        let mut state = self.0.lock();
        if state.stages.get(&uid).is_some_and(|stages| *stages.borrow() == Stage::Expected) {
            state.stages.remove(&uid);
        }
    }
}

impl Turn {
    /// Records that the store has received the request.
    pub(crate) fn queued(&self) {
        self.order.advance(self.uid, Stage::Queued);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.order.end(self.uid);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;
    use streamer_core::Timestamp;
    use tokio::time::Instant;

    use super::*;

    fn uid(number: i64) -> Uid {
        Uid::new(Timestamp::from_millis(number))
    }

    #[tokio::test(start_paused = true)]
    async fn a_submission_waits_for_each_stage_of_the_one_before_it() {
        let order = SubmissionOrder::default();
        let first = uid(1);
        let mut waiting = Box::pin(order.wait(first, Stage::Queued));
        assert!(poll!(&mut waiting).is_pending(), "it has not arrived");
        let turn = order.begin(first);
        assert!(poll!(&mut waiting).is_pending());
        turn.queued();
        assert!(waiting.await);
        let mut waiting = Box::pin(order.wait(first, Stage::Ended));
        assert!(poll!(&mut waiting).is_pending());
        drop(turn);
        assert!(waiting.await);
        assert!(order.wait(first, Stage::Ended).await, "it has ended before");
        assert!(order.0.lock().stages.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_submission_that_never_arrives_delays_others_only_shortly() {
        let order = SubmissionOrder::default();
        let start = Instant::now();
        assert!(!order.wait(uid(1), Stage::Queued).await);
        assert_eq!(start.elapsed(), ARRIVAL_TIMEOUT);
        assert!(order.0.lock().stages.is_empty());
        let slow = uid(2);
        let _turn = order.begin(slow);
        assert!(!order.wait(slow, Stage::Queued).await);
        assert_eq!(start.elapsed(), ARRIVAL_TIMEOUT + STAGE_TIMEOUT);
        assert_eq!(order.0.lock().stages.len(), 1, "it may still arrive");
    }

    #[tokio::test]
    async fn the_number_of_ended_submissions_is_limited() {
        let order = SubmissionOrder::default();
        let uids: Vec<Uid> = (0..=4096).map(uid).collect();
        uids.iter().for_each(|uid| drop(order.begin(*uid)));
        let state = order.0.lock();
        assert_eq!((state.ended.len(), state.ended_order.len()), (MAX_ENDED, MAX_ENDED));
        assert!(!state.ended.contains(&uids[0]) && state.ended.contains(&uids[1]));
    }
}
