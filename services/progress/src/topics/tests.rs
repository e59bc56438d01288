//! Tails of many requests.

use streamer_core::Timestamp;
use streamer_proto::common::v1::{Accepted, Output, Payload, Started, event::Kind, payload::Body};
use streamer_store::{Engine, open};
use streamer_telemetry::Metrics;

use super::*;

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
