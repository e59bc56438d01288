//! The grammar of the command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::bench::BenchArguments;

/// Requests that take longer than a connection lives: submit, watch live progress, get exactly one
/// outcome, whatever dies in between.
#[derive(Debug, Parser)]
#[command(name = "streamer", version, max_term_width = 100, propagate_version = true)]
#[command(after_help = "Examples:
  streamer demo                                  everything at once, in one minute
  streamer up                                    a server on 127.0.0.1:8080
  streamer submit echo --payload '{\"n\":1}'       a sync action: answered at once
  streamer submit process_data --payload-file p.json
  streamer watch 01JD… --after-seq 17            come back to a request

Exit codes: 0 done, 1 the request failed, 2 wrong usage, 3 the server cannot be reached,
4 not permitted, 5 cancelled, 130 left by Ctrl-C (a request goes on).")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a server: every service in this process, on one port.
    Up(UpArguments),
    /// Start a gateway alone: WebSocket, and every public call passed on to whose it is.
    ///
    /// Needs store.engine=dynamodb, peers.router and peers.progress; peers.processor for workers that
    /// connect here, peers.gateway to reach connections of other gateways, and peers.secret_file
    /// beyond loopback.
    Gateway(UpArguments),
    /// Start a router alone: admits requests, tells about them.
    ///
    /// Needs store.engine=dynamodb, peers.processor and peers.progress, and peers.secret_file beyond
    /// loopback.
    Router(UpArguments),
    /// Start a processor alone: runs requests, gives them to workers.
    ///
    /// Needs store.engine=dynamodb and peers.progress, and peers.secret_file beyond loopback.
    Processor(UpArguments),
    /// Start a progress service alone: keeps and streams the logs.
    ///
    /// Needs store.engine=dynamodb and peers.progress (all of them, itself included), and
    /// peers.secret_file beyond loopback.
    Progress(UpArguments),
    /// Make, check or print the tables of engine dynamodb.
    Tables(TablesArguments),
    /// Say whether a server can do its job; exit code 0 when it can.
    Health(HealthArguments),
    /// Show it all: start a server, profile a CSV file through a WebSocket, write a report.
    Demo(DemoArguments),
    /// Submit a request and follow it to its end.
    Submit(SubmitArguments),
    /// Follow a request that was submitted before.
    Watch(WatchArguments),
    /// Show one request, with its payload and result.
    Get(OneArguments),
    /// List requests, newest first.
    List(ListArguments),
    /// Ask that a request end.
    Cancel(CancelArguments),
    /// Run a failed or cancelled request again, as a new one.
    Redrive(RedriveArguments),
    /// Run the built-in handlers in this process, for a server elsewhere.
    Worker(WorkerArguments),
    /// List what can be asked for.
    Actions(Common),
    /// See the live WebSocket connections, speak to them, end them.
    Connections(ConnectionsArguments),
    /// Print a token signed with the development key, and nothing else.
    Token(TokenArguments),
    /// Measure a server under load.
    Bench(BenchArguments),
    /// Show the configuration that would be in force.
    Config(ConfigArguments),
    /// Print completions for a shell.
    Completions {
        /// bash, zsh, fish, elvish or powershell.
        shell: Shell,
    },
}

/// Where the server is and who asks.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// The server.
    #[arg(
        long,
        env = "STREAMER_SERVER",
        default_value = "http://127.0.0.1:8080",
        value_name = "URL"
    )]
    pub server: String,
    /// Who asks. Without one, for a server on this machine, one is made with the development key
    /// in the data folder.
    #[arg(long, env = "STREAMER_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub token: Option<String>,
    /// File with the token, read again for each connection and when the token expires.
    #[arg(long, env = "STREAMER_TOKEN_FILE", value_name = "FILE", conflicts_with = "token")]
    pub token_file: Option<PathBuf>,
    /// The server's data folder, for the development key.
    #[arg(long, env = "STREAMER_DATA", default_value = "./streamer-data", value_name = "DIR")]
    pub data: PathBuf,
    /// Print one JSON object a line, also on a terminal.
    #[arg(long)]
    pub json: bool,
}

/// `streamer up`
#[derive(Args, Clone, Debug)]
#[command(after_help = "Every option of the configuration can be set here:
  streamer up --set gateway.max_connections=100 --set log.filter=info
`streamer config --default` prints them all, with their meaning.")]
pub struct UpArguments {
    /// Address and port; port 0 takes a free one [default: 127.0.0.1:8080].
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// Folder of the store and of the development key [default: ./streamer-data].
    #[arg(long, env = "STREAMER_DATA", value_name = "DIR")]
    pub data: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub config: ConfigSources,
}

