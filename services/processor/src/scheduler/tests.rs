use super::*;

const NOW: Timestamp = Timestamp::from_millis(1_000_000);

fn due(tenant: &str, age: i64) -> DueRequest {
    request(tenant, "u", "a", age)
}

fn request(tenant: &str, user: &str, action: &str, age: i64) -> DueRequest {
    DueRequest {
        uid: Uid::new(Timestamp::from_millis(age)),
        action: action.into(),
        tenant: tenant.into(),
        user: user.into(),
        priority: 0,
        not_before: Timestamp::from_millis(age),
    }
}

fn capacity() -> Capacity {
    Capacity { actions: vec!["a".into()], total: 8, ..Capacity::default() }
}

fn page(requests: Vec<DueRequest>) -> DuePage {
    DuePage { requests, ..DuePage::default() }
}

/// Returns a position among the users of a tenant.
fn position(tenant: &str) -> (QueueKey, i32) {
    (QueueKey { action: "a".into(), tenant: tenant.into() }, 0)
}

fn hint(tenant: &str) -> Hint<'_> {
    Hint { tenant, user: "u", not_before: None }
}

fn scheduler() -> Scheduler {
    Scheduler::new(Duration::ZERO)
}

/// Scans a page with a given number of free slots. Returns the tenants whose requests start.
fn scan(scheduler: &mut Scheduler, page: DuePage, slots: usize) -> (Vec<String>, Plan<()>) {
    let mut left = slots;
    scheduler.next_query(capacity(), NOW);
    let plan = scheduler.plan(page, &Load::default(), NOW, |_| {
        if left == 0 {
            return Slot::None;
        }
        left -= 1;
        Slot::Free(())
    });
    let tenants = plan.starts.iter().map(|(request, ())| request.tenant.clone()).collect();
    (tenants, plan)
}

#[test]
fn a_hint_starts_a_request_only_if_its_tenant_has_no_backlog() {
    let mut scheduler = scheduler();
    let first = scheduler.on_hint(hint("t"), NOW, || Some(1));
    assert_eq!(first, HintDecision::Scan, "the queue has not been scanned");
    scan(&mut scheduler, page(Vec::new()), 8);
    assert_eq!(scheduler.on_hint(hint("t"), NOW, || Some(1)), HintDecision::Start(1));
    assert_eq!(scheduler.on_hint(hint("t"), NOW, || None::<u8>), HintDecision::Scan);
    assert_eq!(scheduler.on_hint(hint("t"), NOW, || Some(1)), HintDecision::Scan, "the backlog");
    assert_eq!(scheduler.on_hint(hint("other"), NOW, || Some(1)), HintDecision::Start(1));
}

#[test]
fn a_tenant_leaves_the_backlog_when_its_requests_have_started() {
    let mut scheduler = scheduler();
    let requests = || page(vec![due("t", 1), due("t", 2)]);
    let (started, plan) = scan(&mut scheduler, requests(), 1);
    assert_eq!((started, plan.has_more, plan.has_blocked), (vec!["t".to_owned()], true, true));
    assert_eq!(scheduler.on_hint(hint("t"), NOW, || Some(1)), HintDecision::Scan);
    let (_, plan) = scan(&mut scheduler, requests(), 2);
    assert!(!plan.has_more && !plan.has_blocked);
    assert_eq!(scheduler.on_hint(hint("t"), NOW, || Some(1)), HintDecision::Start(1));
}

#[test]
fn requests_that_the_page_did_not_contain_keep_their_tenant_in_the_backlog() {
    let mut scheduler = scheduler();
    let incomplete = HashSet::from(["t".to_owned()]);
    let (_, plan) = scan(&mut scheduler, DuePage { incomplete, ..page(vec![due("t", 1)]) }, 8);
    assert!(plan.has_more);
    assert_eq!(scheduler.on_hint(hint("t"), NOW, || Some(1)), HintDecision::Scan);
}

