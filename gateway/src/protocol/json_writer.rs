//! Writes JSON objects member by member, so that payloads are copied unchanged.

use std::io::Write;

use bytes::Bytes;
use streamer_core::Timestamp;

use crate::ws::frame::TextFrame;

/// Writes one JSON object into a text frame.
pub(crate) struct JsonWriter {
    frame: TextFrame,
}

impl JsonWriter {
    /// Starts a message with `{"type":…,"timestamp":…`.
    pub(crate) fn message(kind: &str, now: Timestamp, capacity: usize) -> Self {
        let mut frame = TextFrame::with_capacity(capacity + 96);
        let text = frame.text();
        text.extend_from_slice(b"{\"type\":\"");
        text.extend_from_slice(kind.as_bytes());
        text.extend_from_slice(b"\",\"timestamp\":\"");
        write(text, format_args!("{now}\""));
        Self { frame }
    }

    /// Writes `"name":"text"`.
    pub(crate) fn text(mut self, name: &str, text: &str) -> Self {
        self.name(name);
        write_text(self.frame.text(), text);
        self
    }

    /// Writes `"name":"text"` unless `text` is empty.
    pub(crate) fn text_unless_empty(self, name: &str, text: &str) -> Self {
        if text.is_empty() { self } else { self.text(name, text) }
    }

    /// Writes `"name":number`.
    pub(crate) fn number(mut self, name: &str, number: i64) -> Self {
        self.name(name);
        write(self.frame.text(), format_args!("{number}"));
        self
    }

    /// Writes `"name":number`, or `null` for a number that JSON cannot represent.
    pub(crate) fn float(mut self, name: &str, number: f64) -> Self {
        self.name(name);
        if number.is_finite() {
            write(self.frame.text(), format_args!("{number}"));
        } else {
            self.frame.text().extend_from_slice(b"null");
        }
        self
    }

    /// Writes `"name":true` or `"name":false`.
    pub(crate) fn boolean(mut self, name: &str, value: bool) -> Self {
        self.name(name);
        self.frame.text().extend_from_slice(if value { b"true" } else { b"false" });
        self
    }

    /// Writes `"name":` followed by serialized JSON.
    pub(crate) fn raw(mut self, name: &str, json: &[u8]) -> Self {
        self.name(name);
        self.frame.text().extend_from_slice(json);
        self
    }

    /// Writes `"name":{…}`.
    pub(crate) fn object(mut self, name: &str, members: impl FnOnce(Self) -> Self) -> Self {
        self.name(name);
        self.frame.text().push(b'{');
        let mut inner = members(self);
        inner.frame.text().push(b'}');
        inner
    }

    /// Writes `"name":[{…},…]`.
    pub(crate) fn list<T>(
        mut self,
        name: &str,
        items: impl IntoIterator<Item = T>,
        mut members: impl FnMut(Self, T) -> Self,
    ) -> Self {
        self.name(name);
        self.frame.text().push(b'[');
        for item in items {
            if self.frame.text().last() != Some(&b'[') {
                self.frame.text().push(b',');
            }
            self.frame.text().push(b'{');
            self = members(self, item);
            self.frame.text().push(b'}');
        }
        self.frame.text().push(b']');
        self
    }

    /// Ends the object and returns the frame.
    pub(crate) fn finish(mut self) -> Bytes {
        self.frame.text().push(b'}');
        self.frame.finish()
    }

    fn name(&mut self, name: &str) {
        let text = self.frame.text();
        if text.last() != Some(&b'{') {
            text.push(b',');
        }
        text.push(b'"');
        text.extend_from_slice(name.as_bytes());
        text.extend_from_slice(b"\":");
    }
}

/// Writes a JSON string with the required escapes.
pub(crate) fn write_text(buffer: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(buffer, text).expect("writing text to memory does not fail");
}

fn write(buffer: &mut Vec<u8>, arguments: std::fmt::Arguments<'_>) {
    buffer.write_fmt(arguments).expect("writing to memory does not fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_valid_json() {
        let frame = JsonWriter::message("test", Timestamp::from_millis(0), 0)
            .text("text", "a\"\n\u{0}é")
            .number("number", -5)
            .float("float", 45.5)
            .float("whole", 100.0)
            .float("nan", f64::NAN)
            .boolean("yes", true)
            .raw("raw", b"[9223372036854775807]")
            .object("inner", |inner| inner.number("a", 1).object("b", |inner| inner))
            .list("list", [1, 2], |item, number| item.number("n", number))
            .list("none", [0; 0], |item, _| item)
            .finish();
        let text = std::str::from_utf8(&frame[4..]).unwrap();
        assert_eq!(
            text,
            "{\"type\":\"test\",\"timestamp\":\"1970-01-01T00:00:00.000Z\",\
             \"text\":\"a\\\"\\n\\u0000é\",\"number\":-5,\"float\":45.5,\"whole\":100,\
             \"nan\":null,\"yes\":true,\"raw\":[9223372036854775807],\
             \"inner\":{\"a\":1,\"b\":{}},\"list\":[{\"n\":1},{\"n\":2}],\"none\":[]}"
        );
        assert!(serde_json::from_str::<serde_json::Value>(text).is_ok());
    }
}
