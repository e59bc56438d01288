//! Command line of the `streamer` binary: its arguments, and the commands that call a server.
//!
//! The binary implements the commands that run services or handlers or access the store; [`run`]
//! implements all others.

mod arguments;
pub mod bench;
mod connect;
mod exit;
mod follow;
mod manage;
mod server_process;
mod terminal;
mod token;

use std::process::ExitCode;

use clap::CommandFactory;

pub use arguments::{
    Cli, Command, ConfigArguments, ConfigSources, DemoArguments, HealthArguments, ServerArguments,
    TablesArguments, TablesCommand, WorkerArguments,
};
pub use exit::Exit;
pub use follow::{Screen, follow};
pub use server_process::READY;

/// Runs a command that calls a server.
pub async fn run(command: Command) -> ExitCode {
    let outcome = match command {
        Command::Submit(arguments) => follow::submit(arguments).await,
        Command::Watch(arguments) => follow::watch(arguments).await,
        Command::Get(arguments) => manage::get(arguments).await,
        Command::List(arguments) => manage::list(arguments).await,
        Command::Cancel(arguments) => manage::cancel(arguments).await,
        Command::Redrive(arguments) => manage::redrive(arguments).await,
        Command::Actions(arguments) => manage::actions(arguments).await,
        Command::Connections(arguments) => manage::connections(arguments).await,
        Command::Token(arguments) => token::print(&arguments),
        Command::Bench(arguments) => bench::run(arguments).await,
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "streamer", &mut std::io::stdout());
            Ok(Exit::Done)
        }
        Command::Up(_)
        | Command::Gateway(_)
        | Command::Router(_)
        | Command::Processor(_)
        | Command::Progress(_)
        | Command::Tables(_)
        | Command::Health(_)
        | Command::Demo(_)
        | Command::Worker(_)
        | Command::Config(_) => Err(anyhow::anyhow!("the binary must run this command")),
    };
    exit::report(outcome)
}
