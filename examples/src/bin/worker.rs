//! Example worker: runs two of the handlers, unchanged, in a separate process.
//!
//! Start the server with `--set execution.builtin_actions=echo,health,echo_async`, so that it does not
//! run these two actions itself. Then start this worker with `STREAMER_SERVER`, and with
//! `STREAMER_TOKEN_FILE` or `STREAMER_TOKEN` (permission `worker:*`).

use std::env;

use streamer_examples::{GenerateReport, ProcessData};
use streamer_worker::{Handlers, TokenFile, Worker, WorkerError};

#[tokio::main]
async fn main() -> Result<(), WorkerError> {
    let server = env::var("STREAMER_SERVER").unwrap_or_else(|_| "http://127.0.0.1:8080".into());
    let handlers = Handlers::new().with(ProcessData).with(GenerateReport);
    println!("Running process_data and generate_report for {server}; press Ctrl-C to drain.");
    let worker = match env::var_os("STREAMER_TOKEN_FILE") {
        Some(path) => Worker::new(server, TokenFile(path.into()), handlers),
        None => Worker::new(server, env::var("STREAMER_TOKEN").unwrap_or_default(), handlers),
    };
    worker.slots(4).run_until_terminated().await
}
