#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{future::Future, pin::Pin};

use futures_util::FutureExt;

use super::*;

fn tenants() -> [Arc<str>; 2] {
    ["acme".into(), "globex".into()]
}

/// A reservation that has to wait.
type PendingReservation = Pin<Box<dyn Future<Output = Reservation> + Send>>;

/// Starts a reservation that has to wait.
fn start_waiting(
    budget: &Arc<MemoryBudget>,
    tenant: &Arc<str>,
    bytes: usize,
) -> PendingReservation {
    let (budget, tenant) = (budget.clone(), tenant.clone());
    let mut reserving = Box::pin(async move { budget.reserve(&tenant, bytes).await });
    assert!((&mut reserving).now_or_never().is_none(), "the budget has capacity");
    reserving
}

fn reserve_now(budget: &Arc<MemoryBudget>, tenant: &Arc<str>, bytes: usize) -> Reservation {
    budget.reserve(tenant, bytes).now_or_never().expect("the budget has capacity")
}

#[test]
fn one_tenant_gets_half_and_leaves_room_for_another() {
    let budget = MemoryBudget::new(100);
    let [acme, globex] = tenants();
    let first = reserve_now(&budget, &acme, 50);
    let mut waiting = start_waiting(&budget, &acme, 1);
    let other = reserve_now(&budget, &globex, 20);
    assert!((&mut waiting).now_or_never().is_none());
    drop(first);
    let granted = waiting.now_or_never().unwrap();
    assert_eq!((granted.bytes(), budget.used()), (1, 21));
    drop((granted, other));
    assert_eq!(budget.used(), 0);
    assert!(budget.state.lock().tenants.is_empty(), "idle tenants are removed");
}

#[test]
fn the_tenant_with_the_least_bytes_is_served_first() {
    let budget = MemoryBudget::new(100);
    let [acme, globex] = tenants();
    let third: Arc<str> = "initech".into();
    let (held, small) = (reserve_now(&budget, &acme, 40), reserve_now(&budget, &third, 10));
    let mut first = start_waiting(&budget, &globex, 60);
    // The budget has capacity for this reservation, but not for the earlier one, whose tenant has fewer reserved bytes.
    let mut second = start_waiting(&budget, &third, 1);
    drop(held);
    assert_eq!((&mut first).now_or_never().map(|granted| granted.bytes()), Some(60));
    assert_eq!((&mut second).now_or_never().map(|granted| granted.bytes()), Some(1));
    drop(small);
}

#[test]
fn a_dropped_waiter_does_not_block_others() {
    let budget = MemoryBudget::new(100);
    let [acme, globex] = tenants();
    let held = reserve_now(&budget, &globex, 60);
    let large = start_waiting(&budget, &acme, 100);
    let mut small = start_waiting(&budget, &acme, 30);
    // The next waiter is served immediately, and the dropped waiter leaves no state.
    drop(large);
    let granted = (&mut small).now_or_never().unwrap();
    assert_eq!((granted.bytes(), budget.used()), (30, 90));
    assert_eq!(budget.available_to("initech"), 10);
    // A reservation that is granted and then dropped releases its bytes.
    let again = start_waiting(&budget, &acme, 50);
    drop((granted, held));
    assert_eq!(budget.used(), 50);
    drop(again);
    assert_eq!(budget.used(), 0);
    let state = budget.state.lock();
    assert!(state.waiting.is_empty() && state.tenants.is_empty());
}

#[test]
fn tenants_with_equal_bytes_are_served_in_arrival_order() {
    let budget = MemoryBudget::new(100);
    let [acme, globex] = tenants();
    let held = reserve_now(&budget, &acme, 60);
    let mut other = start_waiting(&budget, &globex, 60);
    let mut again = start_waiting(&budget, &acme, 60);
    drop(held);
    let granted = (&mut other).now_or_never().expect("it was first");
    assert!((&mut again).now_or_never().is_none());
    drop(granted);
    assert!((&mut again).now_or_never().is_some());
}

#[test]
fn parts_of_a_reservation_are_released_separately() {
    let budget = MemoryBudget::new(100);
    let [acme, _] = tenants();
    let mut whole = reserve_now(&budget, &acme, 60);
    let part = whole.split(20);
    assert_eq!((whole.bytes(), part.bytes(), budget.used()), (40, 20, 60));
    drop(part);
    assert_eq!(budget.used(), 40);
    assert_eq!(whole.split(100).bytes(), 40);
    assert_eq!(budget.used(), 0);
}

#[test]
fn a_reservation_is_capped_at_the_whole_budget() {
    let budget = MemoryBudget::new(100);
    let [acme, globex] = tenants();
    let all = reserve_now(&budget, &acme, 1000);
    assert_eq!(
        (all.bytes(), budget.available_to(&acme), budget.available_to(&globex)),
        (100, 0, 0)
    );
    let mut waiting = start_waiting(&budget, &globex, 1);
    drop(all);
    assert_eq!((&mut waiting).now_or_never().unwrap().bytes(), 1);
}
