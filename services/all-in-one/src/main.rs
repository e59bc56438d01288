//! The `streamer` binary: parses the command line, runs the command and returns its exit code.

mod demo;
mod health;
mod serve_command;
mod tables;
mod worker;

use std::process::ExitCode;

use clap::Parser;
use streamer_all_in_one::Role;
use streamer_cli::{Cli, Command, Exit};

/// Allocator that returns memory to the system promptly and has little overhead for small objects. At
/// 10,000 connections, the system's allocator uses 50 % more memory.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the runtime: {error}");
            return Exit::Failed.code();
        }
    };
    runtime.block_on(async {
        match command {
            Command::Up(arguments) => serve_command::run(&arguments, Role::All).await,
            Command::Gateway(arguments) => serve_command::run(&arguments, Role::Gateway).await,
            Command::Router(arguments) => serve_command::run(&arguments, Role::Router).await,
            Command::Processor(arguments) => serve_command::run(&arguments, Role::Processor).await,
            Command::Progress(arguments) => serve_command::run(&arguments, Role::Progress).await,
            Command::Health(arguments) => health::run(&arguments).await,
            Command::Tables(arguments) => tables::run(&arguments).await,
            Command::Demo(arguments) => demo::run(&arguments).await,
            Command::Worker(arguments) => worker::run(arguments).await,
            Command::Config(arguments) => serve_command::show_config(&arguments),
            other => streamer_cli::run(other).await,
        }
    })
}
