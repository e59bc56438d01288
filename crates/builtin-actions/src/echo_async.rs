//! `echo_async`: runs a number of steps, and then returns the result in its payload. The handler demonstrates
//! every feature of an async handler. Tests and load generators set the amount of each in the payload.

use std::{ops::RangeInclusive, time::Duration};

use serde::Deserialize;
use serde_json::{json, value::RawValue};
use streamer_handler::{ActionSpec, Context, Handler, HandlerError, RetryPolicy, async_trait};

const STEPS: RangeInclusive<u64> = 0..=1_000_000;
const DELAY_MS: RangeInclusive<u64> = 0..=3_600_000;
const OUTPUT_CHUNKS: RangeInclusive<u64> = 0..=1_000_000;
const CHUNK_BYTES: RangeInclusive<u64> = 1..=1_000_000;
const FAIL_ATTEMPTS: RangeInclusive<u64> = 0..=100;

/// Number of reports after which the handler yields to other tasks.
const REPORTS_PER_YIELD: u64 = 64;

/// Size of a chunk, in bytes, above which the handler yields after each chunk.
const LARGE_CHUNK_BYTES: u64 = 64 * 1024;

/// Runs the number of steps, and fails the number of attempts, that the payload specifies.
#[derive(Clone, Copy, Debug, Default)]
pub struct EchoAsync;

/// Payload of [`EchoAsync`]. Every field has a default; unknown fields are ignored.
#[derive(Debug, Deserialize)]
#[serde(default)]
pub struct EchoAsyncPayload {
    /// Number of progress events, 0 to 1,000,000.
    pub steps: u64,
    /// Delay before each step in milliseconds, up to an hour.
    pub delay_ms: u64,
    /// Number of output chunks, 0 to 1,000,000, distributed evenly over the steps.
    pub output_chunks: u64,
    /// Size of each chunk in characters, 1 to 1,000,000.
    pub chunk_bytes: u64,
    /// Number of first attempts that fail halfway, 0 to 100.
    pub fail_attempts: u64,
    /// Result, returned unchanged.
    pub result: Option<Box<RawValue>>,
}

impl Default for EchoAsyncPayload {
    fn default() -> Self {
        Self {
            steps: 10,
            delay_ms: 0,
            output_chunks: 0,
            chunk_bytes: 64,
            fail_attempts: 0,
            result: None,
        }
    }
}

#[async_trait]
impl Handler for EchoAsync {
    type Input = EchoAsyncPayload;
    type Output = Option<Box<RawValue>>;

    fn spec(&self) -> ActionSpec {
        ActionSpec {
            estimated_duration: Duration::from_secs(60),
            // Many retries with a short backoff make tests of retries fast.
            retry: RetryPolicy {
                max_attempts: 10,
                initial_backoff: Duration::from_millis(100),
                ..RetryPolicy::default()
            },
            ..ActionSpec::new("echo_async")
                .describe(
                    "Reports the progress and output that the payload specifies, then returns its result",
                )
                .payload_schema(payload_schema())
        }
    }

    async fn handle(
        &self,
        context: &Context,
        payload: EchoAsyncPayload,
    ) -> Result<Option<Box<RawValue>>, HandlerError> {
        payload.check()?;
        if u64::from(context.attempt()) <= payload.fail_attempts {
            work(context, &payload, payload.steps / 2, payload.output_chunks / 2).await?;
            let attempt = context.attempt();
            return Err(HandlerError::retryable(format!("attempt {attempt} fails as requested")));
        }
        work(context, &payload, payload.steps, payload.output_chunks).await?;
        Ok(payload.result)
    }
}

impl EchoAsyncPayload {
    /// Checks the ranges. The server validates the schema, but a handler does not rely on its caller.
    fn check(&self) -> Result<(), HandlerError> {
        in_range("payload.steps", self.steps, &STEPS)?;
        in_range("payload.delay_ms", self.delay_ms, &DELAY_MS)?;
        in_range("payload.output_chunks", self.output_chunks, &OUTPUT_CHUNKS)?;
        in_range("payload.chunk_bytes", self.chunk_bytes, &CHUNK_BYTES)?;
        in_range("payload.fail_attempts", self.fail_attempts, &FAIL_ATTEMPTS)
    }
}

