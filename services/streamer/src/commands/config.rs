//! `streamer config`: prints the configuration. Also loads it for other commands.

use std::{env, process::ExitCode};

use clap::Args;
use streamer_config::{Config, Sources};

use crate::{Exit, arguments::ConfigSources};

/// Arguments of `streamer config`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ConfigArguments {
    /// Print the defaults and ignore file, environment and flags.
    #[arg(long)]
    pub(crate) default: bool,
    #[command(flatten)]
    pub(crate) sources: ConfigSources,
}

pub(crate) fn run(arguments: &ConfigArguments) -> ExitCode {
    let config = if arguments.default {
        Ok(Config::default())
    } else {
        Config::load(&sources(&arguments.sources, Vec::new()))
    };
    match config {
        Ok(config) => {
            print!("{}", config.to_toml());
            Exit::Done.code()
        }
        Err(error) => {
            eprintln!("error: {error}");
            Exit::Usage.code()
        }
    }
}

pub(crate) fn sources(from: &ConfigSources, mut flags: Vec<(String, String)>) -> Sources {
    flags.extend(from.set.iter().map(|setting| match setting.split_once('=') {
        Some((name, value)) => (name.to_owned(), value.to_owned()),
        None => (setting.clone(), String::new()),
    }));
    Sources { file: from.config.clone(), environment: environment(), flags }
}

/// Returns the environment variables whose names and values are valid UTF-8.
pub(crate) fn environment() -> Vec<(String, String)> {
    env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}
