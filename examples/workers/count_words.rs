//! Rust worker of the action `count_words`: counts the words of a text, with progress, a checkpoint and a pause
//! between lines, so that its progress can be watched.
//!
//! ```text
//! streamer token --permissions 'worker:*' > worker.token
//! STREAMER_TOKEN_FILE=worker.token cargo run -p streamer-examples
//! streamer submit count_words --payload '{"text":"one two\nthree","pause_ms":500}'
//! ```
//!
//! `STREAMER_SERVER` is the URL of the server, and `STREAMER_TOKEN_FILE` or `STREAMER_TOKEN` the token of the
//! worker, which requires the permission `worker:count_words` or `worker:*`.

use std::{env, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::json;
use streamer_worker::{
    ActionSpec, Context, Handler, HandlerError, Handlers, TokenFile, Worker, WorkerError,
    async_trait,
};

/// Maximum pause between two lines, in milliseconds.
const MAX_PAUSE_MS: u64 = 10_000;

struct CountWords;

#[derive(Deserialize)]
struct Text {
    text: String,
    #[serde(default)]
    pause_ms: u64,
}

/// Result, and also the checkpoint after each line.
#[derive(Default, Deserialize, Serialize)]
struct Count {
    lines: usize,
    words: usize,
}

#[async_trait]
impl Handler for CountWords {
    type Input = Text;
    type Output = Count;

    fn spec(&self) -> ActionSpec {
        let schema = json!({
            "type": "object",
            "required": ["text"],
            "properties": {
                "text": { "type": "string" },
                "pause_ms": { "type": "integer", "minimum": 0, "maximum": MAX_PAUSE_MS },
            },
        });
        ActionSpec::new("count_words")
            .describe("Counts the words of a text")
            .payload_schema(schema.to_string())
    }

    async fn handle(&self, context: &Context, input: Text) -> Result<Count, HandlerError> {
        let lines: Vec<&str> = input.text.lines().collect();
        // A second attempt continues after the last line that the previous attempt counted.
        let mut count: Count = context.checkpoint()?.unwrap_or_default();
        for line in lines.iter().skip(count.lines) {
            context.sleep(Duration::from_millis(input.pause_ms)).await?;
            count.lines += 1;
            count.words += line.split_whitespace().count();
            context.save_checkpoint(&count).await?;
            let percentage = 100.0 * count.lines as f64 / lines.len() as f64;
            context.progress(percentage, format!("{} words", count.words)).await?;
        }
        Ok(count)
    }
}

#[tokio::main]
async fn main() -> Result<(), WorkerError> {
    let server = env::var("STREAMER_SERVER").unwrap_or_else(|_| "http://127.0.0.1:8080".into());
    let handlers = Handlers::new().with(CountWords);
    println!("Running count_words for {server}; press Ctrl-C to drain.");
    let worker = match env::var_os("STREAMER_TOKEN_FILE") {
        Some(path) => Worker::new(server, TokenFile(path.into()), handlers),
        None => Worker::new(server, env::var("STREAMER_TOKEN").unwrap_or_default(), handlers),
    };
    worker.slots(4).run_until_terminated().await
}
