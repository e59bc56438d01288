#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{future::Future, pin::Pin};

use futures_util::FutureExt;

use super::*;

fn tenants() -> [Arc<str>; 2] {
    ["acme".into(), "globex".into()]
}

/// A reservation that waits.
type Waiting = Pin<Box<dyn Future<Output = Reservation> + Send>>;

/// Begins to reserve.
fn begin(budget: &Arc<OutputBudget>, tenant: &Arc<str>, bytes: usize) -> Waiting {
    let (budget, tenant) = (budget.clone(), tenant.clone());
    let mut reserving = Box::pin(async move { budget.reserve(&tenant, bytes).await });
    assert!((&mut reserving).now_or_never().is_none(), "there is room");
    reserving
}

fn now(budget: &Arc<OutputBudget>, tenant: &Arc<str>, bytes: usize) -> Reservation {
    budget.reserve(tenant, bytes).now_or_never().expect("there is room")
}

#[test]
fn one_tenant_gets_half_and_another_has_room() {
    let budget = OutputBudget::new(100);
    let [acme, globex] = tenants();
    let first = now(&budget, &acme, 50);
    let mut waiting = begin(&budget, &acme, 1);
    let other = now(&budget, &globex, 20);
    assert!((&mut waiting).now_or_never().is_none());
    drop(first);
    let granted = waiting.now_or_never().unwrap();
    assert_eq!((granted.bytes(), budget.used()), (1, 21));
    drop((granted, other));
    assert_eq!(budget.used(), 0);
    assert!(budget.state.lock().tenants.is_empty(), "nothing is kept of idle tenants");
}

#[test]
fn the_tenant_with_the_least_bytes_is_first_and_is_not_overtaken() {
    let budget = OutputBudget::new(100);
    let [acme, globex] = tenants();
    let third: Arc<str> = "initech".into();
    let (held, small) = (now(&budget, &acme, 40), now(&budget, &third, 10));
    let mut first = begin(&budget, &globex, 60);
    // There would be room for this one, but not for the one before it, whose tenant holds less.
    let mut second = begin(&budget, &third, 1);
    drop(held);
    assert_eq!((&mut first).now_or_never().map(|granted| granted.bytes()), Some(60));
    assert_eq!((&mut second).now_or_never().map(|granted| granted.bytes()), Some(1));
    drop(small);
}

#[test]
fn a_dropped_waiter_does_not_block_others() {
    let budget = OutputBudget::new(100);
    let [acme, globex] = tenants();
    let held = now(&budget, &globex, 60);
    let large = begin(&budget, &acme, 100);
    let mut small = begin(&budget, &acme, 30);
    // The one behind it is served at once, and nothing is left of it.
    drop(large);
    let granted = (&mut small).now_or_never().unwrap();
    assert_eq!((granted.bytes(), budget.used()), (30, 90));
    assert_eq!(budget.available_to("initech"), 10);
    // One that is granted and then dropped gives its bytes back.
    let again = begin(&budget, &acme, 50);
    drop((granted, held));
    assert_eq!(budget.used(), 50);
    drop(again);
    assert_eq!(budget.used(), 0);
    let state = budget.state.lock();
    assert!(state.waiting.is_empty() && state.tenants.is_empty());
}

#[test]
fn tenants_that_hold_the_same_are_served_in_turn() {
    let budget = OutputBudget::new(100);
    let [acme, globex] = tenants();
    let held = now(&budget, &acme, 60);
    let mut other = begin(&budget, &globex, 60);
    let mut again = begin(&budget, &acme, 60);
    drop(held);
    let granted = (&mut other).now_or_never().expect("it came first");
    assert!((&mut again).now_or_never().is_none());
    drop(granted);
    assert!((&mut again).now_or_never().is_some());
}

#[test]
fn parts_of_a_reservation_are_released_alone() {
    let budget = OutputBudget::new(100);
    let [acme, _] = tenants();
    let mut whole = now(&budget, &acme, 60);
    let part = whole.split(20);
    assert_eq!((whole.bytes(), part.bytes(), budget.used()), (40, 20, 60));
    drop(part);
    assert_eq!(budget.used(), 40);
    assert_eq!(whole.split(100).bytes(), 40);
    assert_eq!(budget.used(), 0);
}

#[test]
fn more_than_the_whole_budget_is_all_of_it() {
    let budget = OutputBudget::new(100);
    let [acme, globex] = tenants();
    let all = now(&budget, &acme, 1000);
    assert_eq!(
        (all.bytes(), budget.available_to(&acme), budget.available_to(&globex)),
        (100, 0, 0)
    );
    let mut waiting = begin(&budget, &globex, 1);
    drop(all);
    assert_eq!((&mut waiting).now_or_never().unwrap().bytes(), 1);
}
