//! The contract of the store trait, tested with every engine.

#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use streamer_core::{AttemptNumber, RequestState, Seq, TenantLimit, Timestamp, Uid};
use streamer_proto::common::v1::{
    Action, Event, Failed, Output, OutputSummary, Payload, Progress, Retrying, Succeeded,
    event::Kind, payload::Body,
};
use streamer_store::{
    Adopt, Append, AppendOutcome, AssignedWorker, Backup, BackupOutcome, CancelOutcome, Claim,
    ClaimOutcome, Claimed, ConnectionRecord, CreateOutcome, DeclaredAction, DeleteOutcome, DuePage,
    DueQuery, Lease, ListRequests, NewRequest, Owner, QueueKey, Quota, ReleasedRequests, Store,
    StoreError, StoredPayload, Writer, find_by_client_id_or_uid,
};
use streamer_store_dynamodb::{DynamoOptions, DynamoStore, tables};
use streamer_store_sqlite::{open, restore};
use streamer_telemetry::Metrics;
use streamer_tests::dynamodb::{Implementation, endpoint};
use tempfile::TempDir;

/// Engine under test, with its data.
struct Subject {
    store: Arc<dyn Store>,
    /// Whether quotas are exact, since no other process writes to the store.
    is_exact: bool,
    _data: TempDir,
}

/// Returns all engines, each with an empty store.
async fn engines() -> impl Iterator<Item = Subject> {
    let data = TempDir::new().unwrap();
    let store = open(data.path()).unwrap();
    let embedded = ("embedded", Subject { store, is_exact: true, _data: data });
    let local = ("DynamoDB Local", dynamodb(Implementation::DynamoDbLocal).await);
    let dynoxide = ("dynoxide", dynamodb(Implementation::Dynoxide).await);
    [embedded, local, dynoxide].into_iter().map(|(name, subject)| {
        // The output of a failed test shows the engine.
        println!("engine: {name}");
        subject
    })
}

/// Returns a store with separate tables on the given server.
async fn dynamodb(implementation: Implementation) -> Subject {
    let data = TempDir::new().unwrap();
    let options = DynamoOptions {
        endpoint: Some(endpoint(implementation).to_owned()),
        table_prefix: format!("t-{}-", Uid::new(at(1))),
        objects: Some(format!("file://{}", data.path().display())),
        ..DynamoOptions::default()
    };
    let (created, differences) = tables::create(&options).await.unwrap();
    assert_eq!((created.len(), differences), (tables::TABLES.len(), Vec::new()));
    let store = DynamoStore::open(&options, &Metrics::new()).await.unwrap();
    Subject { store: Arc::new(store), is_exact: false, _data: data }
}

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

fn owner() -> Owner {
    Owner { tenant: "acme".into(), user: "ann".into() }
}

fn new_request(client_id: Option<&str>) -> NewRequest {
    NewRequest {
        uid: Uid::new(at(1000)),
        client_id: client_id.map(str::to_owned),
        owner: owner(),
        action: "work".into(),
        payload: StoredPayload {
            content_type: "application/json".into(),
            data: Bytes::from_static(b"{\"n\":9223372036854775807}"),
        },
        metadata: Some(Bytes::from_static(b"{}")),
        priority: 0,
        create_time: at(1000),
        not_before: at(1000),
        deadline: None,
        close_by: None,
        redrive_of: None,
        trace_parent: Some("00-a-b-01".into()),
        trace_state: Some("vendor=1".into()),
        fingerprint: [7; 32],
        quota: Quota::default(),
    }
}

async fn create(store: &dyn Store, new: NewRequest) -> Uid {
    let uid = new.uid;
    let created = store.create_request(new).await.unwrap();
    assert!(matches!(created, CreateOutcome::Created(..)), "{created:?}");
    uid
}

async fn try_claim(store: &dyn Store, uid: Uid, now: i64) -> ClaimOutcome {
    let (holder, lease_until) = ("p1".into(), at(now + 1000));
    let claim = Claim { uid, holder, worker: None, now: at(now), lease_until, repeats: None };
    store.claim(claim).await.unwrap()
}

async fn claim(store: &dyn Store, uid: Uid, now: i64) -> Claimed {
    match try_claim(store, uid, now).await {
        ClaimOutcome::Claimed(claimed) => *claimed,
        other => panic!("{other:?}"),
    }
}

fn event(seq: i64, attempt: i32, kind: Kind) -> Event {
    Event { seq, attempt, time: None, kind: Some(kind) }
}

fn progress(seq: i64, attempt: i32) -> Event {
    let message = format!("at {seq}");
    event(seq, attempt, Kind::Progress(Progress { message, ..Progress::default() }))
}

fn succeeded(seq: i64, attempt: i32) -> Event {
    let output = Some(OutputSummary { chunks: 1, sha256: vec![1; 32].into() });
    event(seq, attempt, Kind::Succeeded(Succeeded { result: None, output }))
}

fn retrying(seq: i64, attempt: i32) -> Event {
    event(seq, attempt, Kind::Retrying(Retrying::default()))
}

fn append_as(uid: Uid, writer: Writer, events: Vec<Event>) -> Append {
    Append { uid, writer, events, checkpoint: None, retry_at: None, now: at(5000) }
}

async fn append(store: &dyn Store, uid: Uid, attempt: u16, events: Vec<Event>) -> AppendOutcome {
    store.append(append_as(uid, Writer::Attempt(attempt.into()), events)).await.unwrap()
}

const APPLIED: AppendOutcome = AppendOutcome::Applied { cancel_reason: None };

fn fenced(state: RequestState, attempt: u16, last_seq: u32) -> AppendOutcome {
    AppendOutcome::Fenced { state, attempt: attempt.into(), last_seq: last_seq.into() }
}

async fn seqs(store: &dyn Store, uid: Uid, after: u32) -> Vec<i64> {
    let page = store.read_events(uid, after.into(), 1000, usize::MAX).await.unwrap();
    page.events.iter().map(|event| event.seq).collect()
}

#[tokio::test]
async fn a_created_request_exists_with_its_first_event() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(Some("req-1"))).await;
        let record = store.get_request(uid).await.unwrap().unwrap();
        assert_eq!(record.state, RequestState::Queued);
        assert_eq!((record.attempt, record.last_seq), (AttemptNumber::NONE, Seq::FIRST));
        assert_eq!(record.request_id(), "req-1");
        assert_eq!(record.trace_parent.as_deref(), Some("00-a-b-01"));
        assert_eq!(record.trace_state.as_deref(), Some("vendor=1"));
        let payload = store.read_payload(uid).await.unwrap().unwrap();
        assert_eq!(&payload.data[..], b"{\"n\":9223372036854775807}");
        assert_eq!(seqs(&*store, uid, 0).await, [1]);
        assert_eq!(store.get_request(Uid::new(at(1))).await.unwrap(), None);
    }
}

