//! Where a queued request stands, and when it should start.

use std::time::Duration;

use streamer_core::{RequestState, Timestamp};
use streamer_proto::{common::v1::QueuePosition, internal::v1::WakeResponse, timestamp};
use streamer_store::{QueueAhead, RequestRecord, Store, StoreError};

/// Counted of the tenant's own requests, and of all others, at most, when somebody asks.
pub(crate) const MAX_AHEAD: usize = 1000;
/// As many when a request is acknowledged: every submission pays for it.
pub(crate) const MAX_AHEAD_OF_NEW: usize = 100;

/// The place of a request in the queue; `None` unless it is queued and due.
pub(crate) async fn position(
    store: &dyn Store,
    record: &RequestRecord,
    outlook: Option<&WakeResponse>,
    now: Timestamp,
    max_ahead: usize,
) -> Result<Option<QueuePosition>, StoreError> {
    if record.state != RequestState::Queued || record.not_before > now {
        return Ok(None);
    }
    let ahead = match outlook {
        Some(outlook) if outlook.started => QueueAhead::default(),
        _ => store.queue_ahead(record.clone(), now, max_ahead).await?,
    };
    Ok(Some(describe(ahead, outlook, now, max_ahead)))
}

fn describe(
    ahead: QueueAhead,
    outlook: Option<&WakeResponse>,
    now: Timestamp,
    max_ahead: usize,
) -> QueuePosition {
    let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX).saturating_add(1);
    let start =
        outlook.and_then(|outlook| wait(ahead, outlook, max_ahead)).map(|wait| now.plus(wait));
    QueuePosition {
        earliest: number(ahead.own),
        latest: number(ahead.own + ahead.others),
        estimated_start_time: start.map(|start| timestamp(start.as_millis())),
    }
}

/// Half of the others' requests come first, and every slot takes its share.
fn wait(ahead: QueueAhead, outlook: &WakeResponse, max_ahead: usize) -> Option<Duration> {
    if outlook.started {
        return Some(Duration::ZERO);
    }
    let counted = u64::try_from(max_ahead).unwrap_or(u64::MAX);
    let slots = u32::try_from(outlook.slots).ok().filter(|slots| *slots > 0)?;
    if ahead.own >= counted || ahead.others >= counted {
        return None;
    }
    let run = Duration::from_millis(u64::try_from(outlook.usual_run_ms?).unwrap_or(0));
    // All slots are taken: on average half a run is left, and then those before it.
    let before = ahead.own as f64 + ahead.others as f64 / 2.0;
    Some(run.mul_f64(0.5 + before / f64::from(slots)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outlook(started: bool, slots: i32, usual_run_ms: Option<i64>) -> WakeResponse {
        WakeResponse { started, slots, usual_run_ms }
    }

    #[test]
    fn the_place_is_a_range_and_the_start_follows_from_slots_and_durations() {
        let now = Timestamp::from_millis(10_000);
        let place = describe(
            QueueAhead { own: 3, others: 10 },
            Some(&outlook(false, 4, Some(1000))),
            now,
            MAX_AHEAD,
        );
        assert_eq!((place.earliest, place.latest), (4, 14));
        assert_eq!(place.estimated_start_time, Some(timestamp(12_500)));
        let first = describe(QueueAhead::default(), Some(&outlook(true, 4, None)), now, MAX_AHEAD);
        assert_eq!((first.earliest, first.latest), (1, 1));
        assert_eq!(first.estimated_start_time, Some(timestamp(10_000)));
    }

    #[test]
    fn there_is_no_estimate_without_measurements_slots_or_a_full_count() {
        let some = QueueAhead { own: 1, others: 1 };
        for (ahead, outlook) in [
            (some, outlook(false, 4, None)),
            (some, outlook(false, 0, Some(5))),
            (QueueAhead { own: 1000, others: 0 }, outlook(false, 4, Some(5))),
        ] {
            assert_eq!(wait(ahead, &outlook, MAX_AHEAD), None, "{ahead:?} {outlook:?}");
        }
    }
}
