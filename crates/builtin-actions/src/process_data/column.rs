//! Incremental profile of one column.

use std::{cmp::Reverse, collections::HashMap};

use crate::{
    date::Date,
    process_data::profile::{ColumnProfile, ColumnType, ValueCount},
    statistics::NumericSummary,
};

/// Maximum number of distinct values that are counted, which bounds memory.
const MAX_DISTINCT: usize = 10_000;
/// Number of most frequent values in a profile.
const TOP_VALUES: usize = 5;
/// Maximum length of a value in a profile, in characters; longer values are truncated.
const MAX_VALUE_CHARS: usize = 100;
/// Maximum magnitude of a number; larger numbers are treated as text, because the sum of their squares could
/// overflow.
const MAX_MAGNITUDE: f64 = 1e150;

/// Builds the profile of a column from its values.
pub(super) struct ColumnProfiler {
    name: String,
    count: u64,
    missing: u64,
    /// Number of occurrences of each of the first [`MAX_DISTINCT`] distinct values.
    occurrences: HashMap<String, u64>,
    has_more_distinct: bool,
    possible: PossibleTypes,
    /// All values, as long as every value is a number.
    numbers: Vec<f64>,
}

/// Types that match all values so far.
struct PossibleTypes {
    integer: bool,
    number: bool,
    boolean: bool,
    date: bool,
}

impl ColumnProfiler {
    /// Returns a profiler without values.
    pub(super) fn new(name: String) -> Self {
        Self {
            name,
            count: 0,
            missing: 0,
            occurrences: HashMap::new(),
            has_more_distinct: false,
            possible: PossibleTypes { integer: true, number: true, boolean: true, date: true },
            numbers: Vec::new(),
        }
    }

    /// Adds the field of a row.
    pub(super) fn add(&mut self, field: &str) {
        if is_missing(field) {
            self.missing += 1;
            return;
        }
        self.count += 1;
        self.count_occurrence(field);
        let number = parse_number(field);
        self.possible.narrow(field, number.is_some());
        match number {
            Some(number) if self.possible.number => self.numbers.push(number),
            _ => self.numbers = Vec::new(),
        }
    }

    fn count_occurrence(&mut self, value: &str) {
        if let Some(occurrences) = self.occurrences.get_mut(value) {
            *occurrences += 1;
        } else if self.occurrences.len() < MAX_DISTINCT {
            self.occurrences.insert(value.to_owned(), 1);
        } else {
            self.has_more_distinct = true;
        }
    }

    /// Returns the profile of the added values.
    pub(super) fn finish(self) -> ColumnProfile {
        ColumnProfile {
            kind: if self.count == 0 { ColumnType::Empty } else { self.possible.narrowest() },
            name: self.name,
            count: self.count,
            missing: self.missing,
            distinct: self.occurrences.len() as u64,
            distinct_is_lower_bound: self.has_more_distinct,
            top: most_frequent(self.occurrences),
            numbers: NumericSummary::of(self.numbers),
        }
    }
}

impl PossibleTypes {
    fn narrow(&mut self, value: &str, is_number: bool) {
        self.integer = self.integer && is_integer(value);
        self.number = self.number && is_number;
        self.boolean = self.boolean && is_boolean(value);
        self.date = self.date && value.parse::<Date>().is_ok();
    }

    fn narrowest(&self) -> ColumnType {
        match self {
            Self { integer: true, number: true, .. } => ColumnType::Integer,
            Self { number: true, .. } => ColumnType::Number,
            Self { boolean: true, .. } => ColumnType::Boolean,
            Self { date: true, .. } => ColumnType::Date,
            _ => ColumnType::Text,
        }
    }
}

fn is_missing(field: &str) -> bool {
    field.is_empty()
        || ["na", "n/a", "null", "nan"].iter().any(|name| field.eq_ignore_ascii_case(name))
}

fn is_boolean(value: &str) -> bool {
    value.eq_ignore_ascii_case("true") || value.eq_ignore_ascii_case("false")
}