#[tokio::test]
async fn a_repeated_id_returns_the_request_or_a_conflict() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(Some("req-1"))).await;
        let again = store.create_request(new_request(Some("req-1"))).await.unwrap();
        assert!(matches!(again, CreateOutcome::Existing(record) if record.uid == uid));
        let other = NewRequest { fingerprint: [8; 32], ..new_request(Some("req-1")) };
        let conflict = store.create_request(other).await.unwrap();
        assert!(matches!(conflict, CreateOutcome::Conflict(record) if record.uid == uid));
        // The same ID of a different user, and a missing ID, create separate requests.
        let bob = Owner { tenant: "acme".into(), user: "bob".into() };
        create(&*store, NewRequest { owner: bob.clone(), ..new_request(Some("req-1")) }).await;
        create(&*store, new_request(None)).await;
        let found = store.find_request(owner(), "req-1".into()).await.unwrap().unwrap();
        assert_eq!(found.uid, uid);
        assert_ne!(store.find_request(bob, "req-1".into()).await.unwrap().unwrap().uid, uid);
    }
}

#[tokio::test]
async fn concurrent_submissions_of_one_id_create_one_request() {
    for Subject { store, .. } in engines().await {
        let tasks: Vec<_> = (0..50)
            .map(|_| {
                let store = store.clone();
                tokio::spawn(async move { store.create_request(new_request(Some("one"))).await })
            })
            .collect();
        let mut created = 0;
        for task in tasks {
            match task.await.unwrap().unwrap() {
                CreateOutcome::Created(..) => created += 1,
                CreateOutcome::Existing(_) => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(created, 1);
    }
}

/// Retries a submission until the quota allows it: engines that several processes share count requests with a
/// delay.
async fn create_within_quota(store: &dyn Store, new: impl Fn() -> NewRequest) -> Uid {
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    for _ in 0..300 {
        ticks.tick().await;
        match store.create_request(new()).await.unwrap() {
            CreateOutcome::Created(record, ..) => return record.uid,
            CreateOutcome::OverQuota(_) => {}
            other => panic!("{other:?}"),
        }
    }
    panic!("the quota stays exhausted");
}

/// Submits `count` requests; asserts that the next request exceeds `limit`.
async fn fill(
    store: &dyn Store,
    new: impl Fn() -> NewRequest,
    count: usize,
    limit: TenantLimit,
) -> Vec<Uid> {
    let mut created = Vec::new();
    for _ in 0..count {
        created.push(create_within_quota(store, &new).await);
    }
    let rejected = store.create_request(new()).await.unwrap();
    assert!(matches!(rejected, CreateOutcome::OverQuota(found) if found == limit), "{rejected:?}");
    created
}

#[tokio::test]
async fn queued_requests_of_an_owner_are_limited_by_its_quota() {
    for Subject { store, is_exact, .. } in engines().await {
        let quota = Quota { queued_of_tenant: 9, queued_of_user: 6, stored_bytes_of_tenant: 0 };
        let request_of = |user: &str| NewRequest {
            owner: Owner { tenant: "acme".into(), user: user.into() },
            quota,
            ..new_request(None)
        };
        let (ann, bob) = (|| request_of("ann"), || request_of("bob"));
        create(&*store, NewRequest { client_id: Some("first".into()), ..ann() }).await;
        let uids = fill(&*store, ann, 5, TenantLimit::QueuedPerUser).await;
        let of_bob = fill(&*store, bob, 3, TenantLimit::QueuedPerTenant).await;
        // A repeated submission does not count again, and other tenants are not affected.
        let repeated = NewRequest { client_id: Some("first".into()), ..ann() };
        let repeated = store.create_request(repeated).await.unwrap();
        assert!(matches!(repeated, CreateOutcome::Existing(_)), "{repeated:?}");
        let owner = Owner { tenant: "globex".into(), user: "ann".into() };
        create(&*store, NewRequest { owner, ..ann() }).await;

        // Requests that leave the queue no longer count.
        claim(&*store, uids[0], 2000).await;
        fill(&*store, bob, 1, TenantLimit::QueuedPerTenant).await;
        if !is_exact {
            // Each step waits for a count of the requests, which is updated at an interval.
            continue;
        }
        store.cancel(uids[1], "enough".into(), at(2000)).await.unwrap();
        fill(&*store, ann, 1, TenantLimit::QueuedPerTenant).await;
        let failed = event(2, 0, Kind::Failed(Failed::default()));
        let overdue = append_as(of_bob[0], Writer::Queued(AttemptNumber::NONE), vec![failed]);
        assert_eq!(store.append(overdue).await.unwrap(), APPLIED);
        fill(&*store, bob, 1, TenantLimit::QueuedPerTenant).await;
        // A retry is never rejected, but counts again.
        assert_eq!(append(&*store, uids[0], 1, vec![retrying(3, 1)]).await, APPLIED);
        claim(&*store, of_bob[1], 2000).await;
        fill(&*store, ann, 0, TenantLimit::QueuedPerUser).await;
        fill(&*store, bob, 0, TenantLimit::QueuedPerTenant).await;
    }
}

#[tokio::test]
async fn the_embedded_engine_limits_the_stored_bytes_of_a_tenant() {
    let data = TempDir::new().unwrap();
    let mut store = open(data.path()).unwrap();
    let limit = 26_000;
    let new = |bytes: usize| NewRequest {
        payload: StoredPayload { content_type: String::new(), data: vec![7; bytes].into() },
        quota: Quota { stored_bytes_of_tenant: limit, ..Quota::default() },
        ..new_request(None)
    };
    let uids = fill(&*store, || new(3_000), 6, TenantLimit::StoredBytesPerTenant).await;
    let other = Owner { tenant: "globex".into(), user: "ann".into() };
    create(&*store, NewRequest { owner: other, ..new(19_000) }).await;

    // Output counts but is not rejected; data from before a restart also counts.
    claim(&*store, uids[0], 2000).await;
    let events = vec![chunk(3, 1, 9_000), succeeded(4, 1)];
    assert_eq!(append(&*store, uids[0], 1, events).await, APPLIED);
    drop(store);
    store = open(data.path()).unwrap();
    for uid in &uids[1..3] {
        store.cancel(*uid, "enough".into(), at(2000)).await.unwrap();
        store.delete_request(*uid).await.unwrap();
    }
    let rejected = store.create_request(new(100)).await.unwrap();
    assert!(
        matches!(rejected, CreateOutcome::OverQuota(TenantLimit::StoredBytesPerTenant)),
        "{rejected:?}"
    );
    store.delete_request(uids[0]).await.unwrap();
    store.delete_request(uids[0]).await.unwrap();
    fill(&*store, || new(3_000), 3, TenantLimit::StoredBytesPerTenant).await;
}

#[tokio::test]
async fn a_request_is_found_by_client_id_and_by_uid() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(Some("req-1"))).await;
        let find = |name: String| {
            let store = store.clone();
            async move {
                find_by_client_id_or_uid(&*store, &owner(), &name).await.unwrap().map(|r| r.uid)
            }
        };
        assert_eq!(find("req-1".into()).await, Some(uid));
        assert_eq!(find(uid.to_string()).await, Some(uid));
        assert_eq!(find("req-2".into()).await, None);
        // A client ID with the format of a uid is found as a client ID.
        let shaped = Uid::new(at(77)).to_string();
        let other = create(&*store, new_request(Some(&shaped))).await;
        assert_eq!(find(shaped).await, Some(other));
    }
}

