//! Profile of a table: the result of `process_data`, and an input of `generate_report`.

use serde::{Deserialize, Serialize};

use crate::statistics::NumericSummary;

/// Profile of a table.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Profile {
    /// Name of the table.
    pub name: String,
    /// Number of rows, without the header.
    pub rows: u64,
    /// Number of columns.
    pub columns: u64,
    /// Separator of the fields of a row.
    pub delimiter: String,
    /// Profiles of the columns, in the order of the table.
    pub profile: Vec<ColumnProfile>,
}

/// Profile of one column.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct ColumnProfile {
    /// Name of the column, unique in the table.
    pub name: String,
    /// Type of all values.
    #[serde(rename = "type")]
    pub kind: ColumnType,
    /// Number of values that are present.
    pub count: u64,
    /// Number of missing values: empty, `NA`, `N/A`, `null` or `NaN`, in any case.
    pub missing: u64,
    /// Number of distinct values.
    pub distinct: u64,
    /// Whether `distinct` is a lower bound because there are too many distinct values to count.
    #[serde(default)]
    pub distinct_is_lower_bound: bool,
    /// Most frequent values, by descending frequency; equally frequent values are in order of value.
    pub top: Vec<ValueCount>,
    /// Statistics, for numeric columns only.
    #[serde(flatten)]
    pub numbers: Option<NumericSummary>,
}

/// Type of a column: the narrowest type that matches all values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ColumnType {
    /// Integers.
    Integer,
    /// Decimal numbers, not all of them integers.
    Number,
    /// `true` or `false`, in any case.
    Boolean,
    /// Dates such as `2026-01-31`.
    Date,
    /// Anything else.
    Text,
    /// No values.
    Empty,
}

impl ColumnType {
    /// Returns the name of the type in the result.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Integer => "integer",
            Self::Number => "number",
            Self::Boolean => "boolean",
            Self::Date => "date",
            Self::Text => "text",
            Self::Empty => "empty",
        }
    }
}

/// Value and its number of occurrences.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct ValueCount {
    /// Value; a long value is truncated and ends with `…`.
    pub value: String,
    /// Number of occurrences.
    pub count: u64,
}