#[test]
fn pages_continue_after_the_last_tenant_and_cover_the_queue_only_together() {
    let mut scheduler = scheduler();
    let last = QueueKey { action: "a".into(), tenant: "m".into() };
    let first_page = DuePage { next: Some(last.clone()), ..page(vec![due("m", 1)]) };
    assert_eq!(scheduler.next_query(capacity(), NOW).after, None);
    assert!(scheduler.plan(first_page, &Load::default(), NOW, |_| Slot::Free(())).has_more);
    assert_eq!(scheduler.next_query(capacity(), NOW).after, Some(last));
    let second = scheduler.plan(page(Vec::new()), &Load::default(), NOW, |_| Slot::Free(()));
    assert!(second.has_more, "requests before the second page may have arrived");
    assert_eq!(scheduler.on_hint(hint("z"), NOW, || Some(1)), HintDecision::Scan);
    assert!(!scan(&mut scheduler, page(Vec::new()), 8).1.has_more);
    assert_eq!(scheduler.on_hint(hint("y"), NOW, || Some(1)), HintDecision::Start(1));
}

#[test]
fn a_scan_of_some_actions_does_not_clear_the_backlog() {
    let mut scheduler = scheduler();
    scan(&mut scheduler, page(Vec::new()), 8);
    scheduler.on_hint(hint("t"), NOW, || None::<u8>);
    scheduler.next_query(Capacity { is_partial: true, ..capacity() }, NOW);
    scheduler.plan(page(Vec::new()), &Load::default(), NOW, |_| Slot::Free(()));
    assert_eq!(scheduler.on_hint(hint("t"), NOW, || Some(1)), HintDecision::Scan);
}

#[test]
fn pairs_without_a_slot_are_skipped_until_slots_are_freed() {
    let mut scheduler = scheduler();
    let requests = page(vec![request("t", "u", "a", 1), request("t", "u", "b", 2)]);
    scheduler.next_query(capacity(), NOW);
    let plan = scheduler.plan(requests, &Load::default(), NOW, |request| {
        if request.action == "a" { Slot::None } else { Slot::Free(()) }
    });
    assert_eq!((plan.starts.len(), plan.has_blocked), (1, true));
    let blocked = HashSet::from([("t".to_owned(), "a".to_owned())]);
    assert_eq!(scheduler.next_query(capacity(), NOW).blocked, blocked);
    let again = page(vec![request("t", "u", "a", 1)]);
    let plan = scheduler.plan(again, &Load::default(), NOW, |_| Slot::<()>::None);
    assert!(!plan.has_blocked, "it was known");
    scheduler.on_slots_freed();
    assert!(scheduler.next_query(capacity(), NOW).blocked.is_empty());
}

#[test]
fn requests_whose_attempts_have_not_settled_do_not_start() {
    let mut scheduler = scheduler();
    let slot = |slot: Slot<()>| {
        let mut slot = Some(slot);
        move |_: &DueRequest| slot.take().unwrap_or(Slot::None)
    };
    scheduler.next_query(capacity(), NOW);
    let claiming =
        scheduler.plan(page(vec![due("t", 1)]), &Load::default(), NOW, slot(Slot::Claiming));
    assert!(claiming.starts.is_empty() && !claiming.has_more, "the claim removes it");
    scheduler.next_query(capacity(), NOW);
    let ending = scheduler.plan(page(vec![due("t", 1)]), &Load::default(), NOW, slot(Slot::Ending));
    assert!(ending.starts.is_empty() && ending.has_more, "the next attempt may start later");
}

