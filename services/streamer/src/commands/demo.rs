//! `streamer demo`: starts a server, profiles a CSV file and writes a report, in one command.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Value, json};
use streamer_auth::NewToken;
use streamer_client::{Follower, ServerMessage, Target};
use streamer_config::Config;
use streamer_telemetry::Telemetry;
use tempfile::TempDir;

use crate::{
    Exit,
    progress_bar::ProgressBar,
    server::{Role, Server},
};

/// Arguments of `streamer demo`.
#[derive(Args, Clone, Debug)]
pub(crate) struct DemoArguments {
    /// CSV file with a header line [default: a built-in penguin data set].
    pub(crate) file: Option<PathBuf>,
    /// File to which the report is written.
    #[arg(long, default_value = "streamer-report.html", value_name = "FILE")]
    pub(crate) report: PathBuf,
}

pub(crate) async fn run(arguments: &DemoArguments) -> ExitCode {
    match Box::pin(run_demo(arguments)).await {
        Ok(()) => Exit::Done.code(),
        Err(error) => {
            eprintln!("error: {error:#}");
            Exit::Failed.code()
        }
    }
}

async fn run_demo(arguments: &DemoArguments) -> anyhow::Result<()> {
    let (name, csv) = read(arguments.file.as_deref())?;
    let data = TempDir::with_prefix("streamer-demo-").context("failed to create a data folder")?;
    let mut config = Config::default();
    config.server.listen = SocketAddr::from(([127, 0, 0, 1], 0));
    config.server.data_dir = data.path().to_owned();
    let server =
        Server::start(&config, streamer_builtin_actions::all(), Role::All, Telemetry::default())
            .await?;
    let url = format!("http://{}", server.address());
    let token = NewToken {
        user: "demo".into(),
        tenant: "demo".into(),
        permissions: Vec::new(),
        expires_in: Duration::from_secs(3600),
    };
    let token = server.dev_token(&token).context("failed to sign a token")?;
    println!(
        "Server running at {url}: gateway, router, processor, progress and store in one process."
    );
    println!("Profiling {name} over a WebSocket:\n");

    let payload = json!({ "csv": csv, "name": name });
    let profile = follow(&url, &token, "process_data", &payload).await?;
    print_profile(&profile.result);
    let payload = json!({ "profile": profile.result });
    let report = follow(&url, &token, "generate_report", &payload).await?;
    fs::write(&arguments.report, report.output)
        .with_context(|| format!("failed to write {}", arguments.report.display()))?;
    println!(
        "\nReport: {} ({} durable events were delivered, each exactly once)",
        arguments.report.display(),
        profile.events + report.events,
    );
    server.stop().await;
    println!(
        "\nNext steps:
  streamer demo my.csv                   the same with your own data
  streamer up                            start a server; prints a token
  streamer submit echo_async --payload '{{\"steps\":50,\"delay_ms\":100}}'
                                         live progress; stop with Ctrl-C, resume with `watch`
  streamer actions                       list the available actions"
    );
    Ok(())
}

fn read(file: Option<&Path>) -> anyhow::Result<(String, String)> {
    let Some(file) = file else {
        return Ok(("penguins.csv".into(), streamer_builtin_actions::PENGUINS.into()));
    };
    let csv =
        fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))?;
    let name = file.file_name().map(|name| name.to_string_lossy().into_owned());
    Ok((name.unwrap_or_default(), csv))
}

/// Outcome of a request.
struct Outcome {
    result: Value,
    /// Concatenated output chunks.
    output: Vec<u8>,
    events: usize,
}

async fn follow(url: &str, token: &str, action: &str, payload: &Value) -> anyhow::Result<Outcome> {
    let id = format!("demo-{action}");
    let message =
        json!({ "type": "request", "id": id, "action": action, "payload": payload }).to_string();
    let mut follower = Follower::new(url, token.to_owned(), Target::Submit { id, message });
    let mut outcome = Outcome { result: Value::Null, output: Vec::new(), events: 0 };
    let bar = ProgressBar::on_stdout();
    while let Some(received) = follower.next().await? {
        outcome.events += 1;
        apply_message(&received.message, &mut outcome, &bar)?;
    }
    bar.finish()?;
    Ok(outcome)
}

fn apply_message(
    message: &ServerMessage,
    outcome: &mut Outcome,
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    match message {
        ServerMessage::Progress(progress) => {
            bar.update(progress.percentage.unwrap_or(0.0), &progress.message)?;
        }
        ServerMessage::Output(output) => outcome.output.extend_from_slice(&output.bytes()?),
        ServerMessage::Retrying(_) => outcome.output.clear(),
        ServerMessage::Complete(complete) => {
            outcome.result = serde_json::from_str(complete.result.get())?;
        }
        ServerMessage::Error(failed) => bail!("{}: {}", failed.error.code, failed.error.message),
        _ => {}
    }
    Ok(())
}

fn print_profile(profile: &Value) {
    println!(
        "\n  {:<20} {:<8} {:>6} {:>8} {:>9}  SUMMARY",
        "COLUMN", "TYPE", "COUNT", "MISSING", "DISTINCT"
    );
    let columns = profile["profile"].as_array().map(Vec::as_slice).unwrap_or_default();
    for column in columns {
        let text = |name: &str| column[name].as_str().unwrap_or("").to_owned();
        let (name, kind) = (text("name"), text("type"));
        println!(
            "  {name:<20} {kind:<8} {:>6} {:>8} {:>9}  {}",
            column["count"].to_string(),
            column["missing"].to_string(),
            column["distinct"].to_string(),
            summary(column),
        );
    }
}

fn summary(column: &Value) -> String {
    if let Some(mean) = column["mean"].as_f64() {
        let deviation = column["standard_deviation"].as_f64().unwrap_or(0.0);
        return format!("mean {mean:.2} ± {deviation:.2}, {} to {}", column["min"], column["max"]);
    }
    let top = column["top"].as_array().map(Vec::as_slice).unwrap_or_default();
    let values: Vec<_> = top
        .iter()
        .take(3)
        .map(|value| format!("{} ({})", value["value"].as_str().unwrap_or(""), value["count"]))
        .collect();
    values.join(", ")
}
