//! Tests of appends whose callers disconnect.

use futures_util::poll;
use streamer_core::SystemClock;
use streamer_proto::common::v1::{Succeeded, event::Kind};
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
        matches!(subscription.topic.read(2, 10, 1000), Read::Events(events) if events.len() == 1)
    );
}
