//! Life of an attempt on this processor, without I/O.
//!
//! The driver passes what happened to [`AttemptState::step`], and does what [`Effects`] contains: it stops the handler,
//! reserves buffer space for the result, and publishes the next batch of events.

use std::time::Duration;

use bytes::Bytes;
use streamer_core::{ErrorCode, RequestError};
use streamer_handler::HandlerError;
use tokio::time::Instant;

use super::{outcome::Outcome, time_limit::TimeLimit};

/// State of an attempt.
#[derive(Debug)]
pub(super) struct AttemptState {
    phase: Phase,
    /// Whether a batch of events is being published.
    is_publishing: bool,
    /// Time at which the last batch was published.
    published_at: Instant,
    time_limit: Option<TimeLimit>,
    heartbeat_timeout: Option<Duration>,
    cancellation_grace_period: Duration,
    /// Time at which a handler that does not react to a cancellation is stopped.
    abort_at: Option<Instant>,
}

#[derive(Debug)]
enum Phase {
    /// The handler runs.
    Running,
    /// The handler has succeeded, and its result waits for buffer space.
    Reserving(Bytes),
    /// The handler has ended.
    Ended(Outcome),
    /// The final event is being published.
    Finishing,
    /// The final event is durable.
    Recorded,
    /// A different holder owns the attempt, or will recover it.
    Fenced,
}

/// Something that happened to an attempt.
#[derive(Debug)]
pub(super) enum AttemptEvent {
    /// The attempt has lost its lease.
    Fenced,
    /// The batch is durable.
    Published,
    /// The log rejected the batch.
    Rejected,
    /// The handler has ended.
    HandlerEnded(Outcome),
    /// Buffer space for the result is reserved.
    Reserved,
    /// The time limit has passed.
    TimeLimitPassed,
    /// The heartbeat timeout may have passed. Contains the time of the last report.
    HeartbeatDue(Instant),
    /// The attempt is released, for the given reason.
    Released(&'static str),
    /// Cancellation was requested.
    CancellationRequested,
    /// The time for the reaction to a cancellation has passed.
    GracePeriodPassed,
    /// The handler has reported.
    Reported,
}

/// What the driver does after a step.
#[derive(Debug)]
pub(super) struct Effects {
    /// Whether to stop the handler.
    pub(super) stop_handler: bool,
    /// Size of the result for which to reserve buffer space.
    pub(super) reserve: Option<usize>,
    pub(super) next: Next,
}

/// What happens to the events of the attempt after a step.
#[derive(Debug)]
pub(super) enum Next {
    /// Nothing until the next event.
    Wait,
    /// Pending reports are published, if there are any; see [`AttemptState::publishing`].
    PublishReports,
    /// Pending reports and the final event with this outcome are published.
    PublishFinal(Outcome),
    /// The final event is durable.
    Recorded,
    /// The attempt ends without a final event.
    Fenced,
}

impl AttemptState {
    /// Returns the state of an attempt whose handler starts now.
    pub(super) fn new(
        time_limit: Option<TimeLimit>,
        heartbeat_timeout: Option<Duration>,
        cancellation_grace_period: Duration,
        now: Instant,
    ) -> Self {
        Self {
            phase: Phase::Running,
            is_publishing: false,
            published_at: now,
            time_limit,
            heartbeat_timeout,
            cancellation_grace_period,
            abort_at: None,
        }
    }

    /// Records that a batch is being published.
    pub(super) fn publishing(&mut self) {
        self.is_publishing = true;
    }

    pub(super) fn is_publishing(&self) -> bool {
        self.is_publishing
    }

    pub(super) fn is_handler_running(&self) -> bool {
        matches!(self.phase, Phase::Running)
    }

    /// Returns whether the final event is being or has been published.
    pub(super) fn is_finishing(&self) -> bool {
        matches!(self.phase, Phase::Finishing | Phase::Recorded)
    }

    /// Returns the time of [`AttemptEvent::TimeLimitPassed`].
    pub(super) fn time_limit(&self) -> Option<Instant> {
        self.time_limit.as_ref().filter(|_| self.is_handler_running()).map(|limit| limit.at)
    }

    /// Returns the time of [`AttemptEvent::HeartbeatDue`]. While a batch is being published there is none, because the
    /// handler may be waiting for it.
    pub(super) fn heartbeat_deadline(&self, last_report: Instant) -> Option<Instant> {
        let timeout = self.heartbeat_timeout.filter(|_| !self.is_publishing)?;
        self.is_handler_running().then(|| last_report.max(self.published_at) + timeout)
    }

    /// Returns the time of [`AttemptEvent::GracePeriodPassed`].
    pub(super) fn grace_period_end(&self) -> Option<Instant> {
        self.abort_at.filter(|_| self.is_handler_running())
    }

    /// Returns whether [`AttemptEvent::CancellationRequested`] is still expected.
    pub(super) fn may_be_cancelled(&self) -> bool {
        self.abort_at.is_none()
    }

