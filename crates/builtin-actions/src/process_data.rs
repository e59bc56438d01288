//! `process_data`: profiles a CSV table, column by column.
//!
//! The table is read twice: first to check its shape and count its rows, so that an invalid table is
//! rejected immediately and progress is relative to the number of rows; then to profile it. The
//! profile of each column is emitted as an output chunk when it is complete; the result contains all profiles.

mod column;
mod profile;
mod table;

use serde::Deserialize;
use serde_json::json;
use streamer_handler::{ActionSpec, Context, Handler, HandlerError, async_trait};

use column::ColumnProfiler;
use table::Table;

pub use crate::statistics::{Histogram, NumericSummary};
pub use profile::{ColumnProfile, ColumnType, Profile, ValueCount};

/// Number of rows after which the handler yields to other tasks.
const ROWS_PER_YIELD: u64 = 256;
/// Approximate number of progress reports while rows are read.
const ROW_REPORTS: u64 = 50;
/// Estimated share of the time that reading rows takes, in percent.
const ROWS_PERCENTAGE: f64 = 90.0;
/// Maximum length of a table's name, in characters.
const MAX_NAME_CHARS: usize = 256;

/// Profiles a CSV table.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessData;

/// Payload of [`ProcessData`].
#[derive(Debug, Deserialize)]
pub struct ProcessDataPayload {
    /// Table, whose first line contains the names of the columns.
    pub csv: String,
    /// Name of the table, for display; `table` if absent.
    pub name: Option<String>,
    /// Separator of fields, one ASCII character; if absent, the most frequent of comma, semicolon, tab and
    /// vertical bar in the first line.
    pub delimiter: Option<String>,
}

#[async_trait]
impl Handler for ProcessData {
    type Input = ProcessDataPayload;
    type Output = Profile;

    fn spec(&self) -> ActionSpec {
        ActionSpec::new("process_data")
            .describe("Profiles a CSV table: types, missing and most frequent values, statistics")
            .payload_schema(payload_schema())
    }

    async fn handle(
        &self,
        context: &Context,
        payload: ProcessDataPayload,
    ) -> Result<Profile, HandlerError> {
        let name = payload.name.unwrap_or_else(|| "table".into());
        if name.chars().count() > MAX_NAME_CHARS {
            let rule = format!("must be at most {MAX_NAME_CHARS} characters");
            return Err(HandlerError::invalid("payload.name", rule));
        }
        let table = Table::open(&payload.csv, payload.delimiter.as_deref())?;
        let rows = count_rows(context, &table).await?;
        let profilers = read_rows(context, &table, rows).await?;
        let profile = emit_columns(context, profilers).await?;
        Ok(Profile {
            name,
            rows,
            columns: profile.len() as u64,
            delimiter: char::from(table.delimiter()).into(),
            profile,
        })
    }
}

fn payload_schema() -> String {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "required": ["csv"],
        "properties": {
            "csv": {
                "type": "string",
                "minLength": 1,
                "description": "The table; its first line contains the names of the columns",
            },
            "name": {
                "type": "string",
                "maxLength": MAX_NAME_CHARS,
                "description": "Name of the table, for display",
            },
            "delimiter": {
                "type": "string",
                "minLength": 1,
                "maxLength": 1,
                "description": "Detected if absent",
            },
        },
    })
    .to_string()
}

/// Counts the rows, and checks that each has as many fields as the header.
async fn count_rows(context: &Context, table: &Table<'_>) -> Result<u64, HandlerError> {
    let mut rows = table.rows();
    while rows.next()?.is_some() {
        yield_periodically(context, rows.number()).await?;
    }
    Ok(rows.number())
}

async fn read_rows(
    context: &Context,
    table: &Table<'_>,
    total: u64,
) -> Result<Vec<ColumnProfiler>, HandlerError> {
    let mut profilers: Vec<_> = table.names().iter().cloned().map(ColumnProfiler::new).collect();
    let rows_per_report = (total / ROW_REPORTS).max(1);
    let mut rows = table.rows();
    while let Some(row) = rows.next()? {
        for (profiler, field) in profilers.iter_mut().zip(row) {
            profiler.add(field);
        }
        let number = rows.number();
        if number.is_multiple_of(rows_per_report) || number == total {
            let percentage = ROWS_PERCENTAGE * number as f64 / total as f64;
            let message = format!("row {number} of {total}");
            context.progress_with(percentage, message, &json!({ "rows": number })).await?;
        }
        yield_periodically(context, number).await?;
    }
    Ok(profilers)
}

/// Completes and emits the profile of each column; the completion of a profile sorts the values.
async fn emit_columns(
    context: &Context,
    profilers: Vec<ColumnProfiler>,
) -> Result<Vec<ColumnProfile>, HandlerError> {
    let total = profilers.len();
    let mut columns = Vec::with_capacity(total);
    for profiler in profilers {
        let column = profiler.finish();
        context.output(&column).await?;
        let done = columns.len() + 1;
        let percentage = ROWS_PERCENTAGE + (100.0 - ROWS_PERCENTAGE) * done as f64 / total as f64;
        context.progress(percentage, format!("column {done} of {total}: {}", column.name)).await?;
        columns.push(column);
        yield_periodically(context, 0).await?;
    }
    Ok(columns)
}

/// Checks for cancellation, and periodically yields to other tasks: the computation itself never yields and
/// would block its thread until it completes.
async fn yield_periodically(context: &Context, rows: u64) -> Result<(), HandlerError> {
    if context.is_cancelled() {
        return Err(HandlerError::cancelled());
    }
    if rows.is_multiple_of(ROWS_PER_YIELD) {
        tokio::task::yield_now().await;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
