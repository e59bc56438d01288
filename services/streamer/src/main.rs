//! The `streamer` binary: all services in one process, a single service, and the commands that call a server.

mod arguments;
mod cli;
mod commands;
mod exit;
mod progress_bar;
mod server;
mod terminal;
mod token_source;

use std::process::ExitCode;

use clap::Parser;

use crate::{cli::Cli, exit::Exit};

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
    runtime.block_on(command.run())
}
