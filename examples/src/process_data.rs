//! `process_data`: profiles a table given as CSV, column by column.
//!
//! The table is gone through twice: once to check its shape and count its rows, so that a broken
//! table is refused at once and progress can tell how much is left; once to profile it. Each
//! column's profile is put out as soon as it is ready, and all of them are the result.

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

/// After so many rows without a pause, others get a turn.
const ROWS_PER_TURN: u64 = 256;
/// Progress is told about this many times while rows are read.
const ROW_REPORTS: u64 = 50;
/// Reading rows takes about this share of the time, in percent.
const ROWS_PERCENTAGE: f64 = 90.0;
/// Longest name of a table, in characters.
const MAX_NAME_CHARS: usize = 256;

/// Profiles a CSV.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessData;

/// The payload of [`ProcessData`].
#[derive(Debug, Deserialize)]
pub struct ProcessDataPayload {
    /// The table, its first line the names of the columns.
    pub csv: String,
    /// What the table is called, for people; `table` when absent.
    pub name: Option<String>,
    /// One ASCII character; when absent, whichever of comma, semicolon, tab and bar is most
    /// frequent in the first line.
    pub delimiter: Option<String>,
}

#[async_trait]
impl Handler for ProcessData {
    type Input = ProcessDataPayload;
    type Output = Profile;

    fn spec(&self) -> ActionSpec {
        ActionSpec::new("process_data")
            .describe("Profiles a CSV: types, missing values, most frequent values, statistics")
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
        let profile = put_out_columns(context, profilers).await?;
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
                "description": "The table, its first line the names of the columns",
            },
            "name": {
                "type": "string",
                "maxLength": MAX_NAME_CHARS,
                "description": "What the table is called, for people",
            },
            "delimiter": {
                "type": "string",
                "minLength": 1,
                "maxLength": 1,
                "description": "Detected when absent",
            },
        },
    })
    .to_string()
}

/// Counts the rows, which also checks that each has as many fields as the header.
async fn count_rows(context: &Context, table: &Table<'_>) -> Result<u64, HandlerError> {
    let mut rows = table.rows();
    while rows.next()?.is_some() {
        take_turns(context, rows.number()).await?;
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
            profiler.see(field);
        }
        let number = rows.number();
        if number.is_multiple_of(rows_per_report) || number == total {
            let percentage = ROWS_PERCENTAGE * number as f64 / total as f64;
            let message = format!("row {number} of {total}");
            context.progress_with(percentage, message, &json!({ "rows": number })).await?;
        }
        take_turns(context, number).await?;
    }
    Ok(profilers)
}

/// Ends each column's profile, which is where the sorting is done, and puts it out.
async fn put_out_columns(
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
        take_turns(context, 0).await?;
    }
    Ok(columns)
}

/// Notices cancellation, and lets other tasks run now and then: computing does not wait for
/// anything, and would otherwise keep its thread to itself until it is done.
async fn take_turns(context: &Context, rows: u64) -> Result<(), HandlerError> {
    if context.is_cancelled() {
        return Err(HandlerError::cancelled());
    }
    if rows.is_multiple_of(ROWS_PER_TURN) {
        tokio::task::yield_now().await;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
