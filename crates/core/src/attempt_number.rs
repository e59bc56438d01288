//! Numbers of attempts.

use std::fmt;

/// Number of an attempt of a request: 1 for the first attempt. [`AttemptNumber::NONE`], which is 0, means that no
/// attempt has started. The number of the current attempt is the fencing token of its writer.
///
/// The protocols represent the number as a signed 32-bit integer, so the range is 0 to `i32::MAX`. Each protocol and
/// store converts a number once, where it enters or leaves the process. A request cannot reach the maximum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptNumber(u32);

impl AttemptNumber {
    /// No attempt has started.
    pub const NONE: Self = Self(0);
    /// Number of the first attempt.
    pub const FIRST: Self = Self(1);
    /// Greatest number, which no attempt has.
    pub const MAX: Self = Self(i32::MAX.cast_unsigned());

    /// Returns the number that a field of a store contains.
    ///
    /// # Errors
    /// Returns an error if `number` is out of range. The error does not contain the name of the field, which the
    /// caller adds.
    pub fn from_i64(number: i64) -> Result<Self, InvalidAttemptNumber> {
        match u32::try_from(number).map(Self) {
            Ok(valid) if valid <= Self::MAX => Ok(valid),
            _ => Err(InvalidAttemptNumber(number)),
        }
    }

    /// Returns the number that a field of a protocol contains.
    ///
    /// # Errors
    /// Returns an error if `number` is negative. The error does not contain the name of the field, which the caller
    /// adds.
    pub fn from_i32(number: i32) -> Result<Self, InvalidAttemptNumber> {
        Self::from_i64(number.into())
    }

    /// Returns the number as a count of attempts, which includes this one.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        self.0
    }

    /// Returns the number for a field of a protocol.
    #[must_use]
    pub const fn as_i32(self) -> i32 {
        // The range is that of `i32`.
        self.0.cast_signed()
    }

    /// Returns the number of the next attempt; the same number if it is [`AttemptNumber::MAX`].
    #[must_use]
    pub const fn next(self) -> Self {
        if self.0 == Self::MAX.0 { self } else { Self(self.0 + 1) }
    }

    /// Returns the number of the previous attempt; [`AttemptNumber::NONE`] for the first attempt.
    #[must_use]
    pub const fn previous(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

impl From<u16> for AttemptNumber {
    fn from(number: u16) -> Self {
        Self(number.into())
    }
}

impl fmt::Display for AttemptNumber {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, formatter)
    }
}

/// Error returned for a number that is not an [`AttemptNumber`]. Contains the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be 0 to {max}, is {0}", max = AttemptNumber::MAX)]
pub struct InvalidAttemptNumber(pub i64);

#[cfg(test)]
mod tests {
    use super::{AttemptNumber, InvalidAttemptNumber};

    #[test]
    fn numbers_round_trip_in_both_representations() {
        for number in [0, 1, i32::MAX] {
            assert_eq!(AttemptNumber::from_i32(number).map(AttemptNumber::as_i32), Ok(number));
            let same = AttemptNumber::from_i64(number.into()).map(AttemptNumber::as_u32);
            assert_eq!(same, Ok(number.unsigned_abs()));
        }
    }

    #[test]
    fn numbers_out_of_range_are_rejected() {
        let max = i64::from(i32::MAX);
        for number in [-1, i64::MIN, max + 1, i64::from(u32::MAX), i64::MAX] {
            assert_eq!(AttemptNumber::from_i64(number), Err(InvalidAttemptNumber(number)));
        }
        let error = AttemptNumber::from_i32(-1).unwrap_err();
        assert_eq!(error.to_string(), "must be 0 to 2147483647, is -1");
    }

    #[test]
    fn attempts_are_numbered_from_one() {
        assert_eq!(AttemptNumber::default(), AttemptNumber::NONE);
        assert_eq!(AttemptNumber::NONE.next(), AttemptNumber::FIRST);
        assert_eq!(AttemptNumber::FIRST.previous(), AttemptNumber::NONE);
        assert_eq!(AttemptNumber::from(2).next(), AttemptNumber::from(3));
        assert_eq!(AttemptNumber::from(2).to_string(), "2");
    }

    #[test]
    fn arithmetic_stays_in_the_range() {
        assert_eq!(AttemptNumber::NONE.previous(), AttemptNumber::NONE);
        assert_eq!(AttemptNumber::MAX.next(), AttemptNumber::MAX);
        assert_eq!(AttemptNumber::MAX.as_i32(), i32::MAX);
    }

    #[test]
    fn a_number_has_no_more_bytes_than_in_the_protocols() {
        assert_eq!(size_of::<AttemptNumber>(), size_of::<i32>());
    }
}