fn in_range(field: &str, value: u64, range: &RangeInclusive<u64>) -> Result<(), HandlerError> {
    if range.contains(&value) {
        return Ok(());
    }
    let (low, high) = (range.start(), range.end());
    Err(HandlerError::invalid(field, format!("must be {low} to {high}, is {value}")))
}

fn payload_schema() -> String {
    let integer = |range: RangeInclusive<u64>, default: u64, description: &str| {
        json!({
            "type": "integer",
            "minimum": range.start(),
            "maximum": range.end(),
            "default": default,
            "description": description,
        })
    };
    let default = EchoAsyncPayload::default();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "steps": integer(STEPS, default.steps, "Number of progress events"),
            "delay_ms": integer(DELAY_MS, default.delay_ms, "Delay before each step in milliseconds"),
            "output_chunks": integer(OUTPUT_CHUNKS, default.output_chunks, "Number of output chunks"),
            "chunk_bytes": integer(CHUNK_BYTES, default.chunk_bytes, "Size of each chunk in characters"),
            "fail_attempts":
                integer(FAIL_ATTEMPTS, default.fail_attempts, "Number of first attempts that fail halfway"),
            "result": { "description": "Result, returned unchanged" },
        },
    })
    .to_string()
}

/// Runs the first `steps` steps and emits the first `chunks` chunks, distributed over the steps.
async fn work(
    context: &Context,
    payload: &EchoAsyncPayload,
    steps: u64,
    chunks: u64,
) -> Result<(), HandlerError> {
    let mut emitted = 0;
    for step in 1..=steps {
        if payload.delay_ms > 0 {
            context.sleep(Duration::from_millis(payload.delay_ms)).await?;
        }
        yield_periodically(context, step).await?;
        let percentage = 100.0 * step as f64 / payload.steps as f64;
        context.progress(percentage, format!("step {step} of {}", payload.steps)).await?;
        let due = chunks * step / steps;
        emit_chunks(context, emitted..due, payload.chunk_bytes).await?;
        emitted = due;
    }
    // If there are no steps, no chunk has been emitted yet.
    emit_chunks(context, emitted..chunks, payload.chunk_bytes).await
}

