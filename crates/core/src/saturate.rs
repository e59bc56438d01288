//! Conversions of sizes, counts and durations between number types. A value that the target type cannot represent
//! becomes the nearest value that it can, because the value is a limit or a measurement.
//!
//! Numbers that identify something have types that reject values out of range, such as [`Seq`](crate::Seq).

use std::time::Duration;

/// Unsigned integer, which exceeds the range of a target type only at its upper end.
pub trait Unsigned: TryInto<i32> + TryInto<i64> + TryInto<u32> + TryInto<usize> {}

impl Unsigned for u32 {}
impl Unsigned for u64 {}
impl Unsigned for u128 {}
impl Unsigned for usize {}

/// Converts a size or count to `i32`.
#[must_use]
pub fn to_i32(number: impl Unsigned) -> i32 {
    number.try_into().unwrap_or(i32::MAX)
}

/// Converts a size or count to `i64`.
#[must_use]
pub fn to_i64(number: impl Unsigned) -> i64 {
    number.try_into().unwrap_or(i64::MAX)
}

/// Converts a size or count to `u32`.
#[must_use]
pub fn to_u32(number: impl Unsigned) -> u32 {
    number.try_into().unwrap_or(u32::MAX)
}

/// Converts a size or count to `usize`.
#[must_use]
pub fn to_usize(number: impl Unsigned) -> usize {
    number.try_into().unwrap_or(usize::MAX)
}

/// Converts a signed size or count to `u64`; a negative one becomes 0.
#[must_use]
pub fn to_u64(number: impl Into<i64>) -> u64 {
    number.into().max(0).cast_unsigned()
}

/// Returns the whole milliseconds of a duration.
#[must_use]
pub fn to_millis(duration: Duration) -> i64 {
    to_i64(duration.as_millis())
}

/// Returns the duration of the given number of milliseconds; zero if it is negative.
#[must_use]
pub fn from_millis(millis: i64) -> Duration {
    Duration::from_millis(to_u64(millis))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_range_are_unchanged() {
        assert_eq!((to_i32(7_usize), to_i64(7_u64), to_u32(7_u128), to_usize(7_u32)), (7, 7, 7, 7));
        assert_eq!((to_u64(7_i64), to_u64(7_i32)), (7, 7));
    }

    #[test]
    fn numbers_out_of_range_become_the_nearest_number() {
        assert_eq!((to_i32(u32::MAX), to_i64(u64::MAX)), (i32::MAX, i64::MAX));
        assert_eq!((to_u32(u64::MAX), to_usize(u128::MAX)), (u32::MAX, usize::MAX));
        assert_eq!(to_u64(-1_i64), 0);
    }

    #[test]
    fn durations_are_converted_to_milliseconds_and_back() {
        assert_eq!(to_millis(Duration::from_micros(1_999)), 1);
        assert_eq!(to_millis(Duration::MAX), i64::MAX);
        assert_eq!(from_millis(1_500), Duration::from_millis(1_500));
        assert_eq!(from_millis(-1), Duration::ZERO);
    }
}
