//! Decodes client frames (RFC 6455 section 5) as a pure function over bytes.

use streamer_core::CloseCode;

/// Maximum size of the header of a client frame, including the mask, in bytes.
const MAX_HEADER: usize = 14;
/// Maximum size of the payload of a control frame, in bytes.
const MAX_CONTROL: usize = 125;

/// A client message, borrowed from the buffer into which it was read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Message<'a> {
    /// A complete text message.
    Text(&'a str),
    /// A complete binary message; its content is ignored.
    Binary,
    /// A ping, with its payload.
    Ping(&'a [u8]),
    /// A pong.
    Pong,
    /// A close frame, with its code if it has one.
    Close(Option<CloseCode>),
}

/// Specifies how the decoder proceeds after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Continues with the next message.
    Continue,
    /// Pauses: the decoder keeps the remaining input until the next call of [`Decoder::feed`].
    Pause,
    /// Stops: the decoder discards the remaining input.
    Stop,
}

/// A protocol violation by the client, after which the connection must be closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    /// Close code.
    pub(crate) code: CloseCode,
    /// Human-readable reason.
    pub(crate) reason: String,
}

impl Violation {
    fn protocol(reason: &str) -> Self {
        Self { code: CloseCode::ProtocolError, reason: reason.to_owned() }
    }

    fn not_utf8() -> Self {
        Self { code: CloseCode::InvalidPayload, reason: "a text message must be UTF-8".into() }
    }
}

/// Decodes frames from a byte stream. Buffers bytes only while a frame or a fragmented message is
/// incomplete.
pub(crate) struct Decoder {
    max_message_bytes: usize,
    /// Beginning of an incomplete frame.
    partial: Vec<u8>,
    /// Whether decoding is paused, in which case `partial` may contain complete frames.
    paused: bool,
    /// Received fragments of an incomplete message.
    fragments: Option<Fragments>,
}

struct Fragments {
    bytes: Vec<u8>,
    is_text: bool,
    /// Length of the prefix of `bytes` that is valid UTF-8.
    checked: usize,
}

impl Fragments {
    /// Appends a fragment of a message of at most `max` bytes. Rejects text as soon as it cannot
    /// become valid UTF-8.
    fn extend(&mut self, payload: &[u8], max: usize) -> Result<(), Violation> {
        let length = self.bytes.len() + payload.len();
        if self.bytes.capacity() < length {
            let grown = length.saturating_mul(2).min(max).max(length);
            self.bytes.reserve_exact(grown - self.bytes.len());
        }
        self.bytes.extend_from_slice(payload);
        if !self.is_text {
            return Ok(());
        }
        match std::str::from_utf8(&self.bytes[self.checked..]) {
            Ok(_) => self.checked = self.bytes.len(),
            Err(error) if error.error_len().is_none() => self.checked += error.valid_up_to(),
            Err(_) => return Err(Violation::not_utf8()),
        }
        Ok(())
    }
}

struct Header {
    fin: bool,
    opcode: u8,
    mask: [u8; 4],
    size: usize,
    length: usize,
}

impl Decoder {
    pub(crate) fn new(max_message_bytes: usize) -> Self {
        Self { max_message_bytes, partial: Vec::new(), paused: false, fragments: None }
    }

    /// Returns the number of bytes of memory that an incomplete message uses.
    pub(crate) fn buffered_bytes(&self) -> usize {
        let fragments = self.fragments.as_ref().map_or(0, |fragments| fragments.bytes.capacity());
        self.partial.capacity() + fragments
    }

    /// Returns whether a message is incomplete.
    pub(crate) fn is_in_message(&self) -> bool {
        !self.partial.is_empty() || self.fragments.is_some()
    }

