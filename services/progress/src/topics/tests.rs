//! Tails of many requests.

use streamer_core::Timestamp;
use streamer_proto::common::v1::{Accepted, Output, Payload, Started, event::Kind, payload::Body};
use streamer_store::{Append, Appended, Engine, Writer, open};
use streamer_telemetry::Metrics;

use super::*;
use crate::testing::running_request;

fn event(seq: i64, kind: Kind) -> Event {
    Event { seq, attempt: 0, time: None, kind: Some(kind) }
}

#[tokio::test]
async fn a_late_announcement_of_a_request_that_runs_already_is_not_believed() {
    let data = tempfile::tempdir().unwrap();
    let store = open(&Engine::Embedded { data: data.path().to_owned() }).unwrap();
    let topics = Topics::new(store, ProgressMetrics::new(&Metrics::new()), None, false);
    let accepted = event(1, Kind::Accepted(Accepted::default()));
    let created = |uid: Uid| Request { uid: uid.to_string(), last_seq: 1, ..Request::default() };
    let (early, late) = (Uid::new(Timestamp::default()), Uid::new(Timestamp::default()));

    topics.create(early, &created(early), std::slice::from_ref(&accepted));
    assert!(topics.loaded(early).is_some());

    topics.push(late, &[event(2, Kind::Started(Started::default()))]);
    topics.create(late, &created(late), std::slice::from_ref(&accepted));
    assert!(topics.loaded(late).is_none(), "watchers read the store, which knows more");
}

#[tokio::test]
async fn all_tails_together_stay_within_their_limit() {
    const CHUNK: usize = 1024 * 1024;
    let data = tempfile::tempdir().unwrap();
    let store = open(&Engine::Embedded { data: data.path().to_owned() }).unwrap();
    let topics = Topics::new(store, ProgressMetrics::new(&Metrics::new()), None, false);
    let chunk = |seq| {
        let data = Payload { body: Some(Body::Data(vec![7; CHUNK].into())), ..Payload::default() };
        event(seq, Kind::Output(Output { data: Some(data), chunk_index: 0 }))
    };
    let small = Uid::new(Timestamp::default());
    let accepted = event(1, Kind::Accepted(Accepted::default()));
    topics.create(small, &Request::default(), &[accepted]);
    let kept = topics.loaded(small).unwrap();
    let watched: Vec<_> = (0..100)
        .map(|_| {
            let uid = Uid::new(Timestamp::default());
            topics.create(uid, &Request::default(), &[chunk(1)]);
            topics.loaded(uid)
        })
        .collect();
    let total = topics.total_bytes.load(Ordering::Relaxed);
    assert!(total <= MAX_TOTAL_BYTES + CHUNK, "{total}");
    let first = watched[0].as_ref().unwrap();
    assert_eq!(first.topic.read(0, 10, CHUNK), Read::InStore, "its share is less than a chunk");
    let read = topics.loaded(small).unwrap().topic.read(0, 10, CHUNK);
    assert!(matches!(read, Read::Events(_)), "small tails keep what they have");

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
    let store = open(&Engine::Embedded { data: data.path().to_owned() }).unwrap();
    let metrics = ProgressMetrics::new(&Metrics::new());
    let topics = Topics::new(store.clone(), metrics.clone(), None, false);
    let uid = Uid::new(Timestamp::default());
    running_request(&*store, uid, Timestamp::default()).await;
    let mut watching = topics.load(uid).await.unwrap().unwrap();
    let append = async |seq| {
        let chunk = Output { data: Some(Payload::default()), chunk_index: seq - 3 };
        let events = vec![Event { attempt: 1, ..event(seq, Kind::Output(chunk)) }];
        let appended = store.append(Append {
            uid,
            writer: Writer::Attempt(1),
            events: events.clone(),
            checkpoint: None,
            retry_at: None,
            now: Timestamp::default(),
        });
        assert!(matches!(appended.await.unwrap(), Appended::Applied { .. }));
        events
    };
    let counts = || (metrics.unannounced.get(), metrics.missed.get());

    let late = append(3).await;
    topics.check(&watching.topic).await.unwrap();
    assert_eq!(*watching.news.borrow_and_update(), 3, "watchers do not wait for the announcement");
    assert_eq!(counts(), (1, 0));
    topics.push(uid, &late);
    assert_eq!(counts(), (0, 0));

    append(4).await;
    topics.check(&watching.topic).await.unwrap();
    drop(watching);
    topics.sweep(Instant::now() + Duration::from_secs(5));
    assert_eq!(counts(), (0, 1), "also if its watchers have left");
}

#[tokio::test]
async fn a_comparison_without_news_does_not_put_off_the_next_one() {
    let data = tempfile::tempdir().unwrap();
    let store = open(&Engine::Embedded { data: data.path().to_owned() }).unwrap();
    let metrics = ProgressMetrics::new(&Metrics::new());
    let topics = Topics::new(store.clone(), metrics, None, true);
    let uid = Uid::new(Timestamp::default());
    running_request(&*store, uid, Timestamp::default()).await;
    let watching = topics.load(uid).await.unwrap().unwrap();
    let mut compared = Vec::new();
    for round in 0..9 {
        for topic in topics.sweep(Instant::now()) {
            topics.check(&topic).await.unwrap();
            compared.push(round);
        }
    }
    assert_eq!(compared, [4, 8], "every 4 rounds of 1 s");
    drop(watching);
}
