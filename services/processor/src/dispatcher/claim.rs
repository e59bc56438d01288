//! Claims a request, and repeats the claim if its response is lost.

use std::{pin::pin, time::Duration};

use streamer_core::{Clock, Timestamp, backoff::Backoff};
use streamer_store::{Claim, ClaimOutcome, StoreError};
use tokio::time::{Instant, sleep};

/// Maximum delay before the first repetition.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
/// Maximum delay before a repetition.
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// Start and duration of the call that was answered.
#[derive(Clone, Copy)]
pub(super) struct ClaimTiming {
    pub(super) started_at: Timestamp,
    pub(super) duration: Duration,
}

/// Makes a claim until the store answers it, or until `stopped`. A claim without an answer may have started the attempt,
/// which would otherwise be abandoned until its lease expires, and count as failed.
pub(super) async fn claim_until_answered<F>(
    mut claim: Claim,
    clock: &dyn Clock,
    stopped: impl Future<Output = ()>,
    mut call: impl FnMut(Claim) -> F,
) -> (Result<ClaimOutcome, StoreError>, ClaimTiming)
where
    F: Future<Output = Result<ClaimOutcome, StoreError>>,
{
    let mut stopped = pin!(stopped);
    let mut backoff = Backoff::new(FIRST_BACKOFF, MAX_BACKOFF);
    let lease = claim.lease_until.since(claim.now);
    loop {
        let start = Instant::now();
        let outcome = call(claim.clone()).await;
        let timing = ClaimTiming { started_at: claim.now, duration: start.elapsed() };
        let error = match outcome {
            Err(error) if error.is_retryable() => error,
            outcome => return (outcome, timing),
        };
        tracing::warn!(%error, uid = %claim.uid, "failed to claim a request, retrying");
        tokio::select! {
            biased;
            () = &mut stopped => return (Err(error), timing),
            () = sleep(backoff.wait()) => {}
        }
        claim.repeats = claim.repeats.or(Some(claim.now));
        claim.now = clock.now();
        claim.lease_until = claim.now.plus(lease);
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use streamer_core::{ManualClock, Uid};

    use super::*;

    const START: Timestamp = Timestamp::from_millis(1_000);
    const LEASE: Duration = Duration::from_secs(10);

    fn claim() -> Claim {
        let (uid, holder) = (Uid::new(START), "processor".into());
        Claim {
            uid,
            holder,
            worker: None,
            now: START,
            lease_until: START.plus(LEASE),
            repeats: None,
        }
    }

    fn lost() -> Result<ClaimOutcome, StoreError> {
        Err(StoreError::Unavailable { doing: "claiming", reason: "no answer".into() })
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_is_repeated_with_the_time_of_the_first_call_until_it_is_answered() {
        let clock = ManualClock::at(START);
        let mut calls = Vec::new();
        let call = |claim: Claim| {
            calls.push((claim.now, claim.repeats, claim.lease_until.since(claim.now)));
            clock.advance(Duration::from_secs(1));
            ready(if calls.len() < 3 { lost() } else { Ok(ClaimOutcome::NotClaimable) })
        };
        let (outcome, timing) = claim_until_answered(claim(), &clock, pending(), call).await;
        assert!(matches!(outcome, Ok(ClaimOutcome::NotClaimable)));
        let at = |seconds| START.plus(Duration::from_secs(seconds));
        assert_eq!(
            calls,
            [(START, None, LEASE), (at(1), Some(START), LEASE), (at(2), Some(START), LEASE)]
        );
        assert_eq!(timing.started_at, at(2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_is_not_repeated_after_an_answer_or_when_the_processor_stops() {
        let clock = ManualClock::at(START);
        let corrupt = || StoreError::Corrupt { doing: "claiming", reason: "damaged".into() };
        let answered = |_| ready(Err(corrupt()));
        let (outcome, _) = claim_until_answered(claim(), &clock, pending(), answered).await;
        assert!(matches!(outcome, Err(StoreError::Corrupt { .. })));
        let (outcome, _) =
            claim_until_answered(claim(), &clock, ready(()), |_| ready(lost())).await;
        assert!(matches!(outcome, Err(StoreError::Unavailable { .. })));
    }
}
