//! `generate_report`: writes a web page, either about a table that `process_data` profiled or
//! about the user's own requests of some days.
//!
//! The page is one file that needs no other and runs no script. It is put out piece by piece, so
//! that it can be read while the rest is written; the pieces in order are the file.

mod chart;
mod html;
mod page;
mod profile_page;
mod requests_page;
mod usage;

use serde::{Deserialize, Serialize};
use serde_json::json;
use streamer_handler::{ActionSpec, Context, Handler, HandlerError, async_trait};

use crate::{day::Day, process_data::Profile};

/// Longest period of a report, in days: each is a bar of its histogram.
const MAX_DAYS: i64 = 366;
/// So many requests are read; a report on more says that it is about the newest of them.
const MAX_REQUESTS: usize = 10_000;

/// Writes a report as a web page.
#[derive(Clone, Copy, Debug, Default)]
pub struct GenerateReport;

/// The payload of [`GenerateReport`]: either `profile`, or `from` and `to`.
#[derive(Debug, Deserialize)]
pub struct GenerateReportPayload {
    /// A result of `process_data`.
    pub profile: Option<Profile>,
    /// First day of the requests to report on (UTC), as `2026-01-01`.
    pub from: Option<String>,
    /// Last day of them, itself included.
    pub to: Option<String>,
}

/// The result of [`GenerateReport`]; the page itself is its output.
#[derive(Debug, PartialEq, Serialize)]
pub struct ReportSummary {
    /// The page's title.
    pub title: String,
    /// Bytes of the page.
    pub bytes: u64,
    /// Chunks of output that make it up.
    pub chunks: u64,
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
                let cut_off = requests.len() == MAX_REQUESTS;
                requests_page::write(context, &usage, cut_off).await
            }
        }
    }
}

/// What a report is about.
enum Subject {
    Table(Profile),
    /// Both days included.
    Requests {
        from: Day,
        to: Day,
    },
}

impl Subject {
    fn of(payload: GenerateReportPayload) -> Result<Self, HandlerError> {
        match (payload.profile, payload.from, payload.to) {
            (Some(profile), None, None) => Ok(Self::Table(profile)),
            (None, Some(from), Some(to)) => {
                let from = parse_day("payload.from", &from)?;
                let to = parse_day("payload.to", &to)?;
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
                "must have either profile, or from and to; has neither",
            )),
            (Some(_), ..) => Err(HandlerError::invalid(
                "payload",
                "must have either profile, or from and to; has both",
            )),
        }
    }
}

fn parse_day(field: &str, text: &str) -> Result<Day, HandlerError> {
    text.parse().map_err(|_| {
        HandlerError::invalid(field, "must be a day of the calendar, written as 2026-01-31")
    })
}

/// That it is one of the two is left to the handler, which can say it in clearer words.
fn payload_schema() -> String {
    let day = |description: &str| {
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
            "profile": { "type": "object", "description": "A result of process_data" },
            "from": day("First day of the requests to report on (UTC)"),
            "to": day("Last day of them, itself included"),
        },
    })
    .to_string()
}

#[cfg(test)]
mod tests;
