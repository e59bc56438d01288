//! Tests of the registry of topics.

use streamer_core::{AttemptNumber, Seq, Timestamp};
use streamer_proto::common::v1::{Accepted, Output, Payload, Started, event::Kind, payload::Body};
use streamer_store::{Append, AppendOutcome, Writer};
use streamer_telemetry::Metrics;

use super::*;
use crate::testing::running_request;

fn event(seq: i64, kind: Kind) -> Event {
    Event { seq, attempt: 0, time: None, kind: Some(kind) }
}

#[tokio::test]
async fn a_stale_announcement_of_a_running_request_is_ignored() {
    let data = tempfile::tempdir().unwrap();
    let store = streamer_store_sqlite::open(data.path()).unwrap();
    let topics = Topics::new(store, ProgressMetrics::new(&Metrics::new()), None, false);
    let accepted = event(1, Kind::Accepted(Accepted::default()));
    let created = |uid: Uid| Request { uid: uid.to_string(), last_seq: 1, ..Request::default() };
    let (early, late) = (Uid::new(Timestamp::default()), Uid::new(Timestamp::default()));

    topics.create(early, &created(early), std::slice::from_ref(&accepted));
    assert!(topics.subscribe_loaded(early).is_some());

    topics.push(late, &[event(2, Kind::Started(Started::default()))]);
    topics.create(late, &created(late), std::slice::from_ref(&accepted));
    assert!(topics.subscribe_loaded(late).is_none(), "watchers read the store, which is newer");
}

#[tokio::test]
async fn the_total_of_all_tails_stays_within_its_limit() {
    const CHUNK: usize = 1024 * 1024;
    let data = tempfile::tempdir().unwrap();
    let store = streamer_store_sqlite::open(data.path()).unwrap();
    let topics = Topics::new(store, ProgressMetrics::new(&Metrics::new()), None, false);
    let chunk = |seq| {
        let data = Payload { body: Some(Body::Data(vec![7; CHUNK].into())), ..Payload::default() };
        event(seq, Kind::Output(Output { data: Some(data), chunk_index: 0 }))
    };
    let small = Uid::new(Timestamp::default());
    let accepted = event(1, Kind::Accepted(Accepted::default()));
    topics.create(small, &Request::default(), &[accepted]);
    let kept = topics.subscribe_loaded(small).unwrap();
    let watched: Vec<_> = (0..100)
        .map(|_| {
            let uid = Uid::new(Timestamp::default());
            topics.create(uid, &Request::default(), &[chunk(1)]);
            topics.subscribe_loaded(uid)
        })
        .collect();
    let total = topics.total_bytes.load(Ordering::Relaxed);
    assert!(total <= MAX_TOTAL_BYTES + CHUNK, "{total}");
    let first = watched[0].as_ref().unwrap();
    assert_eq!(
        first.topic.read(Seq::NONE, 10, CHUNK),
        Read::InStore,
        "the share of a topic is less than a chunk"
    );
    let read = topics.subscribe_loaded(small).unwrap().topic.read(Seq::NONE, 10, CHUNK);
    assert!(matches!(read, Read::Events(_)), "small tails keep their events");

    drop(watched);
    let last = Uid::new(Timestamp::default());
    topics.create(last, &Request::default(), &[chunk(1)]);
    for seq in 2..100 {
        topics.push(last, &[chunk(seq)]);
    }
    let total = topics.total_bytes.load(Ordering::Relaxed);
    assert!(total <= MAX_TOTAL_BYTES + CHUNK, "{total}");
    topics.by_uid.lock().clear();
    drop(kept);
    assert_eq!(topics.total_bytes.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn only_events_that_are_never_announced_count_as_missed() {
    let data = tempfile::tempdir().unwrap();
    let store = streamer_store_sqlite::open(data.path()).unwrap();
    let metrics = ProgressMetrics::new(&Metrics::new());
    let topics = Topics::new(store.clone(), metrics.clone(), None, false);
    let uid = Uid::new(Timestamp::default());
    running_request(&*store, uid, Timestamp::default()).await;
    let mut subscription = topics.load(uid).await.unwrap().unwrap();
    let append = async |seq| {
        let chunk = Output { data: Some(Payload::default()), chunk_index: seq - 3 };
        let events = vec![Event { attempt: 1, ..event(seq, Kind::Output(chunk)) }];
        let appended = store.append(Append {
            uid,
            writer: Writer::Attempt(AttemptNumber::FIRST),
            events: events.clone(),
            checkpoint: None,
            retry_at: None,
            now: Timestamp::default(),
        });
        assert!(matches!(appended.await.unwrap(), AppendOutcome::Applied { .. }));
        events
    };
    let counts = || (metrics.unannounced.get(), metrics.missed.get());

    let late = append(3).await;
    topics.reconcile(&subscription.topic).await.unwrap();
    assert_eq!(
        *subscription.updates.borrow_and_update(),
        Seq::from(3),
        "watchers receive the event without its announcement"
    );
    assert_eq!(counts(), (1, 0));
    topics.push(uid, &late);
    assert_eq!(counts(), (0, 0));

    append(4).await;
    topics.reconcile(&subscription.topic).await.unwrap();
    drop(subscription);
    topics.sweep(Instant::now() + Duration::from_secs(5));
    assert_eq!(counts(), (0, 1), "also after its watchers have disconnected");
}

#[tokio::test]
async fn a_comparison_that_finds_nothing_does_not_delay_the_next_one() {
    let data = tempfile::tempdir().unwrap();
    let store = streamer_store_sqlite::open(data.path()).unwrap();
    let metrics = ProgressMetrics::new(&Metrics::new());
    let topics = Topics::new(store.clone(), metrics, None, true);
    let uid = Uid::new(Timestamp::default());
    running_request(&*store, uid, Timestamp::default()).await;
    let subscription = topics.load(uid).await.unwrap().unwrap();
    let mut compared = Vec::new();
    for round in 0..9 {
        for topic in topics.sweep(Instant::now()) {
            topics.reconcile(&topic).await.unwrap();
            compared.push(round);
        }
    }
    assert_eq!(compared, [4, 8], "every 4 rounds of 1 s");
    drop(subscription);
}
