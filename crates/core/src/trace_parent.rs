//! `traceparent` header of W3C Trace Context (<https://www.w3.org/TR/trace-context/>).

use std::fmt;

use crate::hex::{hex, read_hex, write_hex};

/// Length of a `traceparent` of version 00, in bytes.
const LENGTH: usize = 55;

/// Position in a trace: the content of a `traceparent` header of version 00.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    /// Trace ID; not all zeros.
    pub trace_id: [u8; 16],
    /// Span ID; not all zeros.
    pub span_id: [u8; 8],
    /// Whether the spans of the trace are recorded (flag `sampled`).
    pub is_sampled: bool,
}

impl TraceParent {
    /// Parses a header of version 00 with no flag other than `sampled`; returns `None` for any other
    /// text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text: &[u8; LENGTH] = text.as_bytes().try_into().ok()?;
        let has_dashes = text[2] == b'-' && text[35] == b'-' && text[52] == b'-';
        if !text.starts_with(b"00") || !has_dashes || text[53] != b'0' {
            return None;
        }
        let is_sampled = match text[54] {
            b'0' => false,
            b'1' => true,
            _ => return None,
        };
        let (mut trace_id, mut span_id) = ([0; 16], [0; 8]);
        read_hex(&text[3..35], &mut trace_id)?;
        read_hex(&text[36..52], &mut span_id)?;
        let is_valid = trace_id != [0; 16] && span_id != [0; 8];
        is_valid.then_some(Self { trace_id, span_id, is_sampled })
    }

    /// Returns the header, which has 55 characters.
    #[must_use]
    pub fn to_text(self) -> String {
        // `format!` takes ten times as long, and this function is called for each request.
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        write_hex(&mut text[3..35], &self.trace_id);
        write_hex(&mut text[36..52], &self.span_id);
        text[54] += u8::from(self.is_sampled);
        std::str::from_utf8(&text).unwrap_or_default().to_owned()
    }

    /// Returns the trace ID as 32 hexadecimal digits.
    #[must_use]
    pub fn trace_id_text(self) -> String {
        hex(&self.trace_id)
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.to_text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn headers_round_trip() {
        let parent = TraceParent::parse(PARENT).unwrap();
        assert!(parent.is_sampled);
        assert_eq!(parent.to_text(), PARENT);
        assert_eq!(parent.trace_id_text(), "0af7651916cd43dd8448eb211c80319c");
        let unsampled = PARENT.replace("-01", "-00");
        assert_eq!(TraceParent::parse(&unsampled).unwrap().to_string(), unsampled);
    }

    #[test]
    fn malformed_headers_are_rejected() {
        for text in [
            "",
            &PARENT[..54],
            &format!("{PARENT}0"),
            &PARENT.to_uppercase(),
            &PARENT.replace("00-", "01-"),
            &PARENT.replace("-01", "-02"),
            &PARENT.replace("-01", "-11"),
            &PARENT.replace('-', "_"),
            &PARENT.replace("b7", "g7"),
            &PARENT.replace("b7", "é"),
            &PARENT.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            &PARENT.replace("b7ad6b7169203331", &"0".repeat(16)),
        ] {
            assert_eq!(TraceParent::parse(text), None, "{text}");
        }
    }
}
