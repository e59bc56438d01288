//! Bounds the memory of large segments, over all topics.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use crate::topic::{Published, Topic};

/// Segments of more bytes than this are large.
const LARGE_BYTES: usize = 64 * 1024;
/// Bytes of the latest large segments that are kept; watchers that are further behind read from the log.
const MAX_BYTES: usize = 64 * 1024 * 1024;

/// The latest large segments, the oldest first.
#[derive(Default)]
pub(crate) struct LargeSegments(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    segments: VecDeque<LargeSegment>,
    bytes: usize,
}

struct LargeSegment {
    topic: Weak<Topic>,
    published: Published,
}

impl LargeSegments {
    /// Notes what a topic has published. Older large segments are dropped from their topics when there are too
    /// many.
    pub(crate) fn note(&self, topic: &Arc<Topic>, published: Published) {
        if published.bytes <= LARGE_BYTES {
            return;
        }
        for LargeSegment { topic, published } in self.push(topic, published) {
            if let Some(topic) = topic.upgrade() {
                topic.drop_through(published.last_seq);
            }
        }
    }

    /// Returns those that are too old.
    fn push(&self, topic: &Arc<Topic>, published: Published) -> Vec<LargeSegment> {
        let mut kept = self.0.lock();
        kept.bytes += published.bytes;
        kept.segments.push_back(LargeSegment { topic: Arc::downgrade(topic), published });
        let mut dropped = Vec::new();
        while kept.bytes > MAX_BYTES && kept.segments.len() > 1 {
            if let Some(oldest) = kept.segments.pop_front() {
                kept.bytes -= oldest.published.bytes;
                dropped.push(oldest);
            }
        }
        dropped
    }
}

#[cfg(test)]
mod tests {
    use streamer_core::{Timestamp, Uid};
    use streamer_proto::common::v1::{Event, Output, Payload, event::Kind, payload::Body};

    use super::*;
    use crate::{messages::Names, topic::Next};

    #[test]
    fn the_oldest_large_segments_are_dropped_from_their_topics() {
        let all = LargeSegments::default();
        let topic = || {
            let uid = Uid::new(Timestamp::default());
            let names = Names { request_id: "r".into(), uid: uid.to_string() };
            Arc::new(Topic::new(uid, names, 0))
        };
        let output = |bytes: usize| {
            let body = Some(Body::Data(format!("\"{}\"", "x".repeat(bytes)).into()));
            let data = Some(Payload { content_type: "application/json".into(), body });
            let kind = Some(Kind::Output(Output { data, chunk_index: 0 }));
            Event { seq: 1, kind, ..Event::default() }
        };
        let publish = |bytes| {
            let topic = topic();
            all.note(&topic, topic.publish(&[output(bytes)]).unwrap());
            topic
        };
        let (small, first) = (publish(1000), publish(1_000_000));
        let others: Vec<_> = (0..70).map(|_| publish(1_000_000)).collect();
        let is_kept = |topic: &Topic| matches!(topic.next(0), Next::Segment(_));
        assert!(is_kept(&small) && !is_kept(&first) && is_kept(&others[69]));
        let kept = others.iter().filter(|topic| is_kept(topic)).count();
        assert!((60..=67).contains(&kept), "{kept}");
    }
}
