//! Tests of the profile of a table, and of its progress and output.

use serde_json::{Value, json};
use streamer_core::ErrorCode;

use super::*;
use crate::{
    PENGUINS,
    testing::{Reported, TestContext, run},
};

async fn profile_of(csv: &str) -> Value {
    let (context, _) = Context::for_test("process_data");
    run(&ProcessData, &context, &json!({ "csv": csv })).await.unwrap()
}

fn column<'a>(profile: &'a Value, name: &str) -> &'a Value {
    let columns = profile["profile"].as_array().unwrap();
    columns.iter().find(|column| column["name"] == name).unwrap()
}

fn assert_close(value: &Value, expected: f64) {
    let value = value.as_f64().unwrap();
    assert!((value - expected).abs() < 1e-6, "{value} is not {expected}");
}

#[tokio::test]
async fn the_profile_matches_the_published_statistics() {
    let profile = profile_of(PENGUINS).await;
    assert_eq!(profile["rows"], 344);
    assert_eq!(profile["columns"], 8);
    assert_eq!(profile["delimiter"], ",");
    assert_eq!(profile["name"], "table");

    let mass = column(&profile, "body_mass_g");
    assert_eq!(mass["type"], "integer");
    assert_eq!((&mass["count"], &mass["missing"]), (&json!(342), &json!(2)));
    assert_eq!((&mass["min"], &mass["max"]), (&json!(2700.0), &json!(6300.0)));
    assert_close(&mass["mean"], 4_201.754_386);
    assert_close(&mass["standard_deviation"], 801.954_536);
    assert_eq!(
        (&mass["p25"], &mass["p50"], &mass["p75"]),
        (&json!(3550.0), &json!(4050.0), &json!(4750.0))
    );
    let bins: Vec<u64> = serde_json::from_value(mass["histogram"]["counts"].clone()).unwrap();
    assert_eq!((bins.len(), bins.iter().sum::<u64>()), (20, 342));

    let bill = column(&profile, "bill_length_mm");
    assert_eq!(bill["type"], "number");
    assert_close(&bill["mean"], 43.921_930);
    assert_close(&bill["p25"], 39.225);

    let species = column(&profile, "species");
    assert_eq!((&species["type"], &species["distinct"]), (&json!("text"), &json!(3)));
    assert_eq!(
        species["top"],
        json!([
            { "value": "Adelie", "count": 152 },
            { "value": "Gentoo", "count": 124 },
            { "value": "Chinstrap", "count": 68 },
        ])
    );
    assert!(species.get("mean").is_none() && species.get("histogram").is_none());
    assert_eq!(column(&profile, "sex")["missing"], 11);
}

#[tokio::test]
async fn progress_is_monotonic_and_each_column_is_an_output_chunk() {
    let (context, reports) = Context::for_test("process_data");
    let payload = json!({ "csv": PENGUINS, "name": "penguins.csv" });
    let result = run(&ProcessData, &context, &payload).await.unwrap();
    assert_eq!(result["name"], "penguins.csv");

    let reported = Reported::take(&reports);
    assert!(reported.progress.is_sorted_by_key(|(percentage, ..)| *percentage));
    // Every 6th of 344 rows, the last, and 8 columns.
    assert_eq!(reported.progress.len(), 57 + 1 + 8);
    let (percentage, message, metadata) = &reported.progress[57];
    assert_eq!((*percentage, message.as_str()), (90.0, "row 344 of 344"));
    assert_eq!(metadata, &Some(json!({ "rows": 344 })));
    let (percentage, message, _) = reported.progress.last().unwrap();
    assert_eq!((*percentage, message.as_str()), (100.0, "column 8 of 8: year"));

    let chunks: Vec<Value> =
        reported.output.iter().map(|(_, json)| serde_json::from_str(json).unwrap()).collect();
    assert_eq!(Value::Array(chunks), result["profile"]);
}

#[tokio::test]
async fn the_columns_of_a_table_without_rows_are_empty() {
    let profile = profile_of("a;b").await;
    assert_eq!((&profile["rows"], &profile["delimiter"]), (&json!(0), &json!(";")));
    assert_eq!(column(&profile, "b")["type"], "empty");
    assert_eq!(column(&profile, "b")["distinct_is_lower_bound"], false);
}

#[tokio::test]
async fn profiles_round_trip() {
    let json = profile_of("a,b,c\n1,x,\n2.5,y,\n").await;
    let profile: Profile = serde_json::from_value(json.clone()).unwrap();
    assert_eq!(profile.profile[0].numbers.as_ref().unwrap().mean, 1.75);
    assert_eq!(profile.profile[1].numbers, None);
    assert_eq!(serde_json::to_value(profile).unwrap(), json);
}

#[tokio::test]
async fn invalid_payloads_are_rejected_before_anything_is_reported() {
    let malformed = "a,b,c,d,e,f,g,h\n".to_owned() + &"1,2,3,4,5,6,7,8\n".repeat(6) + "1,2,3\n";
    for (payload, message) in [
        (json!({ "csv": malformed }), "payload.csv: row 7 (line 8) has 3 fields, the header has 8"),
        (
            json!({ "csv": "" }),
            "payload.csv: has no header: the first line must contain the column names",
        ),
        (
            json!({ "csv": "a", "delimiter": "ab" }),
            "payload.delimiter: must be one ASCII character other than a quotation mark or a line break",
        ),
        (
            json!({ "csv": "a", "name": "x".repeat(257) }),
            "payload.name: must be at most 256 characters",
        ),
        (json!({ "name": "x" }), "payload: missing field `csv` at line 1 column 12"),
    ] {
        let (context, reports) = Context::for_test("process_data");
        let error = run(&ProcessData, &context, &payload).await.unwrap_err().into_request_error();
        assert_eq!(error.code, ErrorCode::ValidationError);
        assert!(!error.retryable);
        assert_eq!(error.message, message);
        assert!(reports.take().is_empty());
    }
}

#[tokio::test]
async fn cancellation_stops_the_handler() {
    let (context, reports) = TestContext { cancelled: true, ..Default::default() }.build();
    let error = run(&ProcessData, &context, &json!({ "csv": PENGUINS })).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Cancelled);
    assert!(reports.take().is_empty());
}

#[tokio::test]
async fn other_tasks_run_while_a_large_table_is_read() {
    let csv = "a\n".to_owned() + &"1\n".repeat(10_000);
    let (context, _) = Context::for_test("process_data");
    let payload = json!({ "csv": csv });
    let mut yields = 0;
    tokio::select! {
        biased;
        result = run(&ProcessData, &context, &payload) => assert_eq!(result.unwrap()["rows"], 10_000),
        () = async { loop { yields += 1; tokio::task::yield_now().await; } } => {}
    }
    assert!(yields >= 2 * (10_000 / 256), "{yields}");
}