#[tokio::test]
async fn one_claim_succeeds_and_its_attempt_fences_other_writers() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(None)).await;
        let claimed = claim(&*store, uid, 2000).await;
        let running = (AttemptNumber::FIRST, Seq::from(2));
        assert_eq!((claimed.record.attempt, claimed.record.last_seq), running);
        assert_eq!(claimed.started.seq, 2);
        assert!(matches!(try_claim(&*store, uid, 2000).await, ClaimOutcome::NotClaimable));
        assert_eq!(append(&*store, uid, 1, vec![progress(3, 1), progress(4, 1)]).await, APPLIED);
        let fenced = fenced(RequestState::Running, 1, 4);
        assert_eq!(append(&*store, uid, 2, vec![progress(5, 2)]).await, fenced);
        assert_eq!(append(&*store, uid, 1, vec![progress(6, 1)]).await, fenced, "a gap");
        assert_eq!(
            append(&*store, uid, 1, vec![output(4, 1)]).await,
            fenced,
            "a different event 4"
        );
        assert_eq!(seqs(&*store, uid, 0).await, [1, 2, 3, 4]);
        let record = store.get_request(uid).await.unwrap().unwrap();
        assert_eq!(record.progress.unwrap().message, "at 4");
    }
}

fn output(seq: i64, attempt: i32) -> Event {
    event(seq, attempt, Kind::Output(Output::default()))
}

#[tokio::test]
async fn a_repeated_append_changes_nothing() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(None)).await;
        claim(&*store, uid, 2000).await;
        let events = vec![progress(3, 1), succeeded(4, 1)];
        assert_eq!(append(&*store, uid, 1, events.clone()).await, APPLIED);
        assert_eq!(append(&*store, uid, 1, events).await, APPLIED);
        assert_eq!(seqs(&*store, uid, 0).await, [1, 2, 3, 4]);
    }
}

#[tokio::test]
async fn appends_after_a_terminal_event_are_fenced() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(None)).await;
        claim(&*store, uid, 2000).await;
        append(&*store, uid, 1, vec![succeeded(3, 1)]).await;
        let record = store.get_request(uid).await.unwrap().unwrap();
        assert_eq!(record.state, RequestState::Succeeded);
        assert_eq!(record.finish_time, Some(at(5000)));
        assert_eq!(record.output.unwrap().chunks, 1);
        let fenced = fenced(RequestState::Succeeded, 1, 3);
        assert_eq!(append(&*store, uid, 1, vec![progress(4, 1)]).await, fenced);
        assert!(matches!(try_claim(&*store, uid, 9000).await, ClaimOutcome::NotClaimable));
        let cancelled = store.cancel(uid, "late".into(), at(9000)).await.unwrap();
        assert!(matches!(cancelled, CancelOutcome::Ended(_)));
        assert_eq!(seqs(&*store, uid, 0).await, [1, 2, 3]);
    }
}

#[tokio::test]
async fn events_with_numbers_out_of_range_are_rejected() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(None)).await;
        claim(&*store, uid, 2000).await;
        let rewind = Kind::Retrying(Retrying { rewind_to_seq: -1, ..Retrying::default() });
        for (invalid, field) in [
            (progress(-3, 1), "event.seq"),
            (progress(3, -1), "event.attempt"),
            (event(3, 1, rewind), "event.retrying.rewind_to_seq"),
        ] {
            let rejected = store
                .append(append_as(uid, Writer::Attempt(AttemptNumber::FIRST), vec![invalid]))
                .await
                .unwrap_err();
            assert!(rejected.to_string().contains(field), "{rejected}");
        }
        assert_eq!(append(&*store, uid, 1, vec![progress(3, 1)]).await, APPLIED);
    }
}

#[tokio::test]
async fn a_retry_is_claimable_when_due_and_has_the_checkpoint() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(None)).await;
        claim(&*store, uid, 2000).await;
        let checkpoint = Append {
            checkpoint: Some(Bytes::from_static(b"half")),
            ..append_as(uid, Writer::Attempt(AttemptNumber::FIRST), Vec::new())
        };
        assert_eq!(store.append(checkpoint.clone()).await.unwrap(), APPLIED);
        let retry = Append {
            retry_at: Some(at(8000)),
            ..append_as(uid, Writer::Attempt(AttemptNumber::FIRST), vec![retrying(3, 1)])
        };
        assert_eq!(store.append(retry).await.unwrap(), APPLIED);
        assert!(matches!(store.append(checkpoint).await.unwrap(), AppendOutcome::Fenced { .. }));
        assert!(matches!(try_claim(&*store, uid, 7999).await, ClaimOutcome::NotClaimable));
        let released = store.release_delayed(at(5000), 10).await.unwrap();
        assert_eq!(released, ReleasedRequests { count: 0, next_due: Some(at(8000)) });
        let again = claim(&*store, uid, 8000).await;
        let second = (AttemptNumber::from(2), Seq::from(4));
        assert_eq!((again.record.attempt, again.record.attempt_seq), second);
        assert_eq!(again.checkpoint.as_deref(), Some(&b"half"[..]));
        // The first attempt is fenced.
        let late = append(&*store, uid, 1, vec![progress(5, 1)]).await;
        assert_eq!(late, fenced(RequestState::Running, 2, 4));
    }
}

#[tokio::test]
async fn cancel_ends_queued_requests_and_marks_running_ones() {
    for Subject { store, .. } in engines().await {
        let queued = create(&*store, new_request(None)).await;
        let cancelled = store.cancel(queued, "enough".into(), at(3000)).await.unwrap();
        let CancelOutcome::Cancelled(record, event) = cancelled else { panic!("{cancelled:?}") };
        assert_eq!((record.state, event.seq), (RequestState::Cancelled, 2));
        assert_eq!(seqs(&*store, queued, 0).await, [1, 2]);
        assert!(matches!(try_claim(&*store, queued, 4000).await, ClaimOutcome::NotClaimable));

        let running = create(&*store, new_request(None)).await;
        claim(&*store, running, 2000).await;
        for reason in ["first", "second"] {
            let cancelled = store.cancel(running, reason.into(), at(3000)).await.unwrap();
            let CancelOutcome::Requested(record) = cancelled else { panic!("{cancelled:?}") };
            assert_eq!(record.cancel_reason.as_deref(), Some("first"));
        }
        let applied = AppendOutcome::Applied { cancel_reason: Some("first".into()) };
        assert_eq!(append(&*store, running, 1, vec![progress(3, 1)]).await, applied);
        let unknown = store.cancel(Uid::new(at(1)), String::new(), at(1)).await.unwrap();
        assert!(matches!(unknown, CancelOutcome::NotFound));
    }
}

