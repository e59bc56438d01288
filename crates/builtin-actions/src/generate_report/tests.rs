//! Tests of the content of reports, and of the validity of their HTML.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use streamer_core::{ErrorCode, RequestState, Timestamp, Uid};
use streamer_handler::{RequestHistory, RequestSummary};

use super::*;
use crate::{
    PENGUINS,
    process_data::ProcessData,
    testing::{Reported, TestContext, run},
};

/// Runs the handler and assembles the page as a receiver does.
async fn report(test: TestContext, payload: &Value) -> (Value, String, Reported) {
    let (context, reports) = test.build();
    let summary = run(&GenerateReport, &context, payload).await.unwrap();
    let reported = Reported::take(&reports);
    let page: String = reported.output.iter().map(|(_, chunk)| chunk.as_str()).collect();
    assert_eq!(summary["bytes"], page.len());
    assert_eq!(summary["chunks"], reported.output.len());
    assert!(reported.output.iter().all(|(kind, _)| kind == "text/html; charset=utf-8"));
    assert!(reported.progress.is_sorted_by_key(|(percentage, ..)| *percentage));
    assert_eq!(reported.progress.last().unwrap().0, 100.0);
    assert_valid_page(&page);
    (summary, page, reported)
}

async fn report_on_csv(csv: &str, name: &str) -> (Value, String, Reported) {
    let (context, _) = Context::for_test("process_data");
    let payload = json!({ "csv": csv, "name": name });
    let profile = run(&ProcessData, &context, &payload).await.unwrap();
    report(TestContext::default(), &json!({ "profile": profile })).await
}

/// Asserts that tags are balanced, required attributes exist, and nothing is loaded or executed.
fn assert_valid_page(page: &str) {
    const VOID: [&str; 2] = ["meta", "!DOCTYPE"];
    assert!(page.starts_with("<!DOCTYPE html>\n<html lang=\"en\">"));
    let mut open = Vec::new();
    for tag in page.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').expect("tags are terminated");
        let name = tag.split_whitespace().next().unwrap();
        assert!(tag.matches('"').count().is_multiple_of(2), "{tag}");
        let unquoted: String = tag.split('"').step_by(2).collect();
        match name.strip_prefix('/') {
            Some(closed) => assert_eq!(open.pop(), Some(closed), "{tag}"),
            None if VOID.contains(&name) => {}
            None => open.push(name),
        }
        assert!(name != "script" && !unquoted.contains("src=") && !unquoted.contains(" on"));
        if name == "svg" {
            assert!(tag.contains("role=\"img\"") && tag.contains("aria-label=\""), "{tag}");
        }
        if name == "th" {
            assert!(tag.contains("scope=\"col\"") || tag.contains("scope=\"row\""), "{tag}");
        }
    }
    assert_eq!(open, Vec::<&str>::new());
    assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("url("));
    assert!(page.contains("prefers-color-scheme: dark"));
    let with_id = page.matches(" id=\"").count();
    let ids: std::collections::BTreeSet<_> =
        page.split(" id=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    assert_eq!(ids.len(), with_id, "ids are unique");
}

#[tokio::test]
async fn a_report_on_a_profile_has_a_chunk_per_column() {
    let (summary, page, reported) = report_on_csv(PENGUINS, "penguins.csv").await;
    assert_eq!(summary["title"], "Profile of penguins.csv");
    // Head, overview, eight columns, foot.
    assert_eq!(summary["chunks"], 11);
    assert_eq!(reported.progress[1].1, "section 1 of 9");
    assert!(reported.output[0].1.ends_with("<main>\n"));
    assert!(reported.output[2].1.contains("<h2 id=\"name-0\">species "));
    assert!(page.contains("<title>Profile of penguins.csv</title>"));
    assert!(page.contains("<p>344 rows in 8 columns</p>"));
    assert!(page.contains("<dt>Mean</dt><dd>4201.75</dd>"));
    assert!(page.contains("<dt>Missing</dt><dd>11 (3.2 %)</dd>"));
    assert!(page.contains("<th scope=\"row\">Adelie</th><td>152</td>"));
    assert!(page.contains("aria-label=\"Histogram of body_mass_g: 342 values from 2700 to 6300;"));
    assert_eq!(page.matches("<svg").count(), 5);
}

#[tokio::test]
async fn the_content_of_a_table_is_escaped() {
    let csv = "<script>alert(1)</script>,\"\"\" onload=\"\"x\"\n1,</td>&amp;\n2,'<img>\n";
    let (summary, page, _) = report_on_csv(csv, "</title><script>").await;
    assert_eq!(summary["title"], "Profile of </title><script>");
    assert!(!page.contains("<script") && !page.contains("<img"));
    assert!(page.contains("<title>Profile of &lt;/title&gt;&lt;script&gt;</title>"));
    assert!(page.contains("Histogram of &lt;script&gt;alert(1)&lt;/script&gt;: 2 values"));
    assert!(page.contains("&quot; onload=&quot;x"));
    assert!(page.contains("&lt;/td&gt;&amp;amp;"));
}

#[tokio::test]
async fn empty_columns_and_tables_produce_valid_pages() {
    let (_, page, _) = report_on_csv("a,b\n,1\n", "x").await;
    assert!(page.contains("There are no values."));
    assert!(page.contains("<p>1 row in 2 columns</p>"));
    report_on_csv("a", "x").await;
}

