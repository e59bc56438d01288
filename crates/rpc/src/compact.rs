//! Copies of messages that own their memory.

use bytes::Bytes;
use prost::Message;
use streamer_proto::common::v1::{Event, Request, event::Kind};

/// Size below which byte strings are copied before they are retained, because the buffer that they are a
/// slice of may be many times larger. The buffer of a larger byte string contains little else.
const COPY_BELOW_BYTES: usize = 64 * 1024;

/// Copies an event. If the original shares the buffer that it was received in, the copy has its own
/// buffer of exactly its size, so that the copy does not retain the receive buffer.
#[must_use]
pub fn compact_event(event: &Event) -> Event {
    match &event.kind {
        None | Some(Kind::Accepted(_) | Kind::Started(_)) => event.clone(),
        Some(Kind::Progress(progress)) if progress.metadata.is_none() => event.clone(),
        Some(
            Kind::Progress(_)
            | Kind::Output(_)
            | Kind::Retrying(_)
            | Kind::Succeeded(_)
            | Kind::Failed(_)
            | Kind::Cancelled(_),
        ) => reencode(event),
    }
}

/// Copies a request in the same way as [`compact_event`] copies an event.
#[must_use]
pub fn compact_request(request: &Request) -> Request {
    reencode(request)
}

fn reencode<M: Message + Default + Clone>(message: &M) -> M {
    let encoded = Bytes::from(message.encode_to_vec());
    M::decode(encoded).unwrap_or_else(|_| message.clone())
}

/// Returns bytes that can be retained: small byte strings are copied out of their receive buffer.
#[must_use]
pub fn compact_bytes(bytes: Bytes) -> Bytes {
    if bytes.len() < COPY_BELOW_BYTES { Bytes::copy_from_slice(&bytes) } else { bytes }
}

/// Returns bytes that can be retained although they are a slice of a received message of up to `max_message_bytes`
/// bytes, of which any part may be fields that no receiver knows. Bytes that are less than half of such a message are
/// copied, so that the memory that they retain is at most twice their size.
#[must_use]
pub fn compact_received(bytes: Bytes, max_message_bytes: usize) -> Bytes {
    if bytes.len() < max_message_bytes / 2 { Bytes::copy_from_slice(&bytes) } else { bytes }
}

#[cfg(test)]
mod tests {
    use streamer_proto::common::v1::{
        Error, Output, OutputSummary, Payload, Retrying, Succeeded, payload::Body,
    };

    use super::*;

    /// Returns the event as a call receives it: as a slice of a larger buffer.
    fn received(event: &Event) -> (Event, Bytes) {
        let mut buffer = event.encode_to_vec();
        let length = buffer.len();
        buffer.resize(64 * 1024, 0);
        let buffer = Bytes::from(buffer);
        (Event::decode(buffer.slice(..length)).unwrap(), buffer)
    }

    fn is_within(bytes: &Bytes, buffer: &Bytes) -> bool {
        buffer.as_ptr_range().contains(&bytes.as_ptr())
    }

    #[test]
    fn a_copied_event_does_not_retain_its_receive_buffer() {
        let data = Payload { body: Some(Body::Data("chunk".into())), ..Payload::default() };
        let kind = Kind::Output(Output { data: Some(data), chunk_index: 3 });
        let (event, buffer) = received(&Event { kind: Some(kind), ..Event::default() });
        let copy = compact_event(&event);
        assert_eq!(copy, event);
        let data = |event: &Event| match &event.kind {
            Some(Kind::Output(output)) => match &output.data.as_ref().unwrap().body {
                Some(Body::Data(data)) => data.clone(),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        };
        assert!(is_within(&data(&event), &buffer), "the original is a slice");
        assert!(!is_within(&data(&copy), &buffer));

        let details = Some(Payload { body: Some(Body::Data("{}".into())), ..Payload::default() });
        let error = Some(Error { details, ..Error::default() });
        let kind = Kind::Retrying(Retrying { error, ..Retrying::default() });
        let (event, buffer) = received(&Event { kind: Some(kind), ..Event::default() });
        let copy = compact_event(&event);
        assert_eq!(copy, event);
        let Some(Kind::Retrying(retrying)) = copy.kind else { panic!("{copy:?}") };
        let details = crate::payload_bytes(retrying.error.unwrap().details.as_ref());
        assert!(!is_within(&details, &buffer));

        let output = Some(OutputSummary { chunks: 1, sha256: vec![7; 32].into() });
        let kind = Kind::Succeeded(Succeeded { result: None, output });
        let (event, buffer) = received(&Event { kind: Some(kind), ..Event::default() });
        let copy = compact_event(&event);
        assert_eq!(copy, event);
        let Some(Kind::Succeeded(succeeded)) = copy.kind else { panic!("{copy:?}") };
        assert!(!is_within(&succeeded.output.unwrap().sha256, &buffer));
    }

    #[test]
    fn received_bytes_retain_at_most_twice_their_size() {
        let message = Bytes::from(vec![1; 1000]);
        let part = message.slice(..499);
        assert!(!is_within(&compact_received(part.clone(), 1000), &message));
        assert_eq!(compact_received(part, 1000).len(), 499);
        assert!(is_within(&compact_received(message.slice(..500), 1000), &message));
    }

    #[test]
    fn small_byte_strings_are_copied_and_large_ones_are_shared() {
        let large = Bytes::from(vec![1; COPY_BELOW_BYTES]);
        assert_eq!(compact_bytes(large.clone()).as_ptr(), large.as_ptr());
        let small = large.slice(..10);
        assert_ne!(compact_bytes(small.clone()).as_ptr(), small.as_ptr());
    }
}