#[tokio::test]
async fn leases_are_renewed_only_by_their_holder_and_expire() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(None)).await;
        claim(&*store, uid, 2000).await;
        let lease = Lease { uid, attempt: AttemptNumber::FIRST };
        assert!(store.expired_leases(at(2999), 10).await.unwrap().is_empty());
        let renew = |holder: &str, until| {
            let (store, holder) = (store.clone(), holder.to_owned());
            async move {
                store.renew_leases(holder, vec![lease], at(until), at(2500)).await.unwrap()[0].held
            }
        };
        assert!(renew("p1", 4000).await);
        assert!(!renew("p2", 9000).await, "held by p1");
        assert!(store.expired_leases(at(3999), 10).await.unwrap().is_empty());
        assert_eq!(store.expired_leases(at(4000), 10).await.unwrap()[0].uid, uid);
        let recovery = |now| Append {
            now: at(now),
            retry_at: Some(at(now)),
            ..append_as(uid, Writer::ExpiredLease(AttemptNumber::FIRST), vec![retrying(3, 1)])
        };
        assert!(matches!(
            store.append(recovery(3999)).await.unwrap(),
            AppendOutcome::Fenced { .. }
        ));
        assert_eq!(store.append(recovery(4000)).await.unwrap(), APPLIED);
        assert!(!renew("p1", 9000).await, "recovered");
        let late = append(&*store, uid, 1, vec![progress(4, 1)]).await;
        assert!(matches!(late, AppendOutcome::Fenced { state: RequestState::Queued, .. }));
    }
}

async fn due(store: &dyn Store, actions: &[&str], per_tenant: usize) -> Vec<Uid> {
    let query = DueQuery {
        actions: actions.iter().map(ToString::to_string).collect(),
        after: None,
        tenants: 10,
        per_tenant,
        users: 10,
        after_users: HashMap::new(),
        extra_per_user: 0,
        limits: HashMap::new(),
        blocked: HashSet::new(),
    };
    store.release_delayed(at(2000), 10).await.unwrap();
    let page = store.due_requests(query).await.unwrap();
    page.requests.into_iter().map(|request| request.uid).collect()
}

#[tokio::test]
async fn the_queue_is_read_by_tenant_in_pages() {
    for Subject { store, .. } in engines().await {
        let mut by_tenant = Vec::new();
        for (offset, tenant) in [(0, "a"), (1, "b"), (2, "c")] {
            let owner = Owner { tenant: tenant.into(), user: "u".into() };
            for age in 0..3 {
                let owner = owner.clone();
                let not_before = at(1000 + age * 10 + offset);
                let new = NewRequest { owner, not_before, ..new_request(None) };
                by_tenant.push(create(&*store, new).await);
            }
        }
        let query = |after: Option<QueueKey>, tenants| DueQuery {
            actions: vec!["work".into()],
            after,
            tenants,
            per_tenant: 2,
            users: 10,
            after_users: HashMap::new(),
            extra_per_user: 0,
            limits: HashMap::new(),
            blocked: HashSet::new(),
        };
        let uids = |page: &DuePage| page.requests.iter().map(|due| due.uid).collect::<Vec<_>>();
        store.release_delayed(at(2000), 10).await.unwrap();
        let first = store.due_requests(query(None, 2)).await.unwrap();
        assert_eq!(uids(&first), [by_tenant[0], by_tenant[1], by_tenant[3], by_tenant[4]]);
        let last = QueueKey { action: "work".into(), tenant: "b".into() };
        assert_eq!(first.next, Some(last));
        assert_eq!(first.incomplete, HashSet::from(["a".to_owned(), "b".to_owned()]));
        let second = store.due_requests(query(first.next, 2)).await.unwrap();
        assert_eq!(uids(&second), [by_tenant[6], by_tenant[7]]);
        assert_eq!(second.next, None);

        let limits = HashMap::from([("a".to_owned(), 0), ("b".to_owned(), 1)]);
        let limited = DueQuery { limits, ..query(None, 10) };
        let limited = store.due_requests(limited).await.unwrap();
        assert_eq!(uids(&limited), [by_tenant[3], by_tenant[6], by_tenant[7]]);

        let blocked = HashSet::from([("b".to_owned(), "work".to_owned())]);
        let unblocked = store.due_requests(DueQuery { blocked, ..query(None, 2) }).await.unwrap();
        assert_eq!(uids(&unblocked), [by_tenant[0], by_tenant[1]]);

        let last = store.get_request(by_tenant[8]).await.unwrap().unwrap();
        let ahead = store.queue_ahead(last.clone(), 100).await.unwrap();
        assert_eq!((ahead.own, ahead.others), (2, 6));
        let ahead = store.queue_ahead(last, 4).await.unwrap();
        assert_eq!((ahead.own, ahead.others), (2, 4), "counts up to the limit");
    }
}

#[tokio::test]
async fn the_limit_of_a_tenant_is_divided_among_its_users() {
    for Subject { store, .. } in engines().await {
        let mut uids = HashMap::new();
        for (user, priority, count) in [("ann", 5, 20), ("bob", 5, 1), ("eve", 0, 2)] {
            for number in 0..count {
                let owner = Owner { tenant: "acme".into(), user: user.into() };
                let not_before = at(1000 + number);
                let new = NewRequest { owner, priority, not_before, ..new_request(None) };
                uids.insert((user, number), create(&*store, new).await);
            }
        }
        store.release_delayed(at(2000), 100).await.unwrap();
        let position = (QueueKey { action: "work".into(), tenant: "acme".into() }, 5);
        let query = |per_tenant, users, after: Option<&str>| DueQuery {
            actions: vec!["absent".into(), "work".into()],
            after: None,
            tenants: 10,
            per_tenant,
            users,
            after_users: after
                .map(|user| (position.clone(), user.to_owned()))
                .into_iter()
                .collect(),
            extra_per_user: 0,
            limits: HashMap::new(),
            blocked: HashSet::new(),
        };
        let read = async |query| {
            let page = store.due_requests(query).await.unwrap();
            let mut read = Vec::new();
            for due in &page.requests {
                assert_eq!((&*due.tenant, &*due.action), ("acme", "work"));
                let (key, _) = uids.iter().find(|(_, uid)| **uid == due.uid).unwrap();
                assert_eq!(key.0, due.user);
                read.push(*key);
            }
            read.sort_unstable();
            (read, page)
        };
        let (four, page) = read(query(4, 10, None)).await;
        assert_eq!(four, [("ann", 0), ("ann", 1), ("ann", 2), ("bob", 0), ("eve", 0)]);
        assert!(page.incomplete.contains("acme") && page.next_users.is_empty());
        let (one, _) = read(query(1, 10, None)).await;
        assert_eq!(one, [("ann", 0), ("bob", 0), ("eve", 0)], "at least one request of each user");
        let (all, page) = read(query(100, 10, None)).await;
        assert_eq!((all.len(), page.incomplete.len()), (23, 0));

        let (first, page) = read(query(2, 1, None)).await;
        assert_eq!(first, [("ann", 0), ("ann", 1), ("eve", 0)]);
        assert_eq!(page.next_users[&position], "ann");
        let (second, page) = read(query(2, 1, Some("ann"))).await;
        assert_eq!(second, [("bob", 0), ("eve", 0)], "a lower priority fills the page");
        assert_eq!(page.next_users[&position], "bob");
        let (third, _) = read(query(2, 1, Some("bob"))).await;
        assert_eq!(third, [("ann", 0), ("ann", 1), ("eve", 0)], "begins with the first user again");
    }
}

