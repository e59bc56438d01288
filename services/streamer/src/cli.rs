//! The command line: all commands of the `streamer` binary, and the functions that run them.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use streamer_cluster::Service;

use crate::{
    Exit,
    arguments::CommonArguments,
    commands::{
        actions, bench, config, connections, demo, follow, health, requests, serve, store, tables,
        token, worker,
    },
    exit,
    server::Role,
};

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
pub(crate) struct Cli {
    /// The command to run.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Commands of the `streamer` binary.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a server with all services in one process, on one port.
    Up(serve::ServerArguments),
    /// Start only a gateway, which serves WebSocket connections and forwards public gRPC calls.
    ///
    /// Requires store.engine=dynamodb, peers.router and peers.progress; peers.processor for workers that
    /// connect to this gateway, peers.gateway to reach connections of other gateways, and
    /// peers.shared_secret_file to listen on an address other than loopback.
    Gateway(serve::ServerArguments),
    /// Start only a router, which admits requests and announces them to processors.
    ///
    /// Requires store.engine=dynamodb, peers.processor and peers.progress, and peers.shared_secret_file to
    /// listen on an address other than loopback.
    Router(serve::ServerArguments),
    /// Start only a processor, which runs requests or assigns them to workers.
    ///
    /// Requires store.engine=dynamodb and peers.progress, and peers.shared_secret_file to listen on an address
    /// other than loopback.
    Processor(serve::ServerArguments),
    /// Start only a progress service, which stores and streams event logs.
    ///
    /// Requires store.engine=dynamodb and peers.progress (the URLs of all progress services, including this
    /// one), and peers.shared_secret_file to listen on an address other than loopback.
    Progress(serve::ServerArguments),
    /// Back up a running server's store, or restore a backup.
    Store(store::StoreArguments),
    /// Create, check or print the tables of engine dynamodb.
    Tables(tables::TablesArguments),
    /// Check whether a server is ready; exit with code 0 if it is.
    Health(health::HealthArguments),
    /// Run a demo: start a server, profile a CSV file over a WebSocket, write a report.
    Demo(demo::DemoArguments),
    /// Submit a request and follow it to its end.
    Submit(follow::SubmitArguments),
    /// Follow an existing request to its end.
    Watch(follow::WatchArguments),
    /// Show a request with its payload and result.
    Get(requests::GetArguments),
    /// List requests, newest first.
    List(requests::ListArguments),
    /// Cancel a request.
    Cancel(requests::CancelArguments),
    /// Run a failed or cancelled request again, as a new request.
    Redrive(requests::RedriveArguments),
    /// Run the built-in handlers in this process, as a worker of a server.
    Worker(worker::WorkerArguments),
    /// List the available actions.
    Actions(CommonArguments),
    /// List, message and close live WebSocket connections.
    Connections(connections::ConnectionsArguments),
    /// Print a token that is signed with the development key.
    Token(token::TokenArguments),
    /// Measure a server under load.
    Bench(bench::BenchArguments),
    /// Print the effective configuration.
    Config(config::ConfigArguments),
    /// Print shell completions.
    Completions {
        /// Shell to print completions for.
        shell: Shell,
    },
}

impl Command {
    /// Runs the command and returns the exit code of the process.
    pub(crate) async fn run(self) -> ExitCode {
        let outcome = match self {
            Self::Up(arguments) => return serve::run(&arguments, Role::All).await,
            Self::Gateway(arguments) => {
                return serve::run(&arguments, Role::Only(Service::Gateway)).await;
            }
            Self::Router(arguments) => {
                return serve::run(&arguments, Role::Only(Service::Router)).await;
            }
            Self::Processor(arguments) => {
                return serve::run(&arguments, Role::Only(Service::Processor)).await;
            }
            Self::Progress(arguments) => {
                return serve::run(&arguments, Role::Only(Service::Progress)).await;
            }
            Self::Tables(arguments) => return tables::run(&arguments).await,
            Self::Health(arguments) => return health::run(&arguments).await,
            Self::Demo(arguments) => return demo::run(&arguments).await,
            Self::Worker(arguments) => return worker::run(arguments).await,
            Self::Config(arguments) => return config::run(&arguments),
            Self::Store(arguments) => store::run(arguments).await,
            Self::Submit(arguments) => follow::submit(arguments).await,
            Self::Watch(arguments) => follow::watch(arguments).await,
            Self::Get(arguments) => requests::get(arguments).await,
            Self::List(arguments) => requests::list(arguments).await,
            Self::Cancel(arguments) => requests::cancel(arguments).await,
            Self::Redrive(arguments) => requests::redrive(arguments).await,
            Self::Actions(arguments) => actions::list(arguments).await,
            Self::Connections(arguments) => connections::run(arguments).await,
            Self::Token(arguments) => token::print(&arguments),
            Self::Bench(arguments) => bench::run(arguments).await,
            Self::Completions { shell } => {
                clap_complete::generate(
                    shell,
                    &mut Cli::command(),
                    "streamer",
                    &mut std::io::stdout(),
                );
                Ok(Exit::Done)
            }
        };
        exit::report(outcome)
    }
}