/// Where the configuration comes from.
#[derive(Args, Clone, Debug, Default)]
pub struct ConfigSources {
    /// Configuration file [default: streamer.toml, if it is there].
    #[arg(long, env = "STREAMER_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Set an option; may be repeated.
    #[arg(long = "set", value_name = "SECTION.OPTION=VALUE")]
    pub set: Vec<String>,
}

/// `streamer tables`
#[derive(Args, Clone, Debug)]
pub struct TablesArguments {
    /// What to do.
    #[command(subcommand)]
    pub command: TablesCommand,
}

/// What to do with the tables.
#[derive(Clone, Debug, Subcommand)]
pub enum TablesCommand {
    /// Make those that are not there; what is there is compared, and never changed.
    Create(ConfigSources),
    /// Compare them with what they should be.
    Check(ConfigSources),
    /// Print them as a CloudFormation template.
    Cloudformation(ConfigSources),
}

/// `streamer health`
#[derive(Args, Clone, Debug)]
pub struct HealthArguments {
    /// The server.
    #[arg(
        long,
        env = "STREAMER_SERVER",
        default_value = "http://127.0.0.1:8080",
        value_name = "URL"
    )]
    pub server: String,
    /// The service to ask about, like streamer.router.v1.RouterService; empty means the server.
    #[arg(long, default_value = "", value_name = "NAME")]
    pub service: String,
}

/// `streamer config`
#[derive(Args, Clone, Debug)]
pub struct ConfigArguments {
    /// The defaults, not what file, environment and flags make of them.
    #[arg(long)]
    pub default: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub sources: ConfigSources,
}

/// `streamer demo`
#[derive(Args, Clone, Debug)]
pub struct DemoArguments {
    /// A CSV file with a header line [default: penguins that come with the program].
    pub file: Option<PathBuf>,
    /// Where the report goes.
    #[arg(long, default_value = "streamer-report.html", value_name = "FILE")]
    pub report: PathBuf,
}

/// `streamer worker`
#[derive(Args, Clone, Debug)]
#[command(after_help = "The server must leave the actions to workers:
  streamer up --set execution.local_actions=echo,health
  streamer worker --actions process_data,generate_report