    /// Returns what follows from `event`.
    pub(super) fn step(&mut self, event: AttemptEvent, now: Instant) -> Effects {
        let mut effects = Effects { stop_handler: false, reserve: None, next: Next::Wait };
        match event {
            AttemptEvent::Fenced | AttemptEvent::Rejected => self.phase = Phase::Fenced,
            AttemptEvent::Published => {
                self.is_publishing = false;
                self.published_at = now;
                if matches!(self.phase, Phase::Finishing) {
                    self.phase = Phase::Recorded;
                }
            }
            AttemptEvent::Reserved => {
                if let Phase::Reserving(result) = &mut self.phase {
                    let result = std::mem::take(result);
                    self.phase = Phase::Ended(Outcome::Succeeded(result));
                }
            }
            AttemptEvent::CancellationRequested => {
                self.abort_at.get_or_insert(now + self.cancellation_grace_period);
            }
            AttemptEvent::Reported => {}
            AttemptEvent::HandlerEnded(outcome) if self.is_handler_running() => {
                self.phase = match outcome {
                    Outcome::Succeeded(result) => {
                        effects.reserve = Some(result.len());
                        Phase::Reserving(result)
                    }
                    outcome => Phase::Ended(outcome),
                };
            }
            event if self.is_handler_running() => {
                if let Some(outcome) = self.interruption(&event, now) {
                    self.phase = Phase::Ended(outcome);
                    effects.stop_handler = true;
                }
            }
            // The handler has ended before.
            AttemptEvent::HandlerEnded(_)
            | AttemptEvent::TimeLimitPassed
            | AttemptEvent::HeartbeatDue(_)
            | AttemptEvent::Released(_)
            | AttemptEvent::GracePeriodPassed => {}
        }
        effects.next = self.next();
        effects
    }

    /// Returns the outcome of an attempt whose handler is stopped because of `event`.
    fn interruption(&mut self, event: &AttemptEvent, now: Instant) -> Option<Outcome> {
        match event {
            AttemptEvent::TimeLimitPassed => {
                self.time_limit.take().map(|limit| Outcome::Failed(limit.error))
            }
            // The handler may have reported since the timer was set.
            AttemptEvent::HeartbeatDue(last_report) => {
                let timeout = self.heartbeat_timeout?;
                let deadline = (*last_report).max(self.published_at) + timeout;
                (deadline <= now).then(|| {
                    Outcome::Failed(RequestError::new(
                        ErrorCode::Timeout,
                        "the handler sent no report within its heartbeat timeout",
                    ))
                })
            }
            AttemptEvent::Released(reason) => {
                Some(Outcome::Released(RequestError::new(ErrorCode::Unavailable, *reason)))
            }
            AttemptEvent::GracePeriodPassed => {
                Some(Outcome::Failed(HandlerError::cancelled().into_request_error()))
            }
            _ => None,
        }
    }

