//! What is told of a table: the result of `process_data`, and what `generate_report` reads.

use serde::{Deserialize, Serialize};

use crate::statistics::NumericSummary;

/// The profile of a table.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Profile {
    /// What the table is called.
    pub name: String,
    /// Rows, without the header.
    pub rows: u64,
    /// Columns.
    pub columns: u64,
    /// What stands between the fields of a row.
    pub delimiter: String,
    /// Each column, in the table's order.
    pub profile: Vec<ColumnProfile>,
}

/// The profile of one column.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct ColumnProfile {
    /// Its name, unique in the table.
    pub name: String,
    /// What all its values are.
    #[serde(rename = "type")]
    pub kind: ColumnType,
    /// Values that are there.
    pub count: u64,
    /// Values that are missing: empty, `NA`, `N/A`, `null` or `NaN`, in any case.
    pub missing: u64,
    /// How many different values there are.
    pub distinct: u64,
    /// Whether there are more different values than were told apart.
    #[serde(default)]
    pub distinct_is_lower_bound: bool,
    /// The most frequent values, the most frequent first, equally frequent ones in order of value.
    pub top: Vec<ValueCount>,
    /// For columns of numbers only.
    #[serde(flatten)]
    pub numbers: Option<NumericSummary>,
}

/// What all values of a column are: the narrowest type that fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ColumnType {
    /// Whole numbers.
    Integer,
    /// Decimal numbers, some of them not whole.
    Number,
    /// `true` or `false`, in any case.
    Boolean,
    /// Days as `2026-01-31`.
    Date,
    /// Anything else.
    Text,
    /// There are no values.
    Empty,
}

impl ColumnType {
    /// As the result writes it.
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

/// A value and how often it occurs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct ValueCount {
    /// The value; a very long one is cut off and ends in `…`.
    pub value: String,
    /// How often it occurs.
    pub count: u64,
}
