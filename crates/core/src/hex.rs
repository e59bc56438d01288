//! Hexadecimal digits. Crate `hex` takes two to four times as long, and each request has a trace ID.

/// Returns the bytes as lowercase hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    let mut text = vec![0; bytes.len() * 2];
    write_hex(&mut text, bytes);
    String::from_utf8(text).unwrap_or_default()
}

/// Two hexadecimal digits for each byte value.
const HEX: [[u8; 2]; 256] = {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut pairs = [[0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [DIGITS[byte >> 4], DIGITS[byte & 15]];
        byte += 1;
    }
    pairs
};

/// Writes the bytes as lowercase hexadecimal digits.
pub(crate) fn write_hex(text: &mut [u8], bytes: &[u8]) {
    let (pairs, _) = text.as_chunks_mut::<2>();
    for (pair, byte) in pairs.iter_mut().zip(bytes) {
        *pair = HEX[usize::from(*byte)];
    }
}

/// Decodes hexadecimal digits. Only lowercase digits are valid, as W3C requires.
pub(crate) fn read_hex(text: &[u8], bytes: &mut [u8]) -> Option<()> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let (pairs, _) = text.as_chunks::<2>();
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_through_lowercase_digits() {
        let bytes = [0x00, 0x1f, 0xa0, 0xff];
        let mut decoded = [0; 4];
        assert_eq!(hex(&bytes), "001fa0ff");
        assert_eq!(read_hex(b"001fa0ff", &mut decoded), Some(()));
        assert_eq!(decoded, bytes);
    }

    #[test]
    fn other_digits_are_rejected() {
        for text in ["0g", "1F", " 1", "+1"] {
            assert_eq!(read_hex(text.as_bytes(), &mut [0]), None, "{text}");
        }
    }
}
