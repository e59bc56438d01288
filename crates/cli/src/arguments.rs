//! Command-line arguments.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::bench::BenchArguments;

/// Run requests that outlive connections: submit them, watch live progress, get exactly one outcome
/// despite failures.
#[derive(Debug, Parser)]
#[command(name = "streamer", version, max_term_width = 100, propagate_version = true)]
#[command(after_help = "Examples:
  streamer demo                                  show all features in one minute
  streamer up                                    start a server on 127.0.0.1:8080
  streamer submit echo --payload '{\"n\":1}'       run a sync action, which returns directly
  streamer submit process_data --payload-file p.json
  streamer watch 01JD… --after-seq 17            resume watching a request

Exit codes: 0 success, 1 request failed, 2 invalid usage, 3 server unreachable, 4 permission denied,
5 request cancelled, 130 interrupted by Ctrl-C (the request continues).")]
pub struct Cli {
    /// The command to run.
    #[command(subcommand)]
    pub command: Command,
}

/// Commands of the `streamer` binary.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a server with all services in one process, on one port.
    Up(ServerArguments),
    /// Start only a gateway, which serves WebSocket connections and forwards public gRPC calls.
    ///
    /// Requires store.engine=dynamodb, peers.router and peers.progress; peers.processor for workers that
    /// connect to this gateway, peers.gateway to reach connections of other gateways, and
    /// peers.shared_secret_file to listen on an address other than loopback.
    Gateway(ServerArguments),
    /// Start only a router, which admits requests and announces them to processors.
    ///
    /// Requires store.engine=dynamodb, peers.processor and peers.progress, and peers.shared_secret_file to
    /// listen on an address other than loopback.
    Router(ServerArguments),
    /// Start only a processor, which runs requests or assigns them to workers.
    ///
    /// Requires store.engine=dynamodb and peers.progress, and peers.shared_secret_file to listen on an address
    /// other than loopback.
    Processor(ServerArguments),
    /// Start only a progress service, which stores and streams event logs.
    ///
    /// Requires store.engine=dynamodb and peers.progress (the URLs of all progress services, including this
    /// one), and peers.shared_secret_file to listen on an address other than loopback.
    Progress(ServerArguments),
    /// Create, check or print the tables of engine dynamodb.
    Tables(TablesArguments),
    /// Check whether a server is ready; exit with code 0 if it is.
    Health(HealthArguments),
    /// Run a demo: start a server, profile a CSV file over a WebSocket, write a report.
    Demo(DemoArguments),
    /// Submit a request and follow it to its end.
    Submit(SubmitArguments),
    /// Follow an existing request to its end.
    Watch(WatchArguments),
    /// Show a request with its payload and result.
    Get(GetArguments),
    /// List requests, newest first.
    List(ListArguments),
    /// Cancel a request.
    Cancel(CancelArguments),
    /// Run a failed or cancelled request again, as a new request.
    Redrive(RedriveArguments),
    /// Run the built-in handlers in this process, as a worker of a server.
    Worker(WorkerArguments),
    /// List the available actions.
    Actions(CommonArguments),
    /// List, message and close live WebSocket connections.
    Connections(ConnectionsArguments),
    /// Print a token that is signed with the development key.
    Token(TokenArguments),
    /// Measure a server under load.
    Bench(BenchArguments),
    /// Print the effective configuration.
    Config(ConfigArguments),
    /// Print shell completions.
    Completions {
        /// Shell to print completions for.
        shell: Shell,
    },
}

/// Arguments for the server and the credentials.
#[derive(Args, Clone, Debug)]
pub struct CommonArguments {
    /// URL of the server.
    #[arg(
        long,
        env = "STREAMER_SERVER",
        default_value = "http://127.0.0.1:8080",
        value_name = "URL"
    )]
    pub server: String,
    /// Token of the caller. By default, a token for a server on this machine is signed with the
    /// development key in the data folder.
    #[arg(long, env = "STREAMER_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub token: Option<String>,
    /// File that contains the token; read for each connection and when the token expires.
    #[arg(long, env = "STREAMER_TOKEN_FILE", value_name = "FILE", conflicts_with = "token")]
    pub token_file: Option<PathBuf>,
    /// Data folder of the server, which contains the development key.
    #[arg(long, env = "STREAMER_DATA", default_value = "./streamer-data", value_name = "DIR")]
    pub data: PathBuf,
    /// Print one JSON object per line, even on a terminal.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `streamer up` and of the commands that start a single service.
#[derive(Args, Clone, Debug)]
#[command(after_help = "--set accepts every configuration option:
  streamer up --set gateway.max_connections=100 --set log.filter=info
`streamer config --default` lists all options with their descriptions.")]
pub struct ServerArguments {
    /// Address and port; port 0 selects a free port [default: 127.0.0.1:8080].
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// Folder for the store and the development key [default: ./streamer-data].
    #[arg(long, env = "STREAMER_DATA", value_name = "DIR")]
    pub data: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub config: ConfigSources,
}