#[tokio::test]
async fn requests_of_other_users_may_start_first() {
    for Subject { store, .. } in engines().await {
        for (tenant, user, priority) in [
            ("acme", "ann", 1),
            ("acme", "bob", 0),
            ("acme", "ann", 0),
            ("globex", "dan", 0),
            ("globex", "dan", 1),
        ] {
            let owner = Owner { tenant: tenant.into(), user: user.into() };
            let not_before = at(1000);
            create(&*store, NewRequest { owner, priority, not_before, ..new_request(None) }).await;
        }
        let owner = Owner { tenant: "acme".into(), user: "ann".into() };
        let new = NewRequest { owner, not_before: at(1001), ..new_request(None) };
        let uid = create(&*store, new).await;
        store.release_delayed(at(2000), 100).await.unwrap();
        let last = store.get_request(uid).await.unwrap().unwrap();
        let ahead = store.queue_ahead(last, 100).await.unwrap();
        assert_eq!((ahead.own, ahead.others), (2, 3));
    }
}

#[tokio::test]
async fn declarations_are_stored_per_tenant() {
    for Subject { store, .. } in engines().await {
        let declared = |tenant: Option<&str>, description: &str| DeclaredAction {
            tenant: tenant.map(str::to_owned),
            action: Action {
                name: "work".into(),
                description: description.into(),
                ..Action::default()
            },
        };
        let first = vec![declared(None, "for all"), declared(Some("acme"), "for acme")];
        for _ in 0..2 {
            store.save_actions(first.clone(), at(1000)).await.unwrap();
        }
        assert_eq!(store.list_actions(at(1000)).await.unwrap(), first);
        store.save_actions(vec![declared(Some("acme"), "newer")], at(2000)).await.unwrap();
        let since = store.list_actions(at(1001)).await.unwrap();
        assert_eq!(since, [declared(Some("acme"), "newer")]);
        assert_eq!(store.list_actions(at(0)).await.unwrap().len(), 2);
    }
}

#[tokio::test]
async fn a_request_without_a_delay_is_due_for_every_clock() {
    for Subject { store, .. } in engines().await {
        let now = at(500_000);
        let undelayed = NewRequest { create_time: now, not_before: now, ..new_request(None) };
        let undelayed = create(&*store, undelayed).await;
        let delayed = NewRequest { create_time: now, not_before: at(500_001), ..new_request(None) };
        let delayed = create(&*store, delayed).await;
        assert_eq!(due(&*store, &["work"], 10).await, [undelayed]);
        assert!(matches!(try_claim(&*store, delayed, 2000).await, ClaimOutcome::NotClaimable));
        assert_eq!(claim(&*store, undelayed, 2000).await.record.attempt, AttemptNumber::FIRST);
    }
}

#[tokio::test]
async fn a_repeated_claim_returns_the_attempt_that_its_first_call_started() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(None)).await;
        let worker = |identity: &str| {
            Some(AssignedWorker { identity: identity.into(), display_name: "shown".into() })
        };
        let claim = |holder: &str, identity: &str, now, repeats: Option<i64>| Claim {
            uid,
            holder: holder.into(),
            worker: worker(identity),
            now: at(now),
            lease_until: at(now + 1000),
            repeats: repeats.map(at),
        };
        // The first call was not stored.
        let first = store.claim(claim("p1", "w1", 2100, Some(2000))).await.unwrap();
        let ClaimOutcome::Claimed(first) = first else { panic!("{first:?}") };
        for since in [2000, 2100] {
            let again = store.claim(claim("p1", "w1", 2200, Some(since))).await.unwrap();
            let ClaimOutcome::Claimed(again) = again else { panic!("{again:?}") };
            assert_eq!(again.started, first.started);
            assert_eq!(again.payload, first.payload);
            assert_eq!(again.record.attempt, first.record.attempt);
        }
        for other in [
            claim("p1", "w1", 2200, None),
            claim("p1", "w1", 2200, Some(2101)),
            claim("p2", "w1", 2200, Some(2000)),
            claim("p1", "w2", 2200, Some(2000)),
        ] {
            let outcome = store.claim(other).await.unwrap();
            assert!(matches!(outcome, ClaimOutcome::NotClaimable), "{outcome:?}");
        }
        assert_eq!(seqs(&*store, uid, 0).await, [1, 2]);
    }
}

#[tokio::test]
async fn an_attempt_is_adopted_only_for_its_worker() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(None)).await;
        let new_claim = Claim {
            uid,
            holder: "p1".into(),
            worker: Some(AssignedWorker { identity: "w1".into(), display_name: "shown".into() }),
            now: at(2000),
            lease_until: at(3000),
            repeats: None,
        };
        let ClaimOutcome::Claimed(claimed) = store.claim(new_claim).await.unwrap() else {
            panic!()
        };
        let Some(Kind::Started(started)) = &claimed.started.kind else { panic!() };
        assert_eq!(started.worker, "shown");
        let adopt = |worker: &str, attempt: u16| Adopt {
            lease: Lease { uid, attempt: attempt.into() },
            holder: "p2".into(),
            worker_identity: worker.into(),
            now: at(2500),
            lease_until: at(9000),
        };
        for (worker, attempt) in [("w2", 1), ("w1", 2)] {
            assert_eq!(store.adopt(adopt(worker, attempt)).await.unwrap(), None);
        }
        for _ in 0..2 {
            let adopted = store.adopt(adopt("w1", 1)).await.unwrap().unwrap();
            assert_eq!((adopted.attempt, adopted.last_seq), (AttemptNumber::FIRST, Seq::from(2)));
        }
        let lease = vec![Lease { uid, attempt: AttemptNumber::FIRST }];
        let renewed =
            store.renew_leases("p1".into(), lease.clone(), at(9999), at(2500)).await.unwrap();
        assert!(!renewed[0].held, "the previous holder has lost the lease");
        assert!(store.renew_leases("p2".into(), lease, at(9999), at(2500)).await.unwrap()[0].held);
        assert_eq!(append(&*store, uid, 1, vec![succeeded(3, 1)]).await, APPLIED);
        assert_eq!(store.adopt(adopt("w1", 1)).await.unwrap(), None, "the attempt has ended");
    }
}

