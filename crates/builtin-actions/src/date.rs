//! Calendar dates (UTC), formatted as `2026-01-31`.

use std::{fmt, str::FromStr};

use streamer_core::Timestamp;
use time::{Duration, UtcDateTime, macros::format_description};

const MILLIS_PER_DAY: i64 = 86_400_000;
const EPOCH: Date = Date(UtcDateTime::UNIX_EPOCH.date());
const LENGTH: usize = "2026-01-31".len();

/// Date of the proleptic Gregorian calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Date(time::Date);

impl Date {
    /// Returns the date of the given time.
    pub(crate) fn of(time: Timestamp) -> Self {
        EPOCH.plus(time.as_millis().div_euclid(MILLIS_PER_DAY))
    }

    /// Returns the start of the day.
    pub(crate) fn start(self) -> Timestamp {
        Timestamp::from_millis(self.since(EPOCH) * MILLIS_PER_DAY)
    }

    /// Returns the date that is `days` days later, at most the last day of the year 9999.
    pub(crate) fn plus(self, days: i64) -> Self {
        Self(self.0.saturating_add(Duration::days(days)))
    }

    /// Returns the number of days since `earlier`; negative if `earlier` is later.
    pub(crate) fn since(self, earlier: Self) -> i64 {
        (self.0 - earlier.0).whole_days()
    }
}

/// The text is not a date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InvalidDate;

impl FromStr for Date {
    type Err = InvalidDate;

    fn from_str(text: &str) -> Result<Self, InvalidDate> {
        // The format also accepts a sign before the year.
        let date = Some(text).filter(|text| text.len() == LENGTH).and_then(|text| {
            time::Date::parse(text, format_description!("[year]-[month]-[day]")).ok()
        });
        date.map(Self).ok_or(InvalidDate)
    }
}

impl fmt::Display for Date {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_days_since_1970() {
        for (text, days) in [
            ("1970-01-01", 0),
            ("1969-12-31", -1),
            ("2000-02-29", 11_016),
            ("2000-03-01", 11_017),
            ("2026-01-31", 20_484),
            ("0000-03-01", -719_468),
            ("9999-12-31", 2_932_896),
        ] {
            assert_eq!(text.parse(), Ok(EPOCH.plus(days)), "{text}");
            assert_eq!(EPOCH.plus(days).to_string(), text);
        }
    }

    #[test]
    fn invalid_dates_are_rejected() {
        for text in [
            "",
            "2026-02-29",
            "2100-02-29",
            "2026-04-31",
            "2026-00-10",
            "2026-13-01",
            "2026-01-00",
            "2026-1-01",
            "26-01-01",
            "2026/01/01",
            "2026-01-01T00:00:00Z",
            "+026-01-01",
            "+2026-01-01",
            "２０26-01",
        ] {
            assert_eq!(text.parse::<Date>(), Err(InvalidDate), "{text}");
        }
    }

    #[test]
    fn a_date_starts_at_midnight_utc() {
        let date: Date = "2026-11-24".parse().unwrap();
        assert_eq!(date.start().to_string(), "2026-11-24T00:00:00.000Z");
        assert_eq!(Date::of(Timestamp::from_millis(date.start().as_millis() - 1)), date.plus(-1));
        assert_eq!(Date::of(date.start()), date);
        assert_eq!(date.plus(3).since(date), 3);
    }
}
