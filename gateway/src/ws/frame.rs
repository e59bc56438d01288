//! Encodes unmasked server frames (RFC 6455 section 5.2).

use bytes::Bytes;
use streamer_core::CloseCode;

/// Maximum size of the header of a server frame, in bytes: two bytes and a 64-bit length.
const MAX_HEADER: usize = 10;
/// Maximum size of the reason in a close frame, in bytes: a control frame has at most 125 bytes, of which two are
/// the code.
const MAX_CLOSE_REASON: usize = 123;

const FIN: u8 = 0x80;
pub(crate) const TEXT: u8 = 0x1;
const CLOSE: u8 = 0x8;
const PONG: u8 = 0xA;

/// A ping without a payload.
pub(crate) const PING: Bytes = Bytes::from_static(&[0x89, 0]);

/// A text frame that is written in place, after the space reserved for the header.
pub(crate) struct TextFrame {
    buffer: Vec<u8>,
}

impl TextFrame {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        let mut buffer = Vec::with_capacity(MAX_HEADER + capacity);
        buffer.resize(MAX_HEADER, 0);
        Self { buffer }
    }

    /// Returns the buffer to which to append the text. The complete text must be valid UTF-8.
    pub(crate) fn text(&mut self) -> &mut Vec<u8> {
        &mut self.buffer
    }

    pub(crate) fn finish(mut self) -> Bytes {
        let length = self.buffer.len() - MAX_HEADER;
        let (header, size) = header(TEXT, length);
        let start = MAX_HEADER - size;
        self.buffer[start..MAX_HEADER].copy_from_slice(&header[..size]);
        Bytes::from(self.buffer).slice(start..)
    }
}

/// Encodes a pong with the ping's payload, at most 125 bytes.
pub(crate) fn pong(payload: &[u8]) -> Bytes {
    control(PONG, payload)
}

/// Encodes a close frame. A reason that is too long is truncated at a character boundary.
pub(crate) fn close(code: CloseCode, reason: &str) -> Bytes {
    let mut end = reason.len().min(MAX_CLOSE_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let mut payload = code.code().to_be_bytes().to_vec();
    payload.extend_from_slice(&reason.as_bytes()[..end]);
    control(CLOSE, &payload)
}

fn control(opcode: u8, payload: &[u8]) -> Bytes {
    let (header, size) = header(opcode, payload.len());
    let mut frame = header[..size].to_vec();
    frame.extend_from_slice(payload);
    frame.into()
}

fn header(opcode: u8, length: usize) -> ([u8; MAX_HEADER], usize) {
    let mut header = [0; MAX_HEADER];
    header[0] = FIN | opcode;
    if let Ok(short @ 0..=125) = u8::try_from(length) {
        header[1] = short;
        (header, 2)
    } else if let Ok(medium) = u16::try_from(length) {
        header[1] = 126;
        header[2..4].copy_from_slice(&medium.to_be_bytes());
        (header, 4)
    } else {
        header[1] = 127;
        header[2..10].copy_from_slice(&(length as u64).to_be_bytes());
        (header, 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(length: usize) -> Bytes {
        let mut frame = TextFrame::with_capacity(length);
        frame.text().resize(MAX_HEADER + length, b'x');
        frame.finish()
    }

    #[test]
    fn lengths_have_the_shortest_encoding() {
        assert_eq!(&text_of(125)[..3], [0x81, 125, b'x']);
        assert_eq!(&text_of(126)[..5], [0x81, 126, 0, 126, b'x']);
        assert_eq!(&text_of(65_535)[..5], [0x81, 126, 0xff, 0xff, b'x']);
        assert_eq!(&text_of(65_536)[..11], [0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0, b'x']);
    }

    #[test]
    fn close_reasons_are_truncated_at_a_character_boundary() {
        let frame = close(CloseCode::InvalidRequest, &"é".repeat(100));
        assert_eq!(frame[0], 0x88);
        assert_eq!(usize::from(frame[1]), 2 + 122);
        assert!(std::str::from_utf8(&frame[4..]).is_ok());
    }
}