#[test]
fn a_quarantined_request_does_not_start_and_does_not_take_the_place_of_others() {
    let mut scheduler = scheduler();
    let corrupt = due("t", 1);
    scheduler.quarantine(corrupt.uid, NOW);
    let by_tenant = HashMap::from([("t".to_owned(), 2), ("full".to_owned(), 0)]);
    let query = scheduler.next_query(Capacity { by_tenant, ..capacity() }, NOW);
    assert_eq!((query.per_tenant, query.limits["t"], query.limits["full"]), (8, 2, 0));
    assert_eq!(query.extra_per_user, 1);
    let requests = page(vec![corrupt.clone(), due("t", 2)]);
    let plan = scheduler.plan(requests.clone(), &Load::default(), NOW, |_| Slot::Free(()));
    assert_eq!(plan.starts.len(), 1);
    assert!(plan.has_more);
    let later = NOW.plus(Duration::from_secs(30));
    scheduler.next_query(capacity(), later);
    assert_eq!(
        scheduler.plan(requests, &Load::default(), later, |_| Slot::Free(())).starts.len(),
        2
    );
}

#[test]
fn the_limits_of_a_query_are_bounded() {
    let by_tenant = HashMap::from([("t".to_owned(), 100_000)]);
    let large = Capacity { total: 100_000, by_tenant, ..capacity() };
    let query = scheduler().next_query(large, NOW);
    assert_eq!((query.per_tenant, query.limits["t"]), (PER_TENANT, PER_TENANT));
    let none = scheduler().next_query(Capacity { total: 0, ..capacity() }, NOW);
    assert_eq!(none.per_tenant, 1);
}

#[test]
fn the_users_of_a_tenant_are_read_in_turn() {
    let mut scheduler = scheduler();
    let next_users = HashMap::from([(position("t"), "m".to_owned())]);
    scan(&mut scheduler, DuePage { next_users, ..page(vec![due("t", 1)]) }, 8);
    assert_eq!(scheduler.next_query(capacity(), NOW).after_users[&position("t")], "m");
    scan(&mut scheduler, page(vec![due("other", 1)]), 8);
    assert_eq!(
        scheduler.next_query(capacity(), NOW).after_users[&position("t")],
        "m",
        "it was not read"
    );
    scan(&mut scheduler, page(vec![due("t", 2)]), 8);
    assert!(scheduler.next_query(capacity(), NOW).after_users.is_empty(), "all users were read");
    for number in 0..=MAX_USER_POSITIONS {
        let next_users = HashMap::from([(position(&number.to_string()), "m".to_owned())]);
        scan(&mut scheduler, DuePage { next_users, ..page(Vec::new()) }, 8);
    }
    assert_eq!(scheduler.after_users.len(), 1);
}

#[test]
fn the_earliest_due_time_is_kept() {
    let mut scheduler = scheduler();
    let at = |millis| NOW.plus(Duration::from_millis(millis));
    let delayed = |due| Hint { not_before: Some(due), ..hint("t") };
    let acquire = || -> Option<u8> { panic!("a delayed request needs no slot") };
    assert_eq!(scheduler.on_hint(delayed(at(20)), NOW, acquire), HintDecision::Delayed(true));
    assert_eq!(scheduler.on_hint(delayed(at(30)), NOW, acquire), HintDecision::Delayed(false));
    assert!(scheduler.on_delayed(at(10)));
    assert_eq!(scheduler.next_due(), Some(at(10)));
    assert_eq!(scheduler.begin_release(), Some(at(10)));
    // A hint arrives while the store releases requests.
    assert!(scheduler.on_delayed(at(40)));
    scheduler.end_release(Some(at(50)));
    assert_eq!(scheduler.next_due(), Some(at(40)));
    scheduler.begin_release();
    scheduler.end_release(None);
    assert_eq!(scheduler.next_due(), None);
    let due_now = Hint { not_before: Some(NOW), ..hint("t") };
    assert_eq!(scheduler.on_hint(due_now, NOW, || None::<u8>), HintDecision::Scan);
}

#[test]
fn a_started_hint_counts_as_a_turn() {
    let mut scheduler = scheduler();
    scan(&mut scheduler, page(Vec::new()), 8);
    assert_eq!(scheduler.on_hint(hint("t"), NOW, || Some(1)), HintDecision::Start(1));
    let (started, _) = scan(&mut scheduler, page(vec![due("t", 1), due("z", 2)]), 1);
    assert_eq!(started, ["z"]);
}