/// Sources of the configuration.
#[derive(Args, Clone, Debug, Default)]
pub struct ConfigSources {
    /// Configuration file [default: streamer.toml, if it exists].
    #[arg(long, env = "STREAMER_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Set a configuration option; may be repeated.
    #[arg(long = "set", value_name = "SECTION.OPTION=VALUE")]
    pub set: Vec<String>,
}

/// Arguments of `streamer tables`.
#[derive(Args, Clone, Debug)]
pub struct TablesArguments {
    /// The command to run.
    #[command(subcommand)]
    pub command: TablesCommand,
}

/// Commands for tables.
#[derive(Clone, Debug, Subcommand)]
pub enum TablesCommand {
    /// Create missing tables and compare existing ones, which are never changed.
    Create(ConfigSources),
    /// Compare the tables with their required definitions.
    Check(ConfigSources),
    /// Print the tables as a CloudFormation template.
    Cloudformation(ConfigSources),
}

/// Arguments of `streamer health`.
#[derive(Args, Clone, Debug)]
pub struct HealthArguments {
    /// URL of the server.
    #[arg(
        long,
        env = "STREAMER_SERVER",
        default_value = "http://127.0.0.1:8080",
        value_name = "URL"
    )]
    pub server: String,
    /// Service to check, such as streamer.router.v1.RouterService; empty means the whole server.
    #[arg(long, default_value = "", value_name = "NAME")]
    pub service: String,
}

/// Arguments of `streamer config`.
#[derive(Args, Clone, Debug)]
pub struct ConfigArguments {
    /// Print the defaults and ignore file, environment and flags.
    #[arg(long)]
    pub default: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub sources: ConfigSources,
}

/// Arguments of `streamer demo`.
#[derive(Args, Clone, Debug)]
pub struct DemoArguments {
    /// CSV file with a header line [default: a built-in penguin data set].
    pub file: Option<PathBuf>,
    /// File to which the report is written.
    #[arg(long, default_value = "streamer-report.html", value_name = "FILE")]
    pub report: PathBuf,
}

/// Arguments of `streamer worker`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "The server must not run the actions itself:
  streamer up --set execution.builtin_actions=echo,health
  streamer worker --actions process_data,generate_report

On SIGTERM, running attempts may finish within the drain timeout; the others are returned to the
server. A second SIGTERM stops the worker immediately.")]
pub struct WorkerArguments {
    /// Actions to run, separated by commas [default: all].
    #[arg(long, value_name = "ACTIONS", value_delimiter = ',')]
    pub actions: Vec<String>,
    /// Maximum number of concurrent attempts.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub slots: u32,
    /// Time limit for running attempts on shutdown: a number followed by s, m, h or d.
    #[arg(long, default_value = "30s", value_parser = crate::token::parse_duration)]
    pub drain_timeout: std::time::Duration,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: CommonArguments,
}

/// Arguments of `streamer submit`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  streamer submit echo --payload '{\"hello\":\"world\"}'
  streamer submit echo_async --payload '{\"steps\":50,\"delay_ms\":100}'
  echo '{\"steps\":3}' | streamer submit echo_async -
  streamer submit echo_async --id nightly-1 --detach

Ctrl-C stops watching and prints how to resume; the request continues.")]
pub struct SubmitArguments {
    /// Action to run; `streamer actions` lists the available ones.
    pub action: String,
    /// `-` reads the payload from standard input.
    #[arg(value_name = "-", value_parser = ["-"], conflicts_with_all = ["payload", "payload_file"])]
    pub stdin: Option<String>,
    /// Payload, as JSON.
    #[arg(long, value_name = "JSON", conflicts_with = "payload_file")]
    pub payload: Option<String>,
    /// File with the payload.
    #[arg(long, value_name = "FILE")]
    pub payload_file: Option<PathBuf>,
    /// ID of the request. Submitting the same request with the same ID again has no effect.
    #[arg(long)]
    pub id: Option<String>,
    /// Print only the outcome.
    #[arg(long, conflicts_with = "detach")]
    pub wait: bool,
    /// Print only the acknowledgment and exit without waiting for the outcome.
    #[arg(long)]
    pub detach: bool,
    /// Priority, 0 to 9; requests with a higher priority run first.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(i32).range(0..=9))]
    pub priority: i32,
    /// Minimum delay before the request starts, in milliseconds.
    #[arg(long, default_value_t = 0, value_name = "MS")]
    pub delay_ms: u64,
    /// Start a trace, or continue the trace in the environment variable TRACEPARENT, and print the trace ID
    /// to standard error. The server decides whether to record spans (trace.trust_callers).
    #[arg(long)]
    pub trace: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: CommonArguments,
}

/// Arguments of `streamer watch`.
#[derive(Args, Clone, Debug)]
pub struct WatchArguments {
    /// ID or UID of the request.
    pub id: String,
    /// Sequence number of the event after which to start; 0 prints all events.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(i64).range(0..))]
    pub after_seq: i64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: CommonArguments,
}

