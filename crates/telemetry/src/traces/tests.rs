//! Trace contexts without a collector.

use super::{context::MAX_TRACE_PARENT_BYTES, *};

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[test]
fn contexts_are_parsed_and_written_as_w3c_requires() {
    let context = TraceContext::parse(PARENT, Some("vendor=1,other=2")).unwrap();
    assert!(context.is_sampled());
    assert_eq!(context.trace_parent(), PARENT);
    assert_eq!(context.trace_state().as_deref(), Some("vendor=1,other=2"));
    assert_eq!(context.trace_id(), "0af7651916cd43dd8448eb211c80319c");

    let later = format!("01{}-and-more", &PARENT[2..]);
    assert_eq!(TraceContext::parse(&later, None).unwrap().trace_parent(), PARENT);
    let unsampled = PARENT.replace("-01", "-00");
    assert_eq!(TraceContext::parse(&unsampled, None).unwrap().trace_parent(), unsampled);
    let long = format!("vendor={}", "x".repeat(MAX_TRACE_STATE_BYTES));
    assert_eq!(TraceContext::parse(PARENT, Some(&long)).unwrap().trace_state(), None);
    for invalid in [
        "",
        "00",
        &PARENT[..54],
        &PARENT.to_uppercase(),
        &PARENT.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
        &PARENT.replace("b7ad6b7169203331", &"0".repeat(16)),
        &format!("01{}-{}", &PARENT[2..], "x".repeat(MAX_TRACE_PARENT_BYTES)),
    ] {
        assert_eq!(TraceContext::parse(invalid, None), None, "{invalid}");
    }
}

#[test]
fn without_an_endpoint_the_context_of_the_caller_is_propagated() {
    let traces = Traces::default();
    let caller = TraceContext::parse(PARENT, None);
    let scope = traces.admit(caller.clone(), true, || trace_span!("never"));
    assert_eq!(scope.trace_context(), caller);
    let untrusted = traces.admit(caller.clone(), false, || trace_span!("never"));
    let untrusted = untrusted.trace_context().unwrap();
    assert_eq!(untrusted.trace_id(), caller.unwrap().trace_id());
    assert!(!untrusted.is_sampled(), "other processes do not trust its decision either");
    assert!(scope.span().is_disabled());
    let none = traces.admit(None, true, || unreachable!("no span without a context"));
    assert_eq!(none.trace_context(), None);
}

#[test]
fn only_the_future_runs_in_its_scope() {
    let caller = TraceContext::parse(PARENT, None).unwrap();
    let seen = async { TraceContext::current() }.in_scope(Scope::within(&caller));
    let mut seen = Box::pin(seen);
    let mut task = std::task::Context::from_waker(std::task::Waker::noop());
    assert_eq!(seen.as_mut().poll(&mut task), Poll::Ready(Some(caller)));
    assert_eq!(TraceContext::current(), None);
}

#[test]
fn the_ratio_selects_that_share_of_all_numbers() {
    assert!(!is_within(0.0, 0) && is_within(1.0, u64::MAX));
    assert!(is_within(0.5, u64::MAX / 2 - 10_000) && !is_within(0.5, u64::MAX / 2 + 10_000));
}

#[test]
fn each_attempt_has_distinct_derivable_ids() {
    let context = |uid: u8, attempt: u16| attempt_context([uid; 16], attempt.into());
    let first = context(7, 1);
    assert_eq!(first, context(7, 1));
    assert_ne!(first.trace_id(), context(7, 2).trace_id());
    assert_ne!(first.trace_id(), context(8, 1).trace_id());
    assert!(first.is_sampled());
}
