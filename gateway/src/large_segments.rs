//! Limits the memory of large segments across all topics.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::topic::{Published, Topic};

/// Size above which a segment is large, in bytes.
const LARGE_BYTES: usize = 64 * 1024;
/// Maximum total size of the retained large segments, in bytes. Subscribers further behind read from the log.
const MAX_BYTES: usize = 64 * 1024 * 1024;
/// Maximum total size including segments younger than [`MIN_RETENTION`], in bytes. It exceeds [`MAX_BYTES`], so that
/// subscribers that read immediately find new segments regardless of the events published to other topics.
const MAX_TOTAL_BYTES: usize = 4 * MAX_BYTES;
/// Age up to which [`MAX_TOTAL_BYTES`] applies to a segment.
const MIN_RETENTION: Duration = Duration::from_secs(1);

/// Tracks the most recent large segments, oldest first.
#[derive(Default)]
pub(crate) struct LargeSegments(Mutex<Retained>);

#[derive(Default)]
struct Retained {
    segments: VecDeque<LargeSegment>,
    bytes: usize,
}

struct LargeSegment {
    topic: Weak<Topic>,
    published: Published,
    at: Instant,
}

impl LargeSegments {
    /// Records a published segment. Drops the oldest large segments from their topics if the limit is exceeded.
    pub(crate) fn record(&self, topic: &Arc<Topic>, published: Published, now: Instant) {
        if published.bytes <= LARGE_BYTES {
            return;
        }
        for LargeSegment { topic, published, .. } in self.push(topic, published, now) {
            if let Some(topic) = topic.upgrade() {
                topic.drop_through(published.last_seq);
            }
        }
    }

    /// Adds a segment and returns the segments that exceed the limit.
    fn push(&self, topic: &Arc<Topic>, published: Published, now: Instant) -> Vec<LargeSegment> {
        let mut retained = self.0.lock();
        retained.bytes += published.bytes;
        retained.segments.push_back(LargeSegment {
            topic: Arc::downgrade(topic),
            published,
            at: now,
        });
        let mut dropped = Vec::new();
        while let Some(oldest) = retained.segments.front() {
            let limit = if now - oldest.at < MIN_RETENTION { MAX_TOTAL_BYTES } else { MAX_BYTES };
            if retained.bytes <= limit || retained.segments.len() == 1 {
                break;
            }
            if let Some(oldest) = retained.segments.pop_front() {
                retained.bytes -= oldest.published.bytes;
                dropped.push(oldest);
            }
        }
        dropped
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::{Seq, Timestamp, Uid};
    use streamer_proto::common::v1::{Event, Output, Payload, event::Kind, payload::Body};

    use super::*;
    use crate::{protocol::server_message::RequestIds, topic::Next};

    #[test]
    fn the_oldest_large_segments_are_dropped_from_their_topics() {
        let all = LargeSegments::default();
        let topic = || {
            let uid = Uid::new(Timestamp::default());
            let ids = RequestIds { request_id: "r".into(), uid: uid.to_string() };
            Arc::new(Topic::new(uid, ids, Seq::NONE))
        };
        let output = |bytes: usize| {
            let body = Some(Body::Data(format!("\"{}\"", "x".repeat(bytes)).into()));
            let data = Some(Payload { content_type: "application/json".into(), body });
            let kind = Some(Kind::Output(Output { data, chunk_index: 0 }));
            Event { seq: 1, kind, ..Event::default() }
        };
        let begin = Instant::now();
        let publish = |bytes, seconds| {
            let topic = topic();
            let now = begin + Duration::from_secs(seconds);
            all.record(&topic, topic.publish(&[output(bytes)]).unwrap(), now);
            topic
        };
        let (small, first) = (publish(1000, 0), publish(1_000_000, 0));
        let others: Vec<_> = (0..70).map(|number| publish(1_000_000, 2 + number)).collect();
        let is_retained = |topic: &Topic| matches!(topic.next(Seq::NONE), Next::Segment(_));
        assert!(is_retained(&small) && !is_retained(&first) && is_retained(&others[69]));
        let retained = others.iter().filter(|topic| is_retained(topic)).count();
        assert!((60..=67).contains(&retained), "{retained}");
        // New segments are retained for immediate readers, up to a limit.
        let many: Vec<_> = (0..300).map(|_| publish(1_000_000, 100)).collect();
        let retained = many.iter().filter(|topic| is_retained(topic)).count();
        assert!((250..=268).contains(&retained), "{retained}");
    }
}
