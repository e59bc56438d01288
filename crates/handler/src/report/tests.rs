#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{
    pin::{Pin, pin},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::time::advance;

use super::*;

const LARGE: usize = 100_000;

fn output(bytes: usize) -> Report {
    Report::Output { content_type: String::new(), data: vec![0; bytes].into() }
}

/// Returns whether a future is ready now.
fn is_ready<T>(future: Pin<&mut impl Future<Output = T>>) -> bool {
    future.now_or_never().is_some()
}

#[tokio::test]
async fn only_large_reports_wait_for_the_budget() {
    let budget = MemoryBudget::new(2 * LARGE);
    let [first, second] = [(); 2].map(|()| ReportQueue::with_budget(budget.clone(), "acme"));
    first.push(output(LARGE - 100)).await.unwrap();
    let mut waiting = pin!(second.push(output(LARGE / 2)));
    assert!(!is_ready(waiting.as_mut()));
    let small = ReportQueue::with_budget(budget.clone(), "acme");
    small.push(output(1000)).await.unwrap();
    // Reports that were taken keep their reservation until they are dropped.
    let batch = first.take_batch();
    assert!(!is_ready(waiting.as_mut()));
    drop(batch);
    waiting.await.unwrap();
    assert_eq!(second.take().len(), 1);
    assert_eq!(budget.used(), 0);
}

#[tokio::test]
async fn a_prepaid_report_uses_its_reservation() {
    let budget = MemoryBudget::new(3 * LARGE);
    let queue = ReportQueue::with_budget(budget.clone(), "acme");
    queue.prepay(budget.reserve(&"acme".into(), LARGE).await);
    queue.push(output(LARGE - 64)).await.unwrap();
    assert_eq!(budget.used(), LARGE);
    queue.prepay(budget.reserve(&"acme".into(), 10).await);
    queue.close();
    drop(queue.take());
    assert_eq!(budget.used(), 0);
}

#[tokio::test]
async fn a_small_report_behind_others_is_pushed_once_they_are_taken() {
    let budget = MemoryBudget::new(2 * LARGE);
    let queue = ReportQueue::with_budget(budget.clone(), "acme");
    queue.push(output(LARGE / 2)).await.unwrap();
    let _all = budget.reserve(&"globex".into(), LARGE).await;
    let _rest = budget.reserve(&"initech".into(), LARGE / 2 - 64).await;
    let mut waiting = pin!(queue.push(output(1000)));
    assert!(!is_ready(waiting.as_mut()));
    // The batch keeps its reservation, like a batch in transit.
    let _batch = queue.take_batch();
    waiting.await.unwrap();
}

#[tokio::test]
async fn close_fails_waiting_pushes() {
    let budget = MemoryBudget::new(LARGE);
    let _all = budget.reserve(&"acme".into(), LARGE).await;
    let queue = ReportQueue::with_budget(budget.clone(), "acme");
    let mut waiting = pin!(queue.push(output(LARGE / 2)));
    assert!(!is_ready(waiting.as_mut()));
    queue.close();
    assert!(waiting.await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_blocked_or_paused_queue_is_not_silent() {
    let budget = MemoryBudget::new(LARGE);
    let all = budget.reserve(&"acme".into(), LARGE).await;
    let queue = ReportQueue::with_budget(budget.clone(), "acme");
    let minute = Duration::from_secs(60);
    {
        let mut waiting = pin!(queue.push(output(LARGE / 2)));
        assert!(!is_ready(waiting.as_mut()));
        advance(minute).await;
        assert_eq!(queue.last_activity(), Instant::now());
        drop(all);
        waiting.await.unwrap();
    }
    let source = Arc::new(ReportSource::default());
    queue.set_source(source.clone());
    let paused = source.pause();
    advance(minute).await;
    assert_eq!(queue.last_activity(), Instant::now());
    drop(paused);
    advance(minute).await;
    assert_eq!(queue.last_activity(), Instant::now() - minute);
}
