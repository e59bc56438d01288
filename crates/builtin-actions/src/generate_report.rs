//! `generate_report`: writes a web page, either about a table that `process_data` profiled or
//! about the user's own requests in a period.
//!
//! The page is one self-contained file without scripts. It is streamed in chunks, so that a reader
//! can display the page while the remainder is written; the concatenated chunks are the file.

mod chart;
mod html;
mod page;
mod profile_page;
mod requests_page;
mod summary;
mod usage;

use serde::Deserialize;
use serde_json::json;
use streamer_handler::{ActionSpec, Context, Handler, HandlerError, async_trait};

use crate::{date::Date, process_data::Profile};

use requests_page::MAX_REQUESTS;
pub use summary::ReportSummary;

/// Maximum period of a report, in days: each day is a bar of the histogram.
const MAX_DAYS: i64 = 366;
/// Writes a report as a web page.
#[derive(Clone, Copy, Debug, Default)]
pub struct GenerateReport;

/// Payload of [`GenerateReport`]: either `profile`, or `from` and `to`.
#[derive(Debug, Deserialize)]
pub struct GenerateReportPayload {
    /// Result of `process_data`.
    pub profile: Option<Profile>,
    /// First day of the requests to report on (UTC), as `2026-01-01`.
    pub from: Option<String>,
    /// Last day of the requests to report on, inclusive.
    pub to: Option<String>,
}

#[async_trait]
impl Handler for GenerateReport {
    type Input = GenerateReportPayload;
    type Output = ReportSummary;

    fn spec(&self) -> ActionSpec {
        ActionSpec::new("generate_report")
            .describe("Writes a web page about a profiled table, or about your own requests")
            .payload_schema(payload_schema())
    }

    async fn handle(
        &self,
        context: &Context,
        payload: GenerateReportPayload,
    ) -> Result<ReportSummary, HandlerError> {
        match Subject::of(payload)? {
            Subject::Table(profile) => profile_page::write(context, &profile).await,
            Subject::Requests { from, to } => {
                let (start, end) = (from.start(), to.plus(1).start());
                let requests = context.requests(start, end, MAX_REQUESTS).await?;
                let usage = usage::Usage::of(&requests, from, to);
                let is_truncated = requests.len() == MAX_REQUESTS;
                requests_page::write(context, &usage, is_truncated).await
            }
        }
    }
}

/// Subject of a report.
enum Subject {
    Table(Profile),
    /// Requests that were accepted in a period, of which both days are inclusive.
    Requests {
        from: Date,
        to: Date,
    },
}

impl Subject {
    fn of(payload: GenerateReportPayload) -> Result<Self, HandlerError> {
        match (payload.profile, payload.from, payload.to) {
            (Some(profile), None, None) => Ok(Self::Table(profile)),
            (None, Some(from), Some(to)) => {
                let from = parse_date("payload.from", &from)?;
                let to = parse_date("payload.to", &to)?;
                let days = to.since(from);
                if !(0..MAX_DAYS).contains(&days) {
                    let last = MAX_DAYS - 1;
                    let rule = format!("must be 0 to {last} days after from, is {days}");
                    return Err(HandlerError::invalid("payload.to", rule));
                }
                Ok(Self::Requests { from, to })
            }
            (None, Some(_), None) => {
                Err(HandlerError::invalid("payload.to", "is required with from"))
            }
            (None, None, Some(_)) => {
                Err(HandlerError::invalid("payload.from", "is required with to"))
            }
            (None, None, None) => Err(HandlerError::invalid(
                "payload",
                "must contain either profile, or from and to; contains neither",
            )),
            (Some(_), ..) => Err(HandlerError::invalid(
                "payload",
                "must contain either profile, or from and to; contains both",
            )),
        }
    }
}

fn parse_date(field: &str, text: &str) -> Result<Date, HandlerError> {
    text.parse().map_err(|_| HandlerError::invalid(field, "must be a date, such as 2026-01-31"))
}

/// Returns the schema. The handler checks that either `profile` or the period is present, because its
/// error message is clearer.
fn payload_schema() -> String {
    let date = |description: &str| {
        json!({
            "type": "string",
            "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$",
            "description": description,
        })
    };
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "profile": { "type": "object", "description": "Result of process_data" },
            "from": date("First day of the requests to report on (UTC)"),
            "to": date("Last day of the requests to report on, inclusive"),
        },
    })
    .to_string()
}

#[cfg(test)]
mod tests;
