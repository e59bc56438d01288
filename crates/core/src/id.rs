//! Globally unique identifiers.

use std::{fmt, str::FromStr};

use ulid::Ulid;

use crate::{Timestamp, saturate};

/// Identifier that the server assigns: a ULID. Identifiers sort by creation time. The text form consists of 26
/// characters of Crockford's Base32; the binary form consists of 16 bytes, big-endian.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uid(Ulid);

impl Uid {
    /// Returns a new ID with the timestamp `now` and 80 random bits.
    ///
    /// # Panics
    /// Panics if the operating system cannot provide random bytes.
    #[must_use]
    pub fn new(now: Timestamp) -> Self {
        let mut random = [0; 16];
        getrandom::fill(&mut random[..10]).expect("the operating system provides random bytes");
        let random = u128::from_le_bytes(random);
        Self(Ulid::from_parts(saturate::to_u64(now.as_millis()), random))
    }

    /// Returns a new ID that follows this one, with the timestamp `now` unless that is not later. The IDs after this one
    /// are not predictable, but have fewer random bits.
    ///
    /// # Panics
    /// Panics if the operating system cannot provide random bytes.
    #[must_use]
    pub fn next(self, now: Timestamp) -> Self {
        if now > self.time() {
            return Self::new(now);
        }
        let random = getrandom::u32().expect("the operating system provides random bytes");
        Self(Ulid(self.0.0.saturating_add(u128::from(random) + 1)))
    }

    /// Returns the smallest ID with the timestamp `moment`, for use as a bound of range queries by time.
    #[must_use]
    pub fn first_of(moment: Timestamp) -> Self {
        Self(Ulid::from_parts(saturate::to_u64(moment.as_millis()), 0))
    }

    /// Returns the 16 bytes of the ID, big-endian. The bytes sort in the same order as the IDs.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_bytes()
    }

    /// Returns the ID with the given 16 bytes; `None` if the length is not 16.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        <[u8; 16]>::try_from(bytes).ok().map(|bytes| Self(Ulid::from_bytes(bytes)))
    }

    /// Returns the creation time.
    #[must_use]
    pub fn time(self) -> Timestamp {
        Timestamp::from_millis(saturate::to_i64(self.0.timestamp_ms()))
    }

    /// Returns a uniformly distributed number that is derived from the ID, for sharding.
    #[must_use]
    pub fn spread(self) -> u64 {
        let low = self.to_bytes();
        u64::from_be_bytes([low[8], low[9], low[10], low[11], low[12], low[13], low[14], low[15]])
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [0; ulid::ULID_LEN];
        formatter.write_str(self.0.array_to_str(&mut text))
    }
}

impl fmt::Debug for Uid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// Error returned for a text that is not a ULID.
#[derive(Debug, thiserror::Error)]
#[error("is not a ULID: 26 characters of Crockford's base 32")]
pub struct InvalidUid;

impl FromStr for Uid {
    type Err = InvalidUid;

    fn from_str(text: &str) -> Result<Self, InvalidUid> {
        let uid = Ulid::from_string(text).map(Self).map_err(|_| InvalidUid)?;
        // 26 characters can encode more than 128 bits, and some letters are aliases of digits. Only the canonical
        // encoding is accepted, in upper or lower case.
        let mut canonical = [0; ulid::ULID_LEN];
        let canonical = uid.0.array_to_str(&mut canonical);
        if canonical.eq_ignore_ascii_case(text) { Ok(uid) } else { Err(InvalidUid) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_id_follows() {
        let at = Timestamp::from_millis;
        let mut last = Uid::new(at(1_000));
        for now in [1_000, 1_000, 900, 1_001] {
            let next = last.next(at(now));
            assert!(next > last);
            last = next;
        }
        assert_eq!(last.time(), at(1_001));
    }

    #[test]
    fn text_and_bytes_round_trip() {
        let uid = Uid::new(Timestamp::from_millis(1_700_000_000_123));
        assert_eq!(uid.to_string().parse::<Uid>().unwrap(), uid);
        assert_eq!(Uid::from_slice(&uid.to_bytes()), Some(uid));
        assert_eq!(uid.time().as_millis(), 1_700_000_000_123);
    }

    #[test]
    fn later_ids_sort_later() {
        let early = Uid::new(Timestamp::from_millis(1));
        let late = Uid::new(Timestamp::from_millis(2));
        assert!(early < late);
        assert!(early.to_bytes() < late.to_bytes());
        assert!(early.to_string() < late.to_string());
    }

    #[test]
    fn malformed_text_is_rejected() {
        for text in ["", "req-1", "01ARZ3NDEKTSV4RRFFQ69G5FA", "01ARZ3NDEKTSV4RRFFQ69G5FAVX"] {
            assert!(text.parse::<Uid>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_the_canonical_encoding_is_accepted_in_either_case() {
        assert!("7ZZZZZZZZZZZZZZZZZZZZZZZZZ".parse::<Uid>().is_ok());
        assert!("01arz3ndektsv4rrffq69g5fav".parse::<Uid>().is_ok());
        for text in [
            "8ZZZZZZZZZZZZZZZZZZZZZZZZZ",
            "G1ARZ3NDEKTSV4RRFFQ69G5FAV",
            "0IARZ3NDEKTSV4RRFFQ69G5FAV",
        ] {
            assert!(text.parse::<Uid>().is_err(), "{text}");
        }
    }
}