#[tokio::test]
async fn overdue_requests_are_found_also_between_attempts() {
    for Subject { store, .. } in engines().await {
        let unstarted =
            NewRequest { deadline: Some(at(1500)), close_by: Some(at(9000)), ..new_request(None) };
        let unstarted = create(&*store, unstarted).await;
        let retried =
            NewRequest { deadline: Some(at(2500)), close_by: Some(at(4000)), ..new_request(None) };
        let retried = create(&*store, retried).await;
        create(&*store, new_request(None)).await;
        claim(&*store, retried, 2000).await;
        let overdue = async |now| {
            let found = store.overdue_requests(at(now), 10).await.unwrap();
            found.into_iter().map(|record| record.uid).collect::<Vec<_>>()
        };
        assert_eq!(overdue(1499).await, []);
        assert_eq!(overdue(2600).await, [unstarted], "running requests are excluded");
        let retry = Append {
            retry_at: Some(at(2700)),
            ..append_as(retried, Writer::Attempt(AttemptNumber::FIRST), vec![retrying(3, 1)])
        };
        assert_eq!(store.append(retry).await.unwrap(), APPLIED);
        assert_eq!(overdue(3999).await, [unstarted], "the deadline applies to the first attempt");
        assert_eq!(overdue(4000).await, [unstarted, retried]);
        let outcome = try_claim(&*store, retried, 4000).await;
        assert!(matches!(outcome, ClaimOutcome::Overdue(_)), "{outcome:?}");
    }
}

#[tokio::test]
async fn failed_attempts_are_counted_and_released_attempts_are_not() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(None)).await;
        let mut counts = Vec::new();
        for (attempt, released) in [(1, false), (2, true), (3, false)] {
            let claimed = claim(&*store, uid, 2000).await;
            counts.push(claimed.record.failed_attempts);
            let seq = claimed.record.last_seq.next().as_i64();
            let kind = Retrying { rewind_to_seq: seq - 1, released, ..Retrying::default() };
            let writer = Writer::Attempt(claimed.record.attempt);
            let events = vec![event(seq, attempt, Kind::Retrying(kind))];
            let retry = Append { retry_at: Some(at(2000)), ..append_as(uid, writer, events) };
            assert_eq!(store.append(retry.clone()).await.unwrap(), APPLIED);
            assert_eq!(store.append(retry).await.unwrap(), APPLIED, "a repetition");
        }
        let record = store.get_request(uid).await.unwrap().unwrap();
        counts.push(record.failed_attempts);
        assert_eq!((counts, record.attempt), (vec![0, 1, 1, 2], AttemptNumber::from(3)));
        let log = store.read_events(uid, Seq::NONE, 100, usize::MAX).await.unwrap();
        let released = log.events.iter().filter_map(|event| match &event.kind {
            Some(Kind::Retrying(retrying)) => Some(retrying.released),
            _ => None,
        });
        assert_eq!(released.collect::<Vec<_>>(), [false, true, false]);
    }
}

#[tokio::test]
async fn delayed_requests_are_in_the_queue_after_their_release() {
    for Subject { store, .. } in engines().await {
        let mut uids = Vec::new();
        for not_before in [1900, 1500, 9000, 1000] {
            let new = NewRequest { not_before: at(not_before), ..new_request(None) };
            uids.push(create(&*store, new).await);
        }
        // A request can be claimed before its release. After a retry without a delay, it is in the queue.
        claim(&*store, uids[0], 2000).await;
        let writer = Writer::Attempt(AttemptNumber::FIRST);
        let retry = append_as(uids[0], writer, vec![retrying(3, 1)]);
        let retry = Append { retry_at: Some(at(2000)), now: at(2000), ..retry };
        assert_eq!(store.append(retry).await.unwrap(), APPLIED);
        let next_due = loop {
            let released = store.release_delayed(at(2000), 1).await.unwrap();
            if released.count == 0 {
                break released.next_due;
            }
        };
        assert_eq!(next_due, Some(at(9000)));
        assert_eq!(due(&*store, &["work"], 10).await, [uids[3], uids[1], uids[0]]);
        assert_eq!(due(&*store, &["other"], 10).await, []);
        let stats = store.queue_stats().await.unwrap();
        assert_eq!((stats.queued, stats.oldest_due), (4, Some(at(1000))));
        let last = store.get_request(uids[0]).await.unwrap().unwrap();
        assert_eq!(store.queue_ahead(last, 10).await.unwrap().own, 2);
    }
}

#[tokio::test]
async fn due_requests_are_filtered_by_action_and_ordered_by_priority_then_age() {
    for Subject { store, .. } in engines().await {
        let mut expected = Vec::new();
        for (priority, not_before, action) in [
            (0, 1002, "work"),
            (0, 1001, "work"),
            (9, 1003, "work"),
            (0, 9000, "work"),
            (9, 1000, "other"),
        ] {
            let new = NewRequest {
                priority,
                not_before: at(not_before),
                action: action.into(),
                ..new_request(None)
            };
            expected.push(create(&*store, new).await);
        }
        assert_eq!(due(&*store, &["work"], 10).await, [expected[2], expected[1], expected[0]]);
        let one_of_each_priority = [expected[4], expected[2], expected[1]];
        assert_eq!(due(&*store, &["work", "other"], 1).await, one_of_each_priority);
        let stats = store.queue_stats().await.unwrap();
        assert_eq!((stats.queued, stats.oldest_due), (5, Some(at(1000))));
    }
}

#[tokio::test]
async fn a_claim_past_the_deadline_is_overdue_and_the_request_can_be_failed() {
    for Subject { store, .. } in engines().await {
        let new = NewRequest { deadline: Some(at(1500)), ..new_request(None) };
        let uid = create(&*store, new).await;
        let outcome = try_claim(&*store, uid, 1500).await;
        assert!(matches!(outcome, ClaimOutcome::Overdue(_)), "{outcome:?}");
        let failed = event(2, 0, Kind::Failed(Failed::default()));
        let fail = append_as(uid, Writer::Queued(AttemptNumber::NONE), vec![failed]);
        assert_eq!(store.append(fail).await.unwrap(), APPLIED);
        let record = store.get_request(uid).await.unwrap().unwrap();
        assert_eq!(record.state, RequestState::Failed);
    }
}

#[tokio::test]
async fn a_log_is_read_from_any_position_within_limits() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(None)).await;
        claim(&*store, uid, 2000).await;
        append(&*store, uid, 1, (3..=9).map(|seq| progress(seq, 1)).collect()).await;
        append(&*store, uid, 1, vec![progress(10, 1)]).await;
        assert_eq!(seqs(&*store, uid, 4).await, [5, 6, 7, 8, 9, 10]);
        assert!(seqs(&*store, uid, 10).await.is_empty());
        let started = Seq::from(2);
        let page = store.read_events(uid, started, 3, usize::MAX).await.unwrap();
        assert_eq!((page.events.len(), page.more), (3, true));
        let page = store.read_events(uid, started, 100, 1).await.unwrap();
        assert_eq!((page.events.len(), page.more), (1, true), "at least one");
        let page = store.read_events(uid, started, 8, usize::MAX).await.unwrap();
        assert_eq!((page.events.len(), page.more), (8, false));
    }
}

