//! Bounds the memory of large segments, over all topics.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::topic::{Published, Topic};

/// Segments of more bytes than this are large.
const LARGE_BYTES: usize = 64 * 1024;
/// Bytes of the latest large segments that are kept; watchers that are further behind read from the log.
const MAX_BYTES: usize = 64 * 1024 * 1024;
/// Segments that are younger than [`MIN_LIFE`] are kept beyond that, up to so many bytes: those who read at once
/// find them, whatever others publish.
const MAX_BYTES_OF_ALL: usize = 4 * MAX_BYTES;
const MIN_LIFE: Duration = Duration::from_secs(1);

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
    at: Instant,
}

impl LargeSegments {
    /// Notes what a topic has published. Older large segments are dropped from their topics when there are too
    /// many.
    pub(crate) fn note(&self, topic: &Arc<Topic>, published: Published, now: Instant) {
        if published.bytes <= LARGE_BYTES {
            return;
        }
        for LargeSegment { topic, published, .. } in self.push(topic, published, now) {
            if let Some(topic) = topic.upgrade() {
                topic.drop_through(published.last_seq);
            }
        }
    }

    /// Returns those that are too old.
    fn push(&self, topic: &Arc<Topic>, published: Published, now: Instant) -> Vec<LargeSegment> {
        let mut kept = self.0.lock();
        kept.bytes += published.bytes;
        kept.segments.push_back(LargeSegment { topic: Arc::downgrade(topic), published, at: now });
        let mut dropped = Vec::new();
        while let Some(oldest) = kept.segments.front() {
            let limit = if now - oldest.at < MIN_LIFE { MAX_BYTES_OF_ALL } else { MAX_BYTES };
            if kept.bytes <= limit || kept.segments.len() == 1 {
                break;
            }
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
        let begin = Instant::now();
        let publish = |bytes, seconds| {
            let topic = topic();
            let now = begin + Duration::from_secs(seconds);
            all.note(&topic, topic.publish(&[output(bytes)]).unwrap(), now);
            topic
        };
        let (small, first) = (publish(1000, 0), publish(1_000_000, 0));
        let others: Vec<_> = (0..70).map(|number| publish(1_000_000, 2 + number)).collect();
        let is_kept = |topic: &Topic| matches!(topic.next(0), Next::Segment(_));
        assert!(is_kept(&small) && !is_kept(&first) && is_kept(&others[69]));
        let kept = others.iter().filter(|topic| is_kept(topic)).count();
        assert!((60..=67).contains(&kept), "{kept}");
        // Many at once are kept for those who read at once, up to a limit.
        let many: Vec<_> = (0..300).map(|_| publish(1_000_000, 100)).collect();
        let kept = many.iter().filter(|topic| is_kept(topic)).count();
        assert!((250..=268).contains(&kept), "{kept}");
    }
}
