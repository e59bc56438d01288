//! Position of a queued request, and its estimated start time.

use std::time::Duration;

use streamer_core::{RequestState, Timestamp, saturate};
use streamer_proto::{common::v1::QueuePosition, internal::v1::NotifyQueuedResponse, timestamp};
use streamer_store::{QueueAhead, RequestRecord, Store, StoreError};

/// Maximum number of preceding requests that a query counts, separately for the same tenant and all other tenants.
pub(crate) const MAX_AHEAD: usize = 1000;
/// Maximum number of preceding requests that an acknowledgement counts. It is lower than [`MAX_AHEAD`], because every
/// submission computes a position.
pub(crate) const MAX_AHEAD_OF_NEW: usize = 100;

/// Returns the queue position of a request; `None` unless the request is queued and due.
pub(crate) async fn compute(
    store: &dyn Store,
    record: &RequestRecord,
    estimate: Option<&NotifyQueuedResponse>,
    now: Timestamp,
    max_ahead: usize,
) -> Result<Option<QueuePosition>, StoreError> {
    if record.state != RequestState::Queued || record.not_before > now {
        return Ok(None);
    }
    let ahead = match estimate {
        Some(estimate) if estimate.started => QueueAhead::default(),
        _ => store.queue_ahead(record.clone(), max_ahead).await?,
    };
    Ok(Some(to_proto(ahead, estimate, now, max_ahead)))
}

fn to_proto(
    ahead: QueueAhead,
    estimate: Option<&NotifyQueuedResponse>,
    now: Timestamp,
    max_ahead: usize,
) -> QueuePosition {
    let number = |count: u64| saturate::to_i64(count).saturating_add(1);
    let wait = estimate.and_then(|estimate| estimate_wait(ahead, estimate, max_ahead));
    let start = wait.map(|wait| now.plus(wait));
    QueuePosition {
        earliest: number(ahead.own),
        latest: number(ahead.own + ahead.others),
        estimated_start_time: start.map(|start| timestamp(start.as_millis())),
    }
}

/// Estimates the wait, assuming that half of the other tenants' requests start first and that the work is
/// divided equally among the slots.
fn estimate_wait(
    ahead: QueueAhead,
    estimate: &NotifyQueuedResponse,
    max_ahead: usize,
) -> Option<Duration> {
    if estimate.started {
        return Some(Duration::ZERO);
    }
    let counted = max_ahead as u64;
    let slots = u32::try_from(estimate.slots).ok().filter(|slots| *slots > 0)?;
    if ahead.own >= counted || ahead.others >= counted {
        return None;
    }
    let mean_run = saturate::from_millis(estimate.mean_run_ms?);
    // All slots are occupied: on average, half a run remains, followed by the preceding requests.
    let before = ahead.own as f64 + ahead.others as f64 / 2.0;
    Some(mean_run.mul_f64(0.5 + before / f64::from(slots)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(started: bool, slots: i32, mean_run_ms: Option<i64>) -> NotifyQueuedResponse {
        NotifyQueuedResponse { started, slots, mean_run_ms }
    }

    #[test]
    fn position_is_a_range_and_start_time_depends_on_slots_and_run_duration() {
        let now = Timestamp::from_millis(10_000);
        let position = to_proto(
            QueueAhead { own: 3, others: 10 },
            Some(&estimate(false, 4, Some(1000))),
            now,
            MAX_AHEAD,
        );
        assert_eq!((position.earliest, position.latest), (4, 14));
        assert_eq!(position.estimated_start_time, Some(timestamp(12_500)));
        let first = to_proto(QueueAhead::default(), Some(&estimate(true, 4, None)), now, MAX_AHEAD);
        assert_eq!((first.earliest, first.latest), (1, 1));
        assert_eq!(first.estimated_start_time, Some(timestamp(10_000)));
    }

    #[test]
    fn start_time_is_absent_without_measurements_slots_or_a_complete_count() {
        let some = QueueAhead { own: 1, others: 1 };
        for (ahead, estimate) in [
            (some, estimate(false, 4, None)),
            (some, estimate(false, 0, Some(5))),
            (QueueAhead { own: 1000, others: 0 }, estimate(false, 4, Some(5))),
        ] {
            assert_eq!(estimate_wait(ahead, &estimate, MAX_AHEAD), None, "{ahead:?} {estimate:?}");
        }
    }
}
