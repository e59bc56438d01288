//! Commands `streamer submit` and `streamer watch`, which follow a request to its end.

use std::{
    env, fs,
    io::{self, Read},
    path::PathBuf,
};

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json, value::RawValue};
use streamer_client::{Follower, ReceivedMessage, ServerMessage, Target};
use streamer_core::{Clock, RequestState, SystemClock, Uid, hex};
use streamer_telemetry::TraceContext;

use crate::{
    Exit, arguments::CommonArguments, exit::UsageError, progress_bar::ProgressBar,
    terminal::print_line,
};

/// Arguments of `streamer submit`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  streamer submit echo --payload '{\"hello\":\"world\"}'
  streamer submit echo_async --payload '{\"steps\":50,\"delay_ms\":100}'
  echo '{\"steps\":3}' | streamer submit echo_async -
  streamer submit echo_async --id nightly-1 --detach

Ctrl-C stops watching and prints how to resume; the request continues.")]
pub(crate) struct SubmitArguments {
    /// Action to run; `streamer actions` lists the available ones.
    pub(crate) action: String,
    /// `-` reads the payload from standard input.
    #[arg(value_name = "-", value_parser = ["-"], conflicts_with_all = ["payload", "payload_file"])]
    pub(crate) stdin: Option<String>,
    /// Payload, as JSON.
    #[arg(long, value_name = "JSON", conflicts_with = "payload_file")]
    pub(crate) payload: Option<String>,
    /// File with the payload.
    #[arg(long, value_name = "FILE")]
    pub(crate) payload_file: Option<PathBuf>,
    /// ID of the request. Submitting the same request with the same ID again has no effect.
    #[arg(long)]
    pub(crate) id: Option<String>,
    /// Print only the outcome.
    #[arg(long, conflicts_with = "detach")]
    pub(crate) wait: bool,
    /// Print only the acknowledgment and exit without waiting for the outcome.
    #[arg(long)]
    pub(crate) detach: bool,
    /// Priority, 0 to 9; requests with a higher priority run first.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(i32).range(0..=9))]
    pub(crate) priority: i32,
    /// Minimum delay before the request starts, in milliseconds.
    #[arg(long, default_value_t = 0, value_name = "MS")]
    pub(crate) delay_ms: u64,
    /// Start a trace, or continue the trace in the environment variable TRACEPARENT, and print the trace ID
    /// to standard error. The server decides whether to record spans (trace.trust_callers).
    #[arg(long)]
    pub(crate) trace: bool,
    #[command(flatten)]
    pub(crate) common: CommonArguments,
}

/// Arguments of `streamer watch`.
#[derive(Args, Clone, Debug)]
pub(crate) struct WatchArguments {
    /// ID or UID of the request.
    pub(crate) id: String,
    /// Sequence number of the event after which to start; 0 prints all events.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(i64).range(0..))]
    pub(crate) after_seq: i64,
    #[command(flatten)]
    pub(crate) common: CommonArguments,
}

/// Output format of a followed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Screen {
    /// Every message as received, one per line.
    Json,
    /// Only the message with the outcome.
    OutcomeAsJson,
    /// A progress bar, then the result.
    Terminal,
}

pub(crate) async fn submit(arguments: SubmitArguments) -> anyhow::Result<Exit> {
    let common = &arguments.common;
    let payload = read_payload(&arguments)?;
    // With an ID, the request can be submitted again after a connection is lost.
    let id = arguments.id.clone().unwrap_or_else(|| Uid::new(SystemClock.now()).to_string());
    let mut message = json!({
        "type": "request",
        "id": id,
        "action": arguments.action,
        "priority": arguments.priority,
        "delay_ms": arguments.delay_ms,
    });
    if arguments.trace {
        let trace = trace(env::var("TRACEPARENT").ok().as_deref())?;
        eprintln!("trace {}", trace.trace_id());
        message["traceparent"] = trace.trace_parent().into();
    }
    let message = message.to_string();
    // The payload is inserted verbatim, since parsing could change its numbers.
    let message = format!("{},\"payload\":{}}}", message.trim_end_matches('}'), payload.get());
    let target = Target::Submit { id, message };
    let mut follower = Follower::new(&common.server, common.tokens(), target);
    if arguments.detach {
        return print_first(&mut follower).await;
    }
    let screen = match (common.prints_json(), arguments.wait) {
        (_, true) => Screen::OutcomeAsJson,
        (true, false) => Screen::Json,
        (false, false) => Screen::Terminal,
    };
    follow(&mut follower, screen).await
}

pub(crate) async fn watch(arguments: WatchArguments) -> anyhow::Result<Exit> {
    let common = &arguments.common;
    let target = Target::Watch { request_id: arguments.id.clone(), after_seq: arguments.after_seq };
    let mut follower = Follower::new(&common.server, common.tokens(), target);
    let screen = if common.prints_json() { Screen::Json } else { Screen::Terminal };
    follow(&mut follower, screen).await
}