    /// Returns whether input remains that can be decoded without reading more.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Decodes input and passes every complete message to `on_message`, until `on_message` returns a
    /// value other than [`Flow::Continue`]. Unmasks `input` in place.
    pub(crate) fn feed(
        &mut self,
        input: &mut [u8],
        mut on_message: impl FnMut(Message<'_>) -> Flow,
    ) -> Result<(), Violation> {
        self.paused = false;
        if self.partial.is_empty() {
            let (used, frame_bytes) = self.decode(input, &mut on_message)?;
            if used < input.len() {
                self.keep(Vec::new(), &input[used..], frame_bytes);
            }
            return Ok(());
        }
        let mut buffered = std::mem::take(&mut self.partial);
        buffered.extend_from_slice(input);
        let (used, frame_bytes) = self.decode(&mut buffered, &mut on_message)?;
        if used == 0 {
            self.keep(buffered, &[], frame_bytes);
        } else if used < buffered.len() {
            // A new buffer is used, because the old one may be much larger than the remaining bytes.
            self.keep(Vec::new(), &buffered[used..], frame_bytes);
        }
        Ok(())
    }

    /// Buffers the beginning of a frame of `frame_bytes` bytes, in memory that grows with the number of received bytes.
    fn keep(&mut self, mut partial: Vec<u8>, rest: &[u8], frame_bytes: usize) {
        let length = partial.len() + rest.len();
        // The capacity grows in increasing steps; otherwise each read would copy all previous bytes.
        if partial.capacity() < frame_bytes.min(length.saturating_add(length / 2)) {
            let grown = length.saturating_mul(2).min(frame_bytes);
            partial.reserve_exact(grown.saturating_sub(partial.len()));
        }
        partial.extend_from_slice(rest);
        self.partial = partial;
    }

    /// Returns the number of decoded bytes and the size of the incomplete frame that follows, or 0 if
    /// its size is unknown.
    fn decode(
        &mut self,
        buffer: &mut [u8],
        on_message: &mut impl FnMut(Message<'_>) -> Flow,
    ) -> Result<(usize, usize), Violation> {
        let mut used = 0;
        while let Some(header) = self.header(&buffer[used..])? {
            let begin = used + header.size;
            let Some(payload) = buffer.get_mut(begin..begin + header.length) else {
                return Ok((used, header.size + header.length));
            };
            unmask(payload, header.mask);
            used = begin + header.length;
            match self.frame(&header, payload, on_message)? {
                Flow::Continue => {}
                Flow::Pause => {
                    self.paused = used < buffer.len();
                    return Ok((used, 0));
                }
                Flow::Stop => return Ok((buffer.len(), 0)),
            }
        }
        Ok((used, 0))
    }

    fn header(&self, bytes: &[u8]) -> Result<Option<Header>, Violation> {
        let [first, second, ..] = *bytes else { return Ok(None) };
        if first & 0x70 != 0 {
            return Err(Violation::protocol("reserved bits must be 0: no extension is in use"));
        }
        if second & 0x80 == 0 {
            return Err(Violation::protocol("frames from a client must be masked"));
        }
        let (length, at, least) = match second & 0x7f {
            126 => match bytes.get(2..4).and_then(|b| b.try_into().ok()) {
                Some(length) => (u64::from(u16::from_be_bytes(length)), 4, 126),
                None => return Ok(None),
            },
            127 => match bytes.get(2..10).and_then(|b| b.try_into().ok()) {
                Some(length) => (u64::from_be_bytes(length), 10, 1 << 16),
                None => return Ok(None),
            },
            short => (u64::from(short), 2, 0),
        };
        if length < least {
            return Err(Violation::protocol("a length must use its shortest encoding"));
        }
        let (fin, opcode) = (first & 0x80 != 0, first & 0x0f);
        self.check(fin, opcode, length)?;
        let Some(mask) = bytes.get(at..at + 4).and_then(|b| b.try_into().ok()) else {
            return Ok(None);
        };
        debug_assert!(at + 4 <= MAX_HEADER);
        // The conversion cannot fail, because `check` compares the length with the limit.
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        Ok(Some(Header { fin, opcode, mask, size: at + 4, length }))
    }

    /// Rejects an invalid frame before its payload arrives.
    fn check(&self, fin: bool, opcode: u8, length: u64) -> Result<(), Violation> {
        match opcode {
            0x8..=0xA if !fin => {
                return Err(Violation::protocol("control frames must not be fragmented"));
            }
            0x8..=0xA if length > MAX_CONTROL as u64 => {
                return Err(Violation::protocol("control frames must be at most 125 bytes"));
            }
            0x8..=0xA => return Ok(()),
            0x0 if self.fragments.is_none() => {
                return Err(Violation::protocol("a continuation must follow a first fragment"));
            }
            0x1 | 0x2 if self.fragments.is_some() => {
                return Err(Violation::protocol("a fragmented message must be completed first"));
            }
            0x0..=0x2 => {}
            _ => return Err(Violation::protocol("the opcode is not defined")),
        }
        let before = self.fragments.as_ref().map_or(0, |fragments| fragments.bytes.len() as u64);
        let total = before.saturating_add(length);
        if total > self.max_message_bytes as u64 {
            return Err(Violation {
                code: CloseCode::MessageTooBig,
                reason: format!(
                    "a message must be at most {} bytes (limits.max_payload_bytes and overhead), is \
                     {total}",
                    self.max_message_bytes
                ),
            });
        }
        Ok(())
    }

    fn frame(
        &mut self,
        header: &Header,
        payload: &[u8],
        on_message: &mut impl FnMut(Message<'_>) -> Flow,
    ) -> Result<Flow, Violation> {
        match (header.opcode, header.fin) {
            (0x1, true) => Ok(on_message(Message::Text(utf8(payload)?))),
            (0x2, true) => Ok(on_message(Message::Binary)),
            (opcode @ (0x1 | 0x2), false) => {
                let is_text = opcode == 0x1;
                let fragments = Fragments { bytes: Vec::new(), is_text, checked: 0 };
                self.fragments.insert(fragments).extend(payload, self.max_message_bytes)?;
                Ok(Flow::Continue)
            }
            (0x0, fin) => {
                if let Some(fragments) = &mut self.fragments {
                    fragments.extend(payload, self.max_message_bytes)?;
                }
                match self.fragments.take_if(|_| fin) {
                    Some(message) if message.is_text => {
                        Ok(on_message(Message::Text(utf8(&message.bytes)?)))
                    }
                    Some(_) => Ok(on_message(Message::Binary)),
                    None => Ok(Flow::Continue),
                }
            }
            (0x8, _) => {
                on_message(Message::Close(close_code(payload)?));
                Ok(Flow::Stop)
            }
            (0x9, _) => Ok(on_message(Message::Ping(payload))),
            _ => Ok(on_message(Message::Pong)),
        }
    }
}

fn utf8(payload: &[u8]) -> Result<&str, Violation> {
    std::str::from_utf8(payload).map_err(|_| Violation::not_utf8())
}

fn close_code(payload: &[u8]) -> Result<Option<CloseCode>, Violation> {
    let (code, reason) = match *payload {
        [] => return Ok(None),
        [high, low, ref reason @ ..] => (u16::from_be_bytes([high, low]), reason),
        [_] => return Err(Violation::protocol("a close code must have two bytes")),
    };
    // See RFC 6455 section 7.4 and the IANA registry of close codes.
    let valid = matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999);
    if !valid {
        return Err(Violation::protocol("the close code must not be sent by a client"));
    }
    utf8(reason)?;
    Ok(Some(code.into()))
}

/// Unmasks the payload in steps of eight bytes, which the compiler vectorizes.
fn unmask(payload: &mut [u8], mask: [u8; 4]) {
    let wide = u64::from_ne_bytes([
        mask[0], mask[1], mask[2], mask[3], mask[0], mask[1], mask[2], mask[3],
    ]);
    let mut words = payload.chunks_exact_mut(8);
    for word in &mut words {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(word);
        word.copy_from_slice(&(u64::from_ne_bytes(bytes) ^ wide).to_ne_bytes());
    }
    for (byte, mask) in words.into_remainder().iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests;