/// Returns an output event with a chunk of `bytes` bytes.
fn chunk(seq: i64, attempt: i32, bytes: usize) -> Event {
    let data = Payload {
        content_type: "text/plain".into(),
        body: Some(Body::Data(vec![b'x'; bytes].into())),
    };
    event(seq, attempt, Kind::Output(Output { data: Some(data), chunk_index: seq }))
}

#[tokio::test]
async fn a_long_log_is_read_completely_for_all_event_and_batch_sizes() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(None)).await;
        claim(&*store, uid, 2000).await;
        let mut expected = Vec::new();
        let mut seq = 3;
        // Small and large batches, and some events that do not share an item with other events.
        for round in 0..60 {
            let sizes: &[usize] = match round % 6 {
                0 => &[10],
                1 => &[700, 700, 700, 700],
                2 => &[3000],
                3 => &[100, 100_000],
                4 => &[150_000, 10, 250_000],
                _ => &[1, 2, 3, 4, 5, 6, 7, 8],
            };
            let events: Vec<_> =
                sizes.iter().zip(seq..).map(|(bytes, seq)| chunk(seq, 1, *bytes)).collect();
            seq += i64::try_from(events.len()).unwrap();
            for _ in 0..2 {
                assert_eq!(append(&*store, uid, 1, events.clone()).await, APPLIED);
            }
            expected.extend(events);
        }
        let mut after = Seq::from(2);
        let mut read = Vec::new();
        loop {
            let page = store.read_events(uid, after, 50, 1_000_000).await.unwrap();
            after = after.plus(page.events.len());
            read.extend(page.events);
            if !page.more {
                break;
            }
        }
        assert!(read == expected, "all events, as they were appended");
        let last = store.read_events(uid, after.previous(), 10, 1000).await.unwrap();
        assert!(last.events[..] == expected[expected.len() - 1..]);
        assert!(store.read_events(uid, Seq::MAX, 10, 1000).await.unwrap().events.is_empty());
        // More data than one transaction of any engine can contain.
        let large: Vec<_> = (seq..seq + 30).map(|seq| chunk(seq, 1, 60_000)).collect();
        for _ in 0..2 {
            assert_eq!(append(&*store, uid, 1, large.clone()).await, APPLIED);
        }
        let page = store.read_events(uid, after, 100, usize::MAX).await.unwrap();
        assert!(page.events == large);
    }
}

#[tokio::test]
async fn checkpoints_and_events_of_any_size_are_appended_together() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(None)).await;
        claim(&*store, uid, 2000).await;
        let mut seq = 3;
        for (checkpoint, sizes) in [
            (10, vec![10]),
            (1000, vec![3000]),
            (200_000, vec![10]),
            (1000, vec![100_000, 3000]),
            (100_000, vec![200_000, 200_000, 10]),
            (1000, vec![]),
            (20, vec![1500]),
        ] {
            let events: Vec<_> =
                sizes.iter().zip(seq..).map(|(bytes, seq)| chunk(seq, 1, *bytes)).collect();
            seq += i64::try_from(events.len()).unwrap();
            let append = Append {
                checkpoint: Some(vec![7; checkpoint].into()),
                ..append_as(uid, Writer::Attempt(AttemptNumber::FIRST), events)
            };
            assert_eq!(store.append(append).await.unwrap(), APPLIED);
        }
        let retry = Append {
            retry_at: Some(at(6000)),
            ..append_as(uid, Writer::Attempt(AttemptNumber::FIRST), vec![retrying(seq, 1)])
        };
        assert_eq!(store.append(retry).await.unwrap(), APPLIED);
        let again = claim(&*store, uid, 6000).await;
        assert_eq!(again.checkpoint.unwrap().len(), 20);
        let cancel = store.cancel(uid, "enough".into(), at(6500)).await.unwrap();
        assert!(matches!(cancel, CancelOutcome::Requested(_)));
        let applied = AppendOutcome::Applied { cancel_reason: Some("enough".into()) };
        let next = again.record.last_seq.next().as_i64();
        let large = vec![chunk(next, 2, 5000), chunk(next + 1, 2, 5000)];
        assert_eq!(append(&*store, uid, 2, large).await, applied);
        let ended = vec![succeeded(next + 2, 2)];
        assert_eq!(append(&*store, uid, 2, ended).await, applied);
        assert_eq!(store.delete_request(uid).await.unwrap(), DeleteOutcome::Deleted);
        assert!(seqs(&*store, uid, 0).await.is_empty());
    }
}

#[tokio::test]
async fn unusual_values_are_read_back_unchanged() {
    for Subject { store, .. } in engines().await {
        let new = NewRequest {
            payload: StoredPayload {
                content_type: String::new(),
                data: Bytes::from_static(&[0, 159, 146, 150]),
            },
            ..new_request(Some("odd"))
        };
        let payload = new.payload.clone();
        let uid = create(&*store, new).await;
        assert_eq!(store.read_payload(uid).await.unwrap(), Some(payload.clone()));
        assert_eq!(claim(&*store, uid, 2000).await.payload, payload);
        let percentages = [0.0, 1e-300, 0.1 + 0.2, 100.0];
        let events: Vec<_> = (3..)
            .zip(percentages)
            .map(|(seq, percentage)| {
                let progress = Progress {
                    percentage: Some(percentage),
                    message: String::new(),
                    metadata: Some(Payload {
                        content_type: "text/plain".into(),
                        body: Some(Body::Data(Bytes::new())),
                    }),
                };
                event(seq, 1, Kind::Progress(progress))
            })
            .collect();
        assert_eq!(append(&*store, uid, 1, events.clone()).await, APPLIED);
        let page = store.read_events(uid, Seq::from(2), 10, 10_000).await.unwrap();
        assert_eq!(page.events, events);
        // The progress of the attempt is kept for any amount of output after it.
        for seq in 7..12 {
            append(&*store, uid, 1, vec![chunk(seq, 1, 900)]).await;
        }
        let record = store.get_request(uid).await.unwrap().unwrap();
        assert_eq!(record.progress.unwrap().percentage, Some(100.0));
    }
}

#[tokio::test]
async fn a_claim_that_its_holder_does_not_renew_expires() {
    for Subject { store, .. } in engines().await {
        let (known, unknown) =
            (create(&*store, new_request(None)).await, create(&*store, new_request(None)).await);
        claim(&*store, known, 2000).await;
        claim(&*store, unknown, 2000).await;
        let lease = vec![Lease { uid: known, attempt: AttemptNumber::FIRST }];
        for now in [2300, 2600, 2900, 3200, 3500] {
            let renewed =
                store.renew_leases("p1".into(), lease.clone(), at(now + 1000), at(now)).await;
            assert!(renewed.unwrap()[0].held);
        }
        let expired: Vec<_> = store
            .expired_leases(at(4400), 10)
            .await
            .unwrap()
            .into_iter()
            .map(|record| record.uid)
            .collect();
        assert_eq!(expired, [unknown]);
    }
}