/// Returns fixed requests, and asserts the arguments.
struct FixedHistory(Vec<RequestSummary>);

#[async_trait]
impl RequestHistory for FixedHistory {
    async fn requests(
        &self,
        tenant: &str,
        user: &str,
        from: Timestamp,
        until: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestSummary>, HandlerError> {
        assert_eq!((tenant, user, limit), ("test", "test", 10_000));
        assert_eq!(from.to_string(), "2026-01-01T00:00:00.000Z");
        assert_eq!(until.to_string(), "2026-02-01T00:00:00.000Z");
        Ok(self.0.clone())
    }
}

fn request(action: &str, state: RequestState, day: &str, seconds: u64) -> RequestSummary {
    let created = day.parse::<Date>().unwrap().start();
    let finished = created.plus(Duration::from_secs(seconds));
    RequestSummary {
        uid: Uid::new(created),
        action: action.into(),
        state,
        attempts: 2,
        create_time: created,
        start_time: Some(created),
        finish_time: state.is_terminal().then_some(finished),
    }
}

async fn report_on_january(requests: Vec<RequestSummary>) -> String {
    let test =
        TestContext { history: Some(Arc::new(FixedHistory(requests))), ..Default::default() };
    let payload = json!({ "from": "2026-01-01", "to": "2026-01-31" });
    let (summary, page, _) = report(test, &payload).await;
    assert_eq!(summary["title"], "Requests from 2026-01-01 to 2026-01-31");
    assert_eq!(summary["chunks"], 5);
    page
}

#[tokio::test]
async fn a_report_on_a_period_covers_its_requests() {
    let page = report_on_january(vec![
        request("<b>", RequestState::Running, "2026-01-31", 0),
        request("echo_async", RequestState::Failed, "2026-01-02", 3),
        request("echo_async", RequestState::Succeeded, "2026-01-02", 1),
    ])
    .await;
    assert!(page.contains("<p>3 requests of test</p>"));
    assert!(page.contains("<dt>Success rate</dt><dd>50.0 %</dd>"));
    assert!(page.contains("<dt>Mean duration</dt><dd>2.0 s</dd>"));
    assert!(page.contains("<dt>95 % within</dt><dd>2.9 s</dd>"));
    assert!(page.contains("<dt>Attempts</dt><dd>6</dd>"));
    assert!(page.contains(
        "Histogram of 3 requests per day from 2026-01-01 to 2026-01-31; most, 2, on 2026-01-02"
    ));
    assert!(page.contains("<title>2026-01-31: 1</title>"));
    assert!(page.contains("<th scope=\"row\">&lt;b&gt;</th><td>1</td>"));
}

#[tokio::test]
async fn a_report_on_a_period_without_requests_says_so() {
    let page = report_on_january(Vec::new()).await;
    assert!(page.contains("no requests on any day"));
    assert!(page.contains("There are no requests in this period."));
}

#[tokio::test]
async fn a_report_on_too_many_requests_says_so() {
    let one = request("a", RequestState::Succeeded, "2026-01-02", 1);
    let page = report_on_january(vec![one; MAX_REQUESTS]).await;
    assert!(page.contains("<p>The newest 10,000 requests of test</p>"));
}

#[tokio::test]
async fn invalid_payloads_are_rejected_without_a_retry() {
    let profile = json!({ "name": "x", "rows": 0, "columns": 0, "delimiter": ",", "profile": [] });
    for (payload, message) in [
        (json!({}), "payload: must contain either profile, or from and to; contains neither"),
        (
            json!({ "profile": profile, "from": "2026-01-01" }),
            "payload: must contain either profile, or from and to; contains both",
        ),
        (json!({ "from": "2026-01-01" }), "payload.to: is required with from"),
        (json!({ "to": "2026-01-01" }), "payload.from: is required with to"),
        (
            json!({ "from": "2026-01-01", "to": "2026-02-30" }),
            "payload.to: must be a date, such as 2026-01-31",
        ),
        (
            json!({ "from": "2026-01-02", "to": "2026-01-01" }),
            "payload.to: must be 0 to 365 days after from, is -1",
        ),
        (
            json!({ "from": "2026-01-01", "to": "2027-01-02" }),
            "payload.to: must be 0 to 365 days after from, is 366",
        ),
        (json!({ "profile": {} }), "payload: missing field `name` at line 1 column 13"),
    ] {
        let (context, reports) = Context::for_test("generate_report");
        let error = run(&GenerateReport, &context, &payload).await.unwrap_err();
        let error = error.into_request_error();
        assert_eq!((error.code, error.retryable), (ErrorCode::ValidationError, false));
        assert_eq!(error.message, message);
        assert!(reports.take().is_empty());
    }
}

#[tokio::test]
async fn cancellation_stops_the_handler() {
    let profile = json!({ "name": "x", "rows": 0, "columns": 0, "delimiter": ",", "profile": [] });
    let (context, reports) = TestContext { cancelled: true, ..Default::default() }.build();
    let payload = json!({ "profile": profile });
    let error = run(&GenerateReport, &context, &payload).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Cancelled);
    assert!(reports.take().is_empty());
}