/// Prints the messages of a request until it ends. Ctrl-C stops following and leaves the request running.
///
/// # Errors
/// Returns an error if the server rejects the call or cannot be reached.
pub(crate) async fn follow(follower: &mut Follower, screen: Screen) -> anyhow::Result<Exit> {
    let mut printer = Printer::new(screen);
    loop {
        let message = tokio::select! {
            message = follower.next() => message?,
            interrupted = tokio::signal::ctrl_c() => {
                interrupted.context("failed to wait for Ctrl-C")?;
                printer.bar.clear();
                let (id, seq) = (follower.request_id(), follower.last_seq());
                if follower.is_accepted() {
                    eprintln!(
                        "Interrupted; the request continues. To resume:\n  \
                         streamer watch {id} --after-seq {seq}"
                    );
                } else {
                    eprintln!("Interrupted before the server responded.");
                }
                return Ok(Exit::Interrupted);
            }
        };
        let Some(received) = message else { return Ok(Exit::Done) };
        printer.print(&received)?;
        if let Some(exit) = exit_of(&received.message, follower.has_ended()) {
            return Ok(exit);
        }
    }
}

async fn print_first(follower: &mut Follower) -> anyhow::Result<Exit> {
    match follower.next().await? {
        Some(received) => {
            print_line(&received.text)?;
            Ok(exit_of(&received.message, follower.has_ended()).unwrap_or(Exit::Done))
        }
        None => Ok(Exit::Done),
    }
}

/// Returns the exit code if the message contains an outcome. `is_last` states that no message follows.
fn exit_of(message: &ServerMessage, is_last: bool) -> Option<Exit> {
    match message {
        ServerMessage::Response(_) | ServerMessage::Complete(_) => Some(Exit::Done),
        ServerMessage::Cancelled(_) => Some(Exit::Cancelled),
        ServerMessage::Error(failed) => {
            Some(Exit::from_error_code(Some(failed.error.error_code())))
        }
        // The watch started after the request's terminal event.
        ServerMessage::Subscribed(snapshot) if is_last => match snapshot.state? {
            RequestState::Succeeded => Some(Exit::Done),
            RequestState::Cancelled => Some(Exit::Cancelled),
            RequestState::Failed => Some(Exit::Failed),
            RequestState::Queued | RequestState::Running => None,
        },
        _ => None,
    }
}

/// Continues the trace of `parent`, or starts a new one.
fn trace(parent: Option<&str>) -> anyhow::Result<TraceContext> {
    let new = || {
        let [trace, span] = [(); 2].map(|()| Uid::new(SystemClock.now()).to_bytes());
        // The second half of an ID is random; the first half consists mostly of the time.
        format!("00-{}-{}-01", hex(&trace), hex(&span[8..]))
    };
    let text = parent.map_or_else(new, str::to_owned);
    TraceContext::parse(&text, None).ok_or_else(|| {
        let rule = "TRACEPARENT must be a W3C traceparent, like 00-<32 digits>-<16 digits>-01";
        UsageError(format!("{rule}, is {text:?}")).into()
    })
}

fn read_payload(arguments: &SubmitArguments) -> anyhow::Result<Box<RawValue>> {
    let text = if arguments.stdin.is_some() {
        let mut text = String::new();
        io::stdin()
            .read_to_string(&mut text)
            .context("failed to read the payload from standard input")?;
        text
    } else if let Some(file) = &arguments.payload_file {
        fs::read_to_string(file)
            .map_err(|error| UsageError(format!("failed to read {}: {error}", file.display())))?
    } else {
        arguments.payload.clone().unwrap_or_else(|| "{}".to_owned())
    };
    let parsed = serde_json::from_str(text.trim());
    parsed.map_err(|error| UsageError(format!("the payload is not JSON: {error}")).into())
}

/// Prints the messages of a followed request.
struct Printer {
    screen: Screen,
    bar: ProgressBar,
}

impl Printer {
    fn new(screen: Screen) -> Self {
        let is_terminal = screen == Screen::Terminal;
        let bar = if is_terminal { ProgressBar::on_stderr() } else { ProgressBar::hidden() };
        Self { screen, bar }
    }

    fn print(&mut self, received: &ReceivedMessage) -> anyhow::Result<()> {
        match self.screen {
            Screen::Json => print_line(&received.text),
            Screen::OutcomeAsJson if exit_of(&received.message, false).is_some() => {
                print_line(&received.text)
            }
            Screen::OutcomeAsJson => Ok(()),
            Screen::Terminal => self.draw(&received.message),
        }
    }

    fn draw(&mut self, message: &ServerMessage) -> anyhow::Result<()> {
        match message {
            ServerMessage::Acknowledgment(acknowledgment) => {
                let (id, uid) = (&acknowledgment.request_id, &acknowledgment.uid);
                self.bar.print_above(&format!("accepted as {id} ({uid})"));
                self.bar.start();
            }
            ServerMessage::Progress(progress) => {
                self.bar.update(progress.percentage.unwrap_or(0.0), &progress.message)?;
            }
            ServerMessage::Retrying(retrying) => self.bar.print_above(&format!(
                "attempt {} failed: {}; retrying at {}",
                retrying.event.attempt, retrying.error.message, retrying.retry_at,
            )),
            ServerMessage::Response(response) => self.finish(&pretty(&response.data)?)?,
            ServerMessage::Complete(complete) => self.finish(&pretty(&complete.result)?)?,
            ServerMessage::Cancelled(cancelled) => {
                self.finish(&format!("cancelled: {}", cancelled.reason))?;
            }
            ServerMessage::Error(failed) => {
                self.finish(&format!("{}: {}", failed.error.code, failed.error.message))?;
            }
            _ => {}
        }
        Ok(())
    }

    fn finish(&self, outcome: &str) -> anyhow::Result<()> {
        self.bar.clear();
        print_line(outcome)
    }
}

fn pretty(json: &RawValue) -> anyhow::Result<String> {
    let value: Value = serde_json::from_str(json.get())?;
    Ok(serde_json::to_string_pretty(&value)?)
}