#[tokio::test]
async fn lists_are_paged_and_filtered_by_tenant_user_and_state() {
    for Subject { store, .. } in engines().await {
        let mut uids = Vec::new();
        for millis in 0..5 {
            let new = NewRequest { uid: Uid::new(at(millis)), ..new_request(None) };
            uids.push(create(&*store, new).await);
        }
        let bob = Owner { tenant: "acme".into(), user: "bob".into() };
        create(&*store, NewRequest { owner: bob, ..new_request(None) }).await;
        let other = Owner { tenant: "other".into(), user: "ann".into() };
        create(&*store, NewRequest { owner: other, ..new_request(None) }).await;
        claim(&*store, uids[1], 2000).await;
        let all = ListRequests {
            tenant: "acme".into(),
            user: Some("ann".into()),
            states: Vec::new(),
            action: None,
            before: None,
            limit: 2,
        };
        let first = store.list_requests(all.clone()).await.unwrap();
        assert_eq!(first.requests.iter().map(|r| r.uid).collect::<Vec<_>>(), [uids[4], uids[3]]);
        let rest = ListRequests { before: first.next, limit: 3, ..all.clone() };
        let rest = store.list_requests(rest).await.unwrap();
        assert_eq!((rest.requests.len(), rest.next), (3, None));
        let running = ListRequests { states: vec![RequestState::Running], ..all.clone() };
        assert_eq!(store.list_requests(running).await.unwrap().requests[0].uid, uids[1]);
        let tenant = ListRequests { user: None, limit: 10, ..all };
        assert_eq!(store.list_requests(tenant).await.unwrap().requests.len(), 6);
    }
}

#[tokio::test]
async fn only_ended_requests_are_deleted() {
    for Subject { store, .. } in engines().await {
        let uid = create(&*store, new_request(Some("gone"))).await;
        assert_eq!(store.delete_request(uid).await.unwrap(), DeleteOutcome::NotEnded);
        store.cancel(uid, String::new(), at(2000)).await.unwrap();
        for _ in 0..2 {
            assert_eq!(store.delete_request(uid).await.unwrap(), DeleteOutcome::Deleted);
        }
        assert_eq!(store.get_request(uid).await.unwrap(), None);
        assert_eq!(store.read_payload(uid).await.unwrap(), None);
        assert!(seqs(&*store, uid, 0).await.is_empty());
        create(&*store, new_request(Some("gone"))).await;
    }
}

#[tokio::test]
async fn connections_are_listed_while_their_gateway_is_alive() {
    for Subject { store, .. } in engines().await {
        let record = |millis, user: &str| ConnectionRecord {
            id: Uid::new(at(millis)),
            owner: Owner { tenant: "acme".into(), user: user.into() },
            gateway: "g1".into(),
            remote_address: "127.0.0.1".into(),
            user_agent: "test".into(),
            connect_time: at(millis),
        };
        let (ann, bob) = (record(1, "ann"), record(2, "bob"));
        store.update_connections(vec![ann.clone(), bob.clone()], Vec::new()).await.unwrap();
        let list = |user: Option<&str>, now| {
            let (store, user) = (store.clone(), user.map(str::to_owned));
            async move {
                let page = store.list_connections("acme".into(), user, None, 10, at(now)).await;
                page.unwrap().connections
            }
        };
        assert!(list(None, 10).await.is_empty(), "the gateway is unknown");
        store.renew_gateway("g1".into(), at(100)).await.unwrap();
        assert_eq!(list(None, 10).await, [ann.clone(), bob.clone()]);
        assert_eq!(list(Some("bob"), 10).await, [bob]);
        assert!(list(None, 100).await.is_empty(), "the gateway has expired");
        store.update_connections(Vec::new(), vec![ann.id]).await.unwrap();
        assert_eq!(list(None, 10).await.len(), 1);
        store.check().await.unwrap();
    }
}

async fn read_backup(backup: Backup) -> Vec<u8> {
    let (mut bytes, mut content) = (Vec::new(), backup.content);
    loop {
        let next = content.next(10_000).await.unwrap();
        if next.is_empty() {
            assert_eq!(bytes.len() as u64, backup.size);
            return bytes;
        }
        assert!(next.len() == 10_000 || bytes.len() + next.len() == backup.size as usize);
        bytes.extend_from_slice(&next);
    }
}

#[tokio::test]
async fn a_backup_contains_the_state_of_one_moment() {
    for Subject { store, is_exact, .. } in engines().await {
        let uid = create(&*store, new_request(Some("before"))).await;
        claim(&*store, uid, 2000).await;
        append(&*store, uid, 1, vec![chunk(3, 1, 100_000)]).await;
        let outcome = store.back_up().await.unwrap();
        if !is_exact {
            assert!(matches!(outcome, BackupOutcome::NotSupported));
            continue;
        }
        let BackupOutcome::Created(backup) = outcome else { panic!("no backup was made") };
        let second = store.back_up().await.unwrap();
        assert!(matches!(second, BackupOutcome::InProgress), "only one backup can exist");
        let later = create(&*store, new_request(Some("after"))).await;
        append(&*store, uid, 1, vec![succeeded(4, 1)]).await;
        let folder = TempDir::new().unwrap();
        let (file, data) = (folder.path().join("backup"), folder.path().join("data"));
        std::fs::write(&file, read_backup(backup).await).unwrap();
        restore(&file, &data, |_| {}).unwrap();
        let restored = open(&data).unwrap();
        assert_eq!(seqs(&*restored, uid, 0).await, [1, 2, 3]);
        assert_eq!(restored.get_request(uid).await.unwrap().unwrap().state, RequestState::Running);
        assert!(restored.get_request(later).await.unwrap().is_none());
        assert_eq!(restored.expired_leases(at(0), 10).await.unwrap()[0].uid, uid);
        let third = store.back_up().await.unwrap();
        assert!(matches!(third, BackupOutcome::Created(_)), "the first backup was dropped");
    }
}

#[tokio::test]
async fn the_embedded_store_is_exclusive_to_one_process() {
    let data = TempDir::new().unwrap();
    let first = open(data.path()).unwrap();
    assert!(matches!(open(data.path()), Err(StoreError::Locked { .. })));
    drop(first);
    open(data.path()).unwrap();
}

#[tokio::test]
async fn a_reopened_store_is_complete_and_its_leases_have_expired() {
    let data = TempDir::new().unwrap();
    let store = open(data.path()).unwrap();
    let uid = create(&*store, new_request(Some("kept"))).await;
    claim(&*store, uid, 2000).await;
    append(&*store, uid, 1, vec![progress(3, 1)]).await;
    drop(store);
    let store = open(data.path()).unwrap();
    assert_eq!(seqs(&*store, uid, 0).await, [1, 2, 3]);
    assert_eq!(store.expired_leases(at(0), 10).await.unwrap()[0].uid, uid);
}

#[tokio::test]
async fn an_invalid_store_file_is_reported_as_corrupt() {
    let data = TempDir::new().unwrap();
    std::fs::write(data.path().join("streamer.db"), vec![b'x'; 8192]).unwrap();
    let opened = open(data.path());
    let Err(StoreError::Corrupt { reason, .. }) = opened else { panic!("the store was opened") };
    assert!(reason.contains("not a database"), "{reason}");
}
