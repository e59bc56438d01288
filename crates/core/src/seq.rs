//! Positions of events in the log of a request.

use std::fmt;

/// Position of an event in the log of its request: 1 for the first event, without gaps. [`Seq::NONE`], which is 0, is
/// the position before the first event: a log that is read after it is read from the beginning.
///
/// The protocols and the stores represent a position as a signed 64-bit integer, so the range is 0 to `i64::MAX`. Each
/// of them converts a position once, where it enters or leaves the process. A log cannot reach the maximum; at both
/// ends of the range, arithmetic saturates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Seq(i64);

impl Seq {
    /// Position before the first event.
    pub const NONE: Self = Self(0);
    /// Position of the first event.
    pub const FIRST: Self = Self(1);
    /// Greatest position, which no event has.
    pub const MAX: Self = Self(i64::MAX);

    /// Returns the position that a field of a protocol or of a store contains.
    ///
    /// # Errors
    /// Returns an error if `number` is negative. The error does not contain the name of the field, which the caller
    /// adds.
    pub const fn from_i64(number: i64) -> Result<Self, InvalidSeq> {
        if number < 0 { Err(InvalidSeq(number)) } else { Ok(Self(number)) }
    }

    /// Returns the position as a number, for a field of a protocol or of a store.
    #[must_use]
    pub const fn as_i64(self) -> i64 {
        self.0
    }

    /// Returns the position of the next event.
    #[must_use]
    pub const fn next(self) -> Self {
        self.plus(1)
    }

    /// Returns the position of the previous event; [`Seq::NONE`] for the first event.
    #[must_use]
    pub const fn previous(self) -> Self {
        if self.0 == 0 { self } else { Self(self.0 - 1) }
    }

    /// Returns the position that is `events` events later.
    #[must_use]
    pub const fn plus(self, events: usize) -> Self {
        // On the supported platforms, `usize` has at most 64 bits.
        Self(match self.0.checked_add_unsigned(events as u64) {
            Some(number) => number,
            None => i64::MAX,
        })
    }

    /// Returns the number of events after `earlier`, up to this position; negative if `earlier` is the later position.
    #[must_use]
    pub const fn events_since(self, earlier: Self) -> i64 {
        self.0 - earlier.0
    }

    /// Returns the index of this position in a list of contiguous events that begins with `first`; `None` if the
    /// position precedes the list.
    #[must_use]
    pub fn index_from(self, first: Self) -> Option<usize> {
        usize::try_from(self.events_since(first)).ok()
    }
}

impl From<u32> for Seq {
    fn from(number: u32) -> Self {
        Self(number.into())
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, formatter)
    }
}

/// Error returned for a number that is not a [`Seq`]. Contains the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be 0 to {max}, is {0}", max = i64::MAX)]
pub struct InvalidSeq(pub i64);

#[cfg(test)]
mod tests {
    use super::{InvalidSeq, Seq};

    #[test]
    fn numbers_round_trip_and_negative_ones_are_rejected() {
        for number in [0, 1, i64::MAX] {
            assert_eq!(Seq::from_i64(number).map(Seq::as_i64), Ok(number));
        }
        assert_eq!(Seq::from_i64(-1), Err(InvalidSeq(-1)));
        assert_eq!(InvalidSeq(-1).to_string(), "must be 0 to 9223372036854775807, is -1");
    }

    #[test]
    fn the_first_event_follows_the_position_before_it() {
        assert_eq!(Seq::default(), Seq::NONE);
        assert_eq!(Seq::NONE.next(), Seq::FIRST);
        assert_eq!(Seq::FIRST.previous(), Seq::NONE);
        assert_eq!((Seq::from(7).next(), Seq::from(7).previous()), (Seq::from(8), Seq::from(6)));
        assert_eq!(Seq::from(7).plus(3), Seq::from(10));
        assert_eq!(Seq::from(7).to_string(), "7");
    }

    #[test]
    fn arithmetic_stays_in_the_range() {
        assert_eq!(Seq::NONE.previous(), Seq::NONE);
        assert_eq!(Seq::MAX.next(), Seq::MAX);
        assert_eq!(Seq::FIRST.plus(usize::MAX), Seq::MAX);
        assert_eq!(Seq::NONE.events_since(Seq::MAX), -i64::MAX);
    }

    #[test]
    fn events_are_counted_from_an_earlier_position() {
        assert_eq!(Seq::from(9).events_since(Seq::from(4)), 5);
        assert_eq!(Seq::from(4).events_since(Seq::from(9)), -5);
        assert_eq!(Seq::from(9).index_from(Seq::from(4)), Some(5));
        assert_eq!(Seq::from(4).index_from(Seq::from(4)), Some(0));
        assert_eq!(Seq::from(3).index_from(Seq::from(4)), None);
    }

    #[test]
    fn a_position_is_as_small_as_its_number() {
        assert_eq!(size_of::<Seq>(), size_of::<i64>());
    }
}
