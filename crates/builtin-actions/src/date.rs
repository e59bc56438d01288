//! Calendar dates (UTC), formatted as `2026-01-31`.

use std::{fmt, str::FromStr};

use streamer_core::Timestamp;

const MILLIS_PER_DAY: i64 = 86_400_000;

/// Date, as days since 1970-01-01 in the proleptic Gregorian calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Date(i64);

impl Date {
    /// Returns the date of the given time.
    pub(crate) fn of(time: Timestamp) -> Self {
        Self(time.as_millis().div_euclid(MILLIS_PER_DAY))
    }

    /// Returns the start of the day.
    pub(crate) fn start(self) -> Timestamp {
        Timestamp::from_millis(self.0 * MILLIS_PER_DAY)
    }

    /// Returns the date that is `days` days later.
    pub(crate) fn plus(self, days: i64) -> Self {
        Self(self.0 + days)
    }

    /// Returns the number of days since `earlier`; negative if `earlier` is later.
    pub(crate) fn since(self, earlier: Self) -> i64 {
        self.0 - earlier.0
    }
}

/// The text is not a date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InvalidDate;

impl FromStr for Date {
    type Err = InvalidDate;

    fn from_str(text: &str) -> Result<Self, InvalidDate> {
        let shape_matches = text.len() == 10
            && text.bytes().enumerate().all(|(position, byte)| match position {
                4 | 7 => byte == b'-',
                _ => byte.is_ascii_digit(),
            });
        if !shape_matches {
            return Err(InvalidDate);
        }
        let number = |from, to| text[from..to].parse::<i64>().map_err(|_| InvalidDate);
        let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
        let days = Self(days_from_civil(year, month, day));
        // A date that does not exist is formatted differently: February 30 becomes March 2.
        if days.to_string() == text { Ok(days) } else { Err(InvalidDate) }
    }
}

impl fmt::Display for Date {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = civil_from_days(self.0);
        write!(formatter, "{year:04}-{month:02}-{day:02}")
    }
}

/// Converts a year, month and day to the number of days since 1970-01-01. This function and the next one use
/// the method of Howard Hinnant, "chrono-compatible low-level date algorithms". Years begin in March, so that
/// the leap day is the last day; the calendar repeats with each era of 400 years.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let from_march_of_year_0 = days + 719_468;
    let era = from_march_of_year_0.div_euclid(146_097);
    let day_of_era = from_march_of_year_0.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
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
            assert_eq!(text.parse(), Ok(Date(days)), "{text}");
            assert_eq!(Date(days).to_string(), text);
        }
    }

    #[test]
    fn every_date_of_four_centuries_round_trips() {
        let first: Date = "1900-01-01".parse().unwrap();
        for days in 0..146_097 {
            let date = first.plus(days);
            assert_eq!(date.to_string().parse(), Ok(date));
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