fn is_integer(value: &str) -> bool {
    let digits = value.strip_prefix(['-', '+']).unwrap_or(value);
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// Parses a decimal number; `inf` and `nan`, which Rust also parses, are text.
fn parse_number(value: &str) -> Option<f64> {
    let decimal = |byte: u8| byte.is_ascii_digit() || b"+-.eE".contains(&byte);
    if !value.bytes().all(decimal) {
        return None;
    }
    value.parse().ok().filter(|number: &f64| number.abs() <= MAX_MAGNITUDE)
}

fn most_frequent(occurrences: HashMap<String, u64>) -> Vec<ValueCount> {
    let mut by_frequency: Vec<_> = occurrences.into_iter().collect();
    by_frequency.sort_unstable_by(|(value, count), (other_value, other_count)| {
        (Reverse(count), value).cmp(&(Reverse(other_count), other_value))
    });
    let top = by_frequency.into_iter().take(TOP_VALUES);
    top.map(|(value, count)| ValueCount { value: truncated(value), count }).collect()
}

fn truncated(mut value: String) -> String {
    if let Some((end, _)) = value.char_indices().nth(MAX_VALUE_CHARS) {
        value.truncate(end);
        value.push('…');
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(values: &[&str]) -> ColumnProfile {
        let mut profiler = ColumnProfiler::new("x".into());
        values.iter().for_each(|value| profiler.add(value));
        profiler.finish()
    }

    #[test]
    fn the_type_is_the_narrowest_that_matches_all_values() {
        for (values, kind) in [
            (&["1", "-2", "+3", "007"][..], ColumnType::Integer),
            (&["1", "2.5", "-1e3", ".5"], ColumnType::Number),
            (&["true", "FALSE", "na"], ColumnType::Boolean),
            (&["2026-01-31", "", "2024-02-29"], ColumnType::Date),
            (&["2026-02-30"], ColumnType::Text),
            (&["1", "x"], ColumnType::Text),
            (&["true", "1"], ColumnType::Text),
            (&["inf"], ColumnType::Text),
            (&["1e151"], ColumnType::Text),
            (&["-"], ColumnType::Text),
            (&["1-2"], ColumnType::Text),
            (&["", "NA", "n/a", "NULL", "nan"], ColumnType::Empty),
            (&[], ColumnType::Empty),
        ] {
            assert_eq!(profile(values).kind, kind, "{values:?}");
        }
    }

    #[test]
    fn missing_values_are_counted_separately() {
        let column = profile(&["NA", "N/a", "Null", "NaN", "", "1", "nap"]);
        assert_eq!((column.count, column.missing, column.distinct), (2, 5, 2));
    }

    #[test]
    fn only_columns_of_numbers_have_a_numeric_summary() {
        assert_eq!(profile(&["1", "2", "x", "3"]).numbers, None);
        assert_eq!(profile(&[""]).numbers, None);
        assert_eq!(profile(&["1", "NA", "4"]).numbers.unwrap().mean, 2.5);
    }

    #[test]
    fn statistics_of_the_largest_numbers_are_finite() {
        let numbers = profile(&["1e150", "-1e150", "1e-300"]).numbers.unwrap();
        assert!(numbers.standard_deviation.unwrap().is_finite());
        assert!(numbers.mean.is_finite());
    }

    #[test]
    fn equally_frequent_values_are_sorted_by_value() {
        let column = profile(&["b", "c", "a", "c", "f", "e", "d"]);
        let top: Vec<_> = column.top.iter().map(|top| (top.value.as_str(), top.count)).collect();
        assert_eq!(top, [("c", 2), ("a", 1), ("b", 1), ("d", 1), ("e", 1)]);
    }

    #[test]
    fn the_distinct_count_is_a_lower_bound_beyond_ten_thousand_values() {
        let mut profiler = ColumnProfiler::new("x".into());
        for number in 0..MAX_DISTINCT {
            profiler.add(&number.to_string());
        }
        profiler.add("9999");
        assert!(!profiler.has_more_distinct);
        profiler.add("another");
        profiler.add("9999");
        let column = profiler.finish();
        assert_eq!((column.distinct, column.distinct_is_lower_bound), (10_000, true));
        assert_eq!((column.count, column.top[0].count), (10_003, 3));
    }

    #[test]
    fn long_values_are_truncated() {
        let column = profile(&["é".repeat(101).as_str(), "é".repeat(100).as_str()]);
        let lengths: Vec<_> = column.top.iter().map(|top| top.value.chars().count()).collect();
        assert_eq!(lengths, [100, 101]);
        assert!(column.top[1].value.ends_with("é…"));
    }
}
