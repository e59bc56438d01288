//! Report on a user's own requests in a period: totals, days, actions.

use streamer_core::RequestState;
use streamer_handler::{Context, HandlerError};

use crate::generate_report::{
    chart::{Bar, histogram},
    html::{self, count, count_of, duration, escape, facts, number, row, share, share_bar},
    page::Page,
    summary::ReportSummary,
    usage::{Totals, Usage},
};

/// Maximum number of requests in a report; if more requests exist, the report covers the newest ones and
/// states this.
pub(super) const MAX_REQUESTS: usize = 10_000;
const SECTIONS: u64 = 3;

/// Writes the page. `is_truncated` states whether more requests may exist than were read.
pub(super) async fn write(
    context: &Context,
    usage: &Usage,
    is_truncated: bool,
) -> Result<ReportSummary, HandlerError> {
    let title = format!("Requests from {} to {}", usage.from, usage.to);
    let lead = if is_truncated {
        format!("The newest {} requests of {}", count(MAX_REQUESTS as u64), context.user())
    } else {
        format!("{} of {}", count_of(usage.total.requests(), "request"), context.user())
    };
    let mut page = Page::begin(context, title, &lead, SECTIONS).await?;
    page.section(totals_section(&usage.total)).await?;
    page.section(days_section(usage)).await?;
    page.section(actions_section(usage)).await?;
    page.end().await
}

fn totals_section(total: &Totals) -> String {
    let mut rows = vec![
        ("Requests", count(total.requests())),
        ("Success rate", success_rate(total)),
        ("Mean duration", optional_duration(total.mean_duration())),
        ("95 % within", optional_duration(total.p95_duration())),
        ("Attempts", count(total.attempts)),
    ];
    for &state in RequestState::ALL {
        rows.push((state_name(state), count(total.in_state(state))));
    }
    format!(
        "<section aria-labelledby=\"totals\">\n<h2 id=\"totals\">Totals</h2>\n{}\
         <p class=\"note\">The success rate covers requests that succeeded or failed. Durations \
         cover finished requests, from acceptance to the end. Days are in UTC.</p>\n\
         </section>\n",
        facts(&rows),
    )
}

fn days_section(usage: &Usage) -> String {
    let bars: Vec<Bar> =
        usage.per_day.iter().map(|&(day, count)| Bar { label: day.to_string(), count }).collect();
    let (from, to) = (usage.from.to_string(), usage.to.to_string());
    let total = count_of(usage.total.requests(), "request");
    // Selects the earliest of several equally busy days.
    let busiest = bars.iter().rev().max_by_key(|bar| bar.count).filter(|bar| bar.count > 0);
    let most = busiest.map_or("no requests on any day".into(), |bar| {
        format!("most, {}, on {}", count(bar.count), bar.label)
    });
    let description = format!("Histogram of {total} per day from {from} to {to}; {most}");
    let chart = histogram(&format!("Requests per day; {most}"), &description, (&from, &to), &bars);
    let rows: String = bars
        .iter()
        .filter(|bar| bar.count > 0)
        .map(|bar| row(&bar.label, &[count(bar.count)]))
        .collect();
    let table = html::table("Days with requests", &["Day", "Requests"], &rows);
    format!(
        "<section aria-labelledby=\"days\">\n<h2 id=\"days\">By day</h2>\n{chart}\
         <details>\n<summary>As a table</summary>\n{table}</details>\n</section>\n"
    )
}

fn actions_section(usage: &Usage) -> String {
    let body = if usage.by_action.is_empty() {
        "<p>There are no requests in this period.</p>\n".into()
    } else {
        let rows: String =
            usage.by_action.iter().map(|(action, totals)| action_row(action, totals)).collect();
        let mut heads = vec!["Action", "Requests"];
        heads.extend(RequestState::ALL.iter().copied().map(state_name));
        heads.extend(["Success rate", "Mean duration", "95 % within", "Attempts per request"]);
        html::table("All actions", &heads, &rows)
    };
    format!(
        "<section aria-labelledby=\"actions\">\n<h2 id=\"actions\">By action</h2>\n{body}</section>\n"
    )
}

fn action_row(action: &str, totals: &Totals) -> String {
    let mut cells = vec![count(totals.requests())];
    cells.extend(RequestState::ALL.iter().map(|state| count(totals.in_state(*state))));
    let attempts = totals.attempts as f64 / totals.requests().max(1) as f64;
    cells.extend([
        match totals.succeeded_or_failed() {
            0 => success_rate(totals),
            decided => share_bar(totals.in_state(RequestState::Succeeded), decided),
        },
        optional_duration(totals.mean_duration()),
        optional_duration(totals.p95_duration()),
        number((attempts * 100.0).round() / 100.0),
    ]);
    row(&escape(action), &cells)
}

fn success_rate(totals: &Totals) -> String {
    share(totals.in_state(RequestState::Succeeded), totals.succeeded_or_failed())
}

fn optional_duration(millis: Option<f64>) -> String {
    millis.map_or("–".into(), duration)
}

const fn state_name(state: RequestState) -> &'static str {
    match state {
        RequestState::Queued => "Queued",
        RequestState::Running => "Running",
        RequestState::Succeeded => "Succeeded",
        RequestState::Failed => "Failed",
        RequestState::Cancelled => "Cancelled",
    }
}
