//! Tests of appends: callers that disconnect, and invalid numbers.

use futures_util::poll;
use streamer_core::SystemClock;
use streamer_proto::common::v1::{self as proto, Succeeded, event::Kind};
use streamer_telemetry::Metrics;
use tempfile::TempDir;

use super::*;
use crate::{testing::running_request, topics::Read};

#[tokio::test]
async fn an_append_reaches_watchers_after_its_caller_disconnects() {
    let data = TempDir::new().unwrap();
    let store = streamer_store_sqlite::open(data.path()).unwrap();
    let metrics = ProgressMetrics::new(&Metrics::new());
    let topics = Arc::new(Topics::new(store.clone(), metrics.clone(), None, false));
    let clock = Arc::new(SystemClock);
    let (uid, now) = (Uid::new(clock.now()), clock.now());
    running_request(&*store, uid, now).await;
    let mut subscription = topics.load(uid).await.unwrap().unwrap();
    subscription.updates.borrow_and_update();

    let service = LogService::new(topics, store, clock, metrics);
    let last =
        Event { seq: 3, attempt: 1, time: None, kind: Some(Kind::Succeeded(Succeeded::default())) };
    let batch = PublishRequest {
        uid: uid.to_bytes().to_vec().into(),
        attempt: 1,
        events: vec![last],
        ..PublishRequest::default()
    };
    {
        // The call is dropped after the store's writer has received the append.
        let mut call = Box::pin(service.publish(Request::new(batch)));
        assert!(poll!(&mut call).is_pending());
        tokio::task::yield_now().await;
    }
    subscription.updates.changed().await.unwrap();
    assert!(
        matches!(subscription.topic.read(Seq::from(2), 10, 1000), Read::Events(events) if events.len() == 1)
    );
}

#[test]
fn events_have_consecutive_numbers_in_range() {
    let event = |seq, attempt| Event { seq, attempt, ..Event::default() };
    let rejected = |events: &[Event]| check_contiguous(events).unwrap_err().message().to_owned();
    assert!(check_contiguous(&[event(3, 1), event(4, 1)]).is_ok());
    assert!(rejected(&[event(3, 1), event(5, 1)]).contains("consecutive"));
    assert!(rejected(&[event(0, 1)]).contains("from 1"));
    assert!(rejected(&[event(-1, 1)]).contains("event.seq: must be 0 to"));
    assert!(rejected(&[event(3, 1), event(4, -1)]).contains("event.attempt: must be 0 to"));
}

#[tokio::test]
async fn an_announced_request_with_a_number_out_of_range_is_rejected() {
    let data = TempDir::new().unwrap();
    let store = streamer_store_sqlite::open(data.path()).unwrap();
    let metrics = ProgressMetrics::new(&Metrics::new());
    let topics = Arc::new(Topics::new(store.clone(), metrics.clone(), None, false));
    let service = LogService::new(topics, store, Arc::new(SystemClock), metrics);
    let announcement = AnnounceRequest {
        uid: Uid::new(Timestamp::default()).to_bytes().to_vec().into(),
        events: vec![Event { seq: 1, ..Event::default() }],
        created: Some(proto::Request { last_seq: -1, ..proto::Request::default() }),
    };
    let rejected = service.announce(Request::new(announcement)).await.unwrap_err();
    assert_eq!(rejected.code(), Code::InvalidArgument);
    assert!(rejected.message().contains("request.last_seq: must be 0 to"), "{rejected}");
}