async fn emit_chunks(
    context: &Context,
    indexes: std::ops::Range<u64>,
    chunk_bytes: u64,
) -> Result<(), HandlerError> {
    for index in indexes {
        yield_periodically(context, index).await?;
        context.output(&chunk(index, chunk_bytes)).await?;
        if chunk_bytes > LARGE_CHUNK_BYTES {
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}

/// Checks for cancellation, and periodically yields to other tasks: a report waits only if many reports are
/// pending, so a loop that only sends reports may never yield its thread.
async fn yield_periodically(context: &Context, count: u64) -> Result<(), HandlerError> {
    if context.is_cancelled() {
        return Err(HandlerError::cancelled());
    }
    if count.is_multiple_of(REPORTS_PER_YIELD) {
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// Returns `bytes` ASCII characters that start with the index. The text is the same for every attempt, so that
/// a receiver can detect missing, duplicate and corrupt chunks.
fn chunk(index: u64, bytes: u64) -> String {
    let filler = ('a'..='z').cycle().skip((index % 26) as usize);
    format!("{index}:").chars().chain(filler).take(bytes as usize).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use streamer_core::ErrorCode;
    use streamer_handler::DynHandler;

    use super::*;
    use crate::testing::{Reported, TestContext, run};

    #[tokio::test]
    async fn the_default_is_ten_steps() {
        let (context, reports) = Context::for_test("echo_async");
        let result = run(&EchoAsync, &context, &json!({ "unknown": 1 })).await.unwrap();
        assert_eq!(result, Value::Null);
        let reported = Reported::take(&reports);
        let percentages: Vec<_> = reported.progress.iter().map(|(done, ..)| *done).collect();
        assert_eq!(percentages, [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0]);
        assert_eq!(reported.progress[2].1, "step 3 of 10");
        assert!(reported.output.is_empty());
    }

    #[tokio::test]
    async fn the_result_is_returned_unchanged() {
        let (context, _) = Context::for_test("echo_async");
        let payload = r#"{"steps":1,"result": {"big":9223372036854775807,  "x":1.00} }"#;
        let result = EchoAsync.run(&context, payload.into()).await.unwrap();
        assert_eq!(result, r#"{"big":9223372036854775807,  "x":1.00}"#);
    }

    #[tokio::test]
    async fn chunks_are_distributed_over_the_steps_and_start_with_their_index() {
        let (context, reports) = Context::for_test("echo_async");
        let payload = json!({ "steps": 4, "output_chunks": 6, "chunk_bytes": 5 });
        run(&EchoAsync, &context, &payload).await.unwrap();
        let kinds: String = reports
            .take()
            .iter()
            .map(|report| match report {
                streamer_handler::Report::Output { .. } => 'o',
                _ => 'p',
            })
            .collect();
        assert_eq!(kinds, "popoopopoo");
        assert_eq!(chunk(0, 5), "0:abc");
        assert_eq!(chunk(27, 5), "27:bc");
        assert_eq!(chunk(1234, 2), "12");
    }

    #[tokio::test]
    async fn chunks_are_emitted_even_without_steps() {
        let (context, reports) = Context::for_test("echo_async");
        let payload = json!({ "steps": 0, "output_chunks": 100, "chunk_bytes": 64 });
        run(&EchoAsync, &context, &payload).await.unwrap();
        let reported = Reported::take(&reports);
        assert!(reported.progress.is_empty());
        assert_eq!(reported.output.len(), 100);
        for (index, (content_type, data)) in reported.output.iter().enumerate() {
            assert_eq!(content_type, "application/json");
            let text: String = serde_json::from_str(data).unwrap();
            assert!(text.starts_with(&format!("{index}:")), "{text}");
            assert_eq!(text.len(), 64);
        }
    }

    #[tokio::test]
    async fn first_attempts_fail_halfway_and_a_later_one_succeeds() {
        let payload = json!({ "steps": 8, "output_chunks": 4, "fail_attempts": 2, "result": 7 });
        for attempt in [1, 2] {
            let (context, reports) =
                TestContext { attempt: attempt.into(), ..Default::default() }.build();
            let error = run(&EchoAsync, &context, &payload).await.unwrap_err();
            let error = error.into_request_error();
            assert!(error.retryable);
            assert_eq!(error.message, format!("attempt {attempt} fails as requested"));
            let reported = Reported::take(&reports);
            assert_eq!((reported.progress.len(), reported.output.len()), (4, 2));
            assert_eq!(reported.progress[3].0, 50.0);
        }
        let (context, reports) = TestContext { attempt: 3.into(), ..Default::default() }.build();
        assert_eq!(run(&EchoAsync, &context, &payload).await.unwrap(), 7);
        let reported = Reported::take(&reports);
        assert_eq!((reported.progress.len(), reported.output.len()), (8, 4));
    }

    #[tokio::test]
    async fn values_out_of_range_are_rejected() {
        for (field, value) in [
            ("steps", 1_000_001),
            ("delay_ms", 3_600_001),
            ("output_chunks", 1_000_001),
            ("chunk_bytes", 0),
            ("chunk_bytes", 1_000_001),
            ("fail_attempts", 101),
            ("steps", -1),
        ] {
            let (context, reports) = Context::for_test("echo_async");
            let error = run(&EchoAsync, &context, &json!({ field: value })).await.unwrap_err();
            assert_eq!(error.code(), ErrorCode::ValidationError, "{field}");
            assert!(value < 0 || error.to_string().contains(field), "{error}");
            assert!(!error.into_request_error().retryable);
            assert!(reports.take().is_empty());
        }
    }

    #[tokio::test]
    async fn cancellation_stops_the_handler_with_and_without_delay() {
        for delay_ms in [0, 3_600_000] {
            let (context, reports) = TestContext { cancelled: true, ..Default::default() }.build();
            let payload = json!({ "delay_ms": delay_ms });
            let error = run(&EchoAsync, &context, &payload).await.unwrap_err();
            assert_eq!(error.code(), ErrorCode::Cancelled);
            assert!(reports.take().is_empty());
        }
    }

    #[test]
    fn the_schema_contains_the_ranges() {
        let schema: Value = serde_json::from_str(&payload_schema()).unwrap();
        let steps = &schema["properties"]["steps"];
        assert_eq!((&steps["minimum"], &steps["maximum"]), (&json!(0), &json!(1_000_000)));
        assert_eq!(schema["properties"]["chunk_bytes"]["minimum"], 1);
    }
}
