//! Aggregation of a user's requests in a period.

use std::collections::BTreeMap;

use streamer_core::RequestState;
use streamer_handler::RequestSummary;

use crate::{
    date::Date,
    statistics::{Moments, quantile},
};

/// Aggregated requests of a period.
pub(super) struct Usage {
    /// First day of the period.
    pub(super) from: Date,
    /// Last day of the period, inclusive.
    pub(super) to: Date,
    /// Totals of all requests.
    pub(super) total: Totals,
    /// Totals per action.
    pub(super) by_action: BTreeMap<String, Totals>,
    /// Number of requests accepted on each day of the period.
    pub(super) per_day: Vec<(Date, u64)>,
}

/// Totals of a set of requests.
#[derive(Default)]
pub(super) struct Totals {
    by_state: BTreeMap<RequestState, u64>,
    /// Number of attempts of all requests.
    pub(super) attempts: u64,
    durations: Durations,
}

#[derive(Default)]
struct Durations {
    moments: Moments,
    /// Durations in milliseconds, in ascending order after all are added.
    sorted: Vec<f64>,
}

impl Usage {
    /// Aggregates requests that were accepted from the first to the last day.
    pub(super) fn of(requests: &[RequestSummary], from: Date, to: Date) -> Self {
        let days = to.since(from) + 1;
        let mut usage = Self {
            from,
            to,
            total: Totals::default(),
            by_action: BTreeMap::new(),
            per_day: (0..days).map(|days| (from.plus(days), 0)).collect(),
        };
        for request in requests {
            usage.total.add(request);
            usage.by_action.entry(request.action.clone()).or_default().add(request);
            let day = usize::try_from(Date::of(request.create_time).since(from));
            if let Some((_, count)) = day.ok().and_then(|day| usage.per_day.get_mut(day)) {
                *count += 1;
            }
        }
        for totals in usage.by_action.values_mut().chain([&mut usage.total]) {
            totals.durations.sorted.sort_unstable_by(f64::total_cmp);
        }
        usage
    }
}

impl Totals {
    fn add(&mut self, request: &RequestSummary) {
        *self.by_state.entry(request.state).or_default() += 1;
        self.attempts += u64::from(request.attempts);
        if let Some(finish_time) = request.finish_time {
            let millis = finish_time.since(request.create_time).as_secs_f64() * 1000.0;
            self.durations.moments.add(millis);
            self.durations.sorted.push(millis);
        }
    }

    /// Returns the number of requests.
    pub(super) fn requests(&self) -> u64 {
        self.by_state.values().sum()
    }

    /// Returns the number of requests in the given state.
    pub(super) fn in_state(&self, state: RequestState) -> u64 {
        self.by_state.get(&state).copied().unwrap_or(0)
    }

    /// Returns the number of requests that succeeded or failed. A cancelled request is neither.
    pub(super) fn succeeded_or_failed(&self) -> u64 {
        self.in_state(RequestState::Succeeded) + self.in_state(RequestState::Failed)
    }

    /// Returns the mean time from acceptance to the end, in milliseconds; `None` if no request has
    /// ended.
    pub(super) fn mean_duration(&self) -> Option<f64> {
        self.durations.moments.mean()
    }

    /// Returns the time within which 95 % of the finished requests ended, in milliseconds.
    pub(super) fn p95_duration(&self) -> Option<f64> {
        quantile(&self.durations.sorted, 0.95)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use streamer_core::{Timestamp, Uid};

    use super::*;

    fn date(text: &str) -> Date {
        text.parse().unwrap()
    }

    fn request(action: &str, state: RequestState, created: Timestamp) -> RequestSummary {
        RequestSummary {
            uid: Uid::new(created),
            action: action.into(),
            state,
            attempts: 1,
            create_time: created,
            start_time: None,
            finish_time: None,
        }
    }

    #[test]
    fn requests_are_counted_by_day_action_and_state() {
        let (from, to) = (date("2026-01-30"), date("2026-02-01"));
        let last_millisecond = Timestamp::from_millis(to.plus(1).start().as_millis() - 1);
        let usage = Usage::of(
            &[
                request("b", RequestState::Running, last_millisecond),
                request("a", RequestState::Failed, from.start()),
                request("a", RequestState::Succeeded, from.start()),
                request("a", RequestState::Cancelled, from.start()),
            ],
            from,
            to,
        );
        let per_day: Vec<_> = usage.per_day.iter().map(|(day, count)| (*day, *count)).collect();
        assert_eq!(per_day, [(from, 3), (date("2026-01-31"), 0), (to, 1)]);
        assert_eq!((usage.total.requests(), usage.total.attempts), (4, 4));
        let a = &usage.by_action["a"];
        assert_eq!((a.requests(), a.in_state(RequestState::Failed)), (3, 1));
        assert_eq!(a.succeeded_or_failed(), 2);
        assert_eq!(usage.by_action["b"].mean_duration(), None);
    }

    #[test]
    fn durations_are_measured_from_acceptance_to_the_end() {
        let (from, to) = (date("2026-01-01"), date("2026-01-01"));
        let with_duration = |millis| RequestSummary {
            finish_time: Some(from.start().plus(Duration::from_millis(millis))),
            ..request("a", RequestState::Succeeded, from.start())
        };
        let requests = [with_duration(300), with_duration(100), with_duration(200)];
        let usage = Usage::of(&requests, from, to);
        assert_eq!(usage.total.mean_duration(), Some(200.0));
        assert_eq!(usage.total.p95_duration(), Some(290.0));
    }
}