/// Arguments of `streamer get`.
#[derive(Args, Clone, Debug)]
pub struct GetArguments {
    /// ID or UID of the request.
    pub id: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: CommonArguments,
}

/// Arguments of `streamer list`.
#[derive(Args, Clone, Debug)]
pub struct ListArguments {
    /// List only requests in this state: QUEUED, RUNNING, SUCCEEDED, FAILED or CANCELLED; may be repeated.
    #[arg(long = "state", value_name = "STATE")]
    pub states: Vec<streamer_core::RequestState>,
    /// Maximum number of requests to list.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i32).range(1..=500))]
    pub limit: i32,
    /// Page token that a previous `streamer list` printed.
    #[arg(long, default_value = "", value_name = "PAGE_TOKEN")]
    pub page_token: String,
    /// List the requests of all users of the given tenant; requires permission `operator`.
    #[arg(long, default_value = "", value_name = "TENANT", hide_default_value = true)]
    pub tenant: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: CommonArguments,
}

/// Arguments of `streamer cancel`.
#[derive(Args, Clone, Debug)]
pub struct CancelArguments {
    /// ID or UID of the request.
    pub id: String,
    /// Reason for the cancellation, which is stored in the event log.
    #[arg(long, default_value = "")]
    pub reason: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: CommonArguments,
}

/// Arguments of `streamer redrive`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  streamer redrive nightly-1
  streamer redrive --all --action generate_report --since 24h --dry-run
  streamer redrive --all --state FAILED --state CANCELLED

With --all, requests that were already redriven with --all are skipped.")]
pub struct RedriveArguments {
    /// ID or UID of the failed or cancelled request.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub id: Option<String>,
    /// ID of the new request.
    #[arg(long, default_value = "", conflicts_with = "all")]
    pub new_id: String,
    /// Redrive all failed requests that match the other options.
    #[arg(long)]
    pub all: bool,
    /// With --all: redrive only requests in this state, FAILED or CANCELLED; may be repeated [default:
    /// FAILED].
    #[arg(long = "state", value_name = "STATE", requires = "all")]
    pub states: Vec<streamer_core::RequestState>,
    /// With --all: redrive only requests for this action.
    #[arg(long, default_value = "", requires = "all")]
    pub action: String,
    /// With --all: redrive only requests accepted within this period before now: a number followed by s, m, h
    /// or d.
    #[arg(long, requires = "all", value_parser = crate::token::parse_duration)]
    pub since: Option<std::time::Duration>,
    /// With --all: print the requests that would be redriven, without redriving them.
    #[arg(long, requires = "all")]
    pub dry_run: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: CommonArguments,
}

/// Arguments of `streamer connections`.
#[derive(Args, Clone, Debug)]
pub struct ConnectionsArguments {
    /// The command to run.
    #[command(subcommand)]
    pub command: ConnectionsCommand,
}

/// Commands for connections.
#[derive(Clone, Debug, Subcommand)]
pub enum ConnectionsCommand {
    /// List the tenant's connections.
    List {
        /// List only the connections of the given user.
        #[arg(long, default_value = "")]
        user: String,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: CommonArguments,
    },
    /// Send a message to all connections of a user, or to one connection.
    Send {
        /// Topic of the message.
        topic: String,
        /// Message, as JSON.
        #[arg(id = "message")]
        data: String,
        /// User to send the message to.
        #[arg(long, required_unless_present = "connection", conflicts_with = "connection")]
        user: Option<String>,
        /// ID of the connection to send the message to.
        #[arg(long)]
        connection: Option<String>,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: CommonArguments,
    },
    /// Send a message to all connections of the tenant.
    Broadcast {
        /// Topic of the message.
        topic: String,
        /// Message, as JSON.
        #[arg(id = "message")]
        data: String,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: CommonArguments,
    },
    /// Close a connection.
    Disconnect {
        /// ID of the connection.
        connection: String,
        /// Reason to send to the client.
        #[arg(long, default_value = "")]
        reason: String,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: CommonArguments,
    },
}

/// Arguments of `streamer token`.
#[derive(Args, Clone, Debug)]
pub struct TokenArguments {
    /// Value of the claim `sub`.
    #[arg(long, default_value = "dev")]
    pub user: String,
    /// Value of the claim `tenant_id`.
    #[arg(long, default_value = "dev")]
    pub tenant: String,
    /// Permissions in the claim `permissions`, separated by commas; `*` for all.
    #[arg(long, default_value = "", value_delimiter = ',')]
    pub permissions: Vec<String>,
    /// Lifetime of the token: a number followed by s, m, h or d.
    #[arg(long, default_value = "1h", value_parser = crate::token::parse_duration)]
    pub expires: std::time::Duration,
    /// Data folder of the development key, which is created if it does not exist.
    #[arg(long, env = "STREAMER_DATA", default_value = "./streamer-data", value_name = "DIR")]
    pub data: PathBuf,
}