    fn next(&mut self) -> Next {
        match &self.phase {
            Phase::Fenced => Next::Fenced,
            Phase::Recorded => Next::Recorded,
            _ if self.is_publishing => Next::Wait,
            Phase::Running | Phase::Reserving(_) => Next::PublishReports,
            Phase::Finishing => Next::Wait,
            Phase::Ended(_) => match std::mem::replace(&mut self.phase, Phase::Finishing) {
                Phase::Ended(outcome) => {
                    self.is_publishing = true;
                    Next::PublishFinal(outcome)
                }
                phase => {
                    self.phase = phase;
                    Next::Wait
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(10);
    const HEARTBEAT: Duration = Duration::from_secs(5);

    fn state(now: Instant) -> AttemptState {
        let error = RequestError::new(ErrorCode::Timeout, "too late");
        let limit = TimeLimit { at: now + Duration::from_secs(60), error };
        AttemptState::new(Some(limit), Some(HEARTBEAT), GRACE, now)
    }

    fn failed() -> AttemptEvent {
        AttemptEvent::HandlerEnded(Outcome::Failed(RequestError::new(ErrorCode::Conflict, "no")))
    }

    fn succeeded() -> AttemptEvent {
        AttemptEvent::HandlerEnded(Outcome::Succeeded("123".into()))
    }

    /// Describes what follows from an event.
    fn describe(effects: &Effects) -> String {
        let next = match &effects.next {
            Next::Wait => "wait".into(),
            Next::PublishReports => "publish".into(),
            Next::PublishFinal(Outcome::Succeeded(result)) => format!("succeed {}", result.len()),
            Next::PublishFinal(Outcome::Failed(error)) => format!("fail {}", error.code.as_str()),
            Next::PublishFinal(Outcome::Released(error)) => format!("release {}", error.message),
            Next::Recorded => "recorded".into(),
            Next::Fenced => "fenced".into(),
        };
        let stop = if effects.stop_handler { "stop, " } else { "" };
        let reserve = effects.reserve.map(|bytes| format!("reserve {bytes}, ")).unwrap_or_default();
        format!("{stop}{reserve}{next}")
    }

    fn step(state: &mut AttemptState, event: AttemptEvent) -> String {
        describe(&state.step(event, state.published_at))
    }

    #[test]
    fn a_result_is_published_after_space_is_reserved() {
        let mut state = state(Instant::now());
        assert_eq!(step(&mut state, AttemptEvent::Reported), "publish");
        assert_eq!(step(&mut state, succeeded()), "reserve 3, publish");
        assert!(!state.is_handler_running() && !state.is_finishing());
        assert_eq!(step(&mut state, AttemptEvent::Reserved), "succeed 3");
        assert!(state.is_finishing() && state.is_publishing());
        assert_eq!(step(&mut state, AttemptEvent::Reserved), "wait");
        assert_eq!(step(&mut state, AttemptEvent::Published), "recorded");
    }

    #[test]
    fn batches_are_published_one_after_the_other() {
        let mut state = state(Instant::now());
        state.publishing();
        assert_eq!(step(&mut state, AttemptEvent::Reported), "wait");
        assert_eq!(step(&mut state, failed()), "wait");
        assert_eq!(step(&mut state, AttemptEvent::Published), "fail CONFLICT");
        assert_eq!(step(&mut state, AttemptEvent::Published), "recorded");
    }

    #[test]
    fn a_result_waits_for_the_batch_and_for_space() {
        let mut state = state(Instant::now());
        state.publishing();
        assert_eq!(step(&mut state, succeeded()), "reserve 3, wait");
        assert_eq!(step(&mut state, AttemptEvent::Published), "publish");
        state.publishing();
        assert_eq!(step(&mut state, AttemptEvent::Reserved), "wait");
        assert_eq!(step(&mut state, AttemptEvent::Published), "succeed 3");
    }

    #[test]
    fn a_fenced_attempt_ends_at_once_and_for_good() {
        for event in [AttemptEvent::Fenced, AttemptEvent::Rejected] {
            let mut state = state(Instant::now());
            state.publishing();
            assert_eq!(step(&mut state, event), "fenced");
            assert_eq!(step(&mut state, failed()), "fenced");
            assert_eq!(step(&mut state, AttemptEvent::Published), "fenced");
        }
    }

    #[test]
    fn the_first_end_of_an_attempt_counts() {
        let late = || {
            [
                AttemptEvent::TimeLimitPassed,
                AttemptEvent::HeartbeatDue(Instant::now() - HEARTBEAT * 2),
                AttemptEvent::Released("stop"),
                AttemptEvent::GracePeriodPassed,
                failed(),
            ]
        };
        for event in late() {
            let mut state = state(Instant::now());
            step(&mut state, succeeded());
            assert_eq!(step(&mut state, event), "publish");
            assert_eq!(step(&mut state, AttemptEvent::Reserved), "succeed 3");
        }
        let mut state = state(Instant::now());
        assert_eq!(step(&mut state, AttemptEvent::Released("stop")), "stop, release stop");
        for event in late() {
            assert_eq!(step(&mut state, event), "wait");
        }
        assert_eq!(step(&mut state, AttemptEvent::Published), "recorded");
    }

    #[test]
    fn limits_stop_the_handler() {
        let now = Instant::now();
        let mut timed_out = state(now);
        assert_eq!(timed_out.time_limit(), Some(now + Duration::from_secs(60)));
        assert_eq!(step(&mut timed_out, AttemptEvent::TimeLimitPassed), "stop, fail TIMEOUT");
        assert_eq!(timed_out.time_limit(), None);

        let mut cancelled = state(now);
        assert_eq!(cancelled.grace_period_end(), None);
        assert_eq!(step(&mut cancelled, AttemptEvent::CancellationRequested), "publish");
        assert_eq!(cancelled.grace_period_end(), Some(now + GRACE));
        assert!(!cancelled.may_be_cancelled());
        cancelled.step(AttemptEvent::CancellationRequested, now + GRACE);
        assert_eq!(cancelled.grace_period_end(), Some(now + GRACE), "the first request counts");
        assert_eq!(step(&mut cancelled, AttemptEvent::GracePeriodPassed), "stop, fail CANCELLED");
        assert_eq!(cancelled.grace_period_end(), None);
    }

    #[test]
    fn a_report_or_a_publication_postpones_the_heartbeat_timeout() {
        let start = Instant::now();
        let mut state = state(start);
        let second = Duration::from_secs(1);
        assert_eq!(state.heartbeat_deadline(start + second), Some(start + second + HEARTBEAT));
        state.publishing();
        assert_eq!(state.heartbeat_deadline(start), None, "the handler may wait for the batch");
        state.step(AttemptEvent::Published, start + second * 3);
        let deadline = start + second * 3 + HEARTBEAT;
        assert_eq!(state.heartbeat_deadline(start + second), Some(deadline));
        let due = |state: &mut AttemptState, last_report| {
            describe(&state.step(AttemptEvent::HeartbeatDue(last_report), deadline))
        };
        assert_eq!(due(&mut state, start + second * 4), "publish", "it has reported meanwhile");
        assert_eq!(due(&mut state, start + second), "stop, fail TIMEOUT");
        assert_eq!(state.heartbeat_deadline(start), None);
    }
}