SIGTERM lets running attempts end within the drain timeout and hands the rest back; a second SIGTERM
stops the worker at once.")]
pub struct WorkerArguments {
    /// Which of them, separated by commas [default: all].
    #[arg(long, value_name = "ACTIONS", value_delimiter = ',')]
    pub actions: Vec<String>,
    /// Attempts that run at once.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub slots: u32,
    /// How long running attempts may go on when it stops: a number and s, m, h or d.
    #[arg(long, default_value = "30s", value_parser = crate::token::parse_duration)]
    pub drain_timeout: std::time::Duration,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// `streamer submit`
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  streamer submit echo --payload '{\"hello\":\"world\"}'
  streamer submit echo_async --payload '{\"steps\":50,\"delay_ms\":100}'
  echo '{\"steps\":3}' | streamer submit echo_async -
  streamer submit echo_async --id nightly-1 --detach

Ctrl-C leaves the request running and says how to come back.")]
pub struct SubmitArguments {
    /// What is asked for; `streamer actions` lists them.
    pub action: String,
    /// `-` reads the payload from standard input.
    #[arg(value_name = "-", value_parser = ["-"], conflicts_with_all = ["payload", "payload_file"])]
    pub stdin: Option<String>,
    /// Its input, as JSON.
    #[arg(long, value_name = "JSON", conflicts_with = "payload_file")]
    pub payload: Option<String>,
    /// A file with its input.
    #[arg(long, value_name = "FILE")]
    pub payload_file: Option<PathBuf>,
    /// Your own name for it; submitting the same again starts nothing new.
    #[arg(long)]
    pub id: Option<String>,
    /// Print only the outcome.
    #[arg(long, conflicts_with = "detach")]
    pub wait: bool,
    /// Print only the acknowledgement, and leave.
    #[arg(long)]
    pub detach: bool,
    /// 0 to 9; higher runs first.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(i32).range(0..=9))]
    pub priority: i32,
    /// Do not start earlier than so many milliseconds from now.
    #[arg(long, default_value_t = 0, value_name = "MS")]
    pub delay_ms: u64,
    /// Begin a trace, or continue that of the environment variable TRACEPARENT, and print its id on
    /// standard error. The server decides whether it records spans (trace.trust_callers).
    #[arg(long)]
    pub trace: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// `streamer watch`
#[derive(Args, Clone, Debug)]
pub struct WatchArguments {
    /// Its id or uid.
    pub id: String,
    /// The last event that was seen; 0 for all.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(i64).range(0..))]
    pub after_seq: i64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// A command about one request.
#[derive(Args, Clone, Debug)]
pub struct OneArguments {
    /// Its id or uid.
    pub id: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// `streamer list`
#[derive(Args, Clone, Debug)]
pub struct ListArguments {
    /// Only these states: QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED; may be repeated.
    #[arg(long = "state", value_name = "STATE")]
    pub states: Vec<streamer_core::RequestState>,
    /// At most so many.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i32).range(1..=500))]
    pub limit: i32,
    /// Continue where an earlier list ended.
    #[arg(long, default_value = "", value_name = "PAGE_TOKEN")]
    pub page_token: String,
    /// All requests of this tenant; needs permission `operator`.
    #[arg(long, default_value = "", value_name = "TENANT", hide_default_value = true)]
    pub tenant: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// `streamer cancel`
#[derive(Args, Clone, Debug)]
pub struct CancelArguments {
    /// Its id or uid.
    pub id: String,
    /// Why; kept in the log.
    #[arg(long, default_value = "")]
    pub reason: String,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// `streamer redrive`
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  streamer redrive nightly-1
  streamer redrive --all --action generate_report --since 24h --dry-run
  streamer redrive --all --state FAILED --state CANCELLED

With --all, what was redriven by it before is not redriven again.")]
pub struct RedriveArguments {
    /// Id or uid of the request that ended.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub id: Option<String>,
    /// Your own name for the new one.
    #[arg(long, default_value = "", conflicts_with = "all")]
    pub new_id: String,
    /// All that failed, as far as the other options say.
    #[arg(long)]
    pub all: bool,
    /// With --all: FAILED, CANCELLED; may be repeated [default: FAILED].
    #[arg(long = "state", value_name = "STATE", requires = "all")]
    pub states: Vec<streamer_core::RequestState>,
    /// With --all: only this action.
    #[arg(long, default_value = "", requires = "all")]
    pub action: String,
    /// With --all: only what was accepted within so long: a number and s, m, h or d.
    #[arg(long, requires = "all", value_parser = crate::token::parse_duration)]
    pub since: Option<std::time::Duration>,
    /// With --all: only print what would be redriven.
    #[arg(long, requires = "all")]
    pub dry_run: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: Common,
}

/// `streamer connections`
#[derive(Args, Clone, Debug)]
pub struct ConnectionsArguments {
    /// What to do with them.
    #[command(subcommand)]
    pub command: ConnectionsCommand,
}

/// What to do with connections.
#[derive(Clone, Debug, Subcommand)]
pub enum ConnectionsCommand {
    /// List the tenant's connections.
    List {
        /// Only this user's.
        #[arg(long, default_value = "")]
        user: String,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: Common,
    },
    /// Send a message to a user's connections, or to one connection.
    Send {
        /// What it is about.
        topic: String,
        /// The message, as JSON.
        #[arg(id = "message")]
        data: String,
        /// To this user.
        #[arg(long, required_unless_present = "connection", conflicts_with = "connection")]
        user: Option<String>,
        /// To this connection.
        #[arg(long)]
        connection: Option<String>,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: Common,
    },
    /// Send a message to every connection of the tenant.
    Broadcast {
        /// What it is about.
        topic: String,
        /// The message, as JSON.
        #[arg(id = "message")]
        data: String,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: Common,
    },
    /// Close a connection.
    Disconnect {
        /// Which.
        connection: String,
        /// Told to the client.
        #[arg(long, default_value = "")]
        reason: String,
        #[command(flatten)]
        #[allow(missing_docs)]
        common: Common,
    },
}

/// `streamer token`
#[derive(Args, Clone, Debug)]
pub struct TokenArguments {
    /// Claim `sub`.
    #[arg(long, default_value = "dev")]
    pub user: String,
    /// Claim `tenant_id`.
    #[arg(long, default_value = "dev")]
    pub tenant: String,
    /// Claim `permissions`, separated by commas; `*` for all.
    #[arg(long, default_value = "", value_delimiter = ',')]
    pub permissions: Vec<String>,
    /// How long it is valid: a number and s, m, h or d.
    #[arg(long, default_value = "1h", value_parser = crate::token::parse_duration)]
    pub expires: std::time::Duration,
    /// The data folder that holds the key; a key is made when there is none.
    #[arg(long, env = "STREAMER_DATA", default_value = "./streamer-data", value_name = "DIR")]
    pub data: PathBuf,
}
