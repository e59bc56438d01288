//! `streamer tables`: manages the tables of the store engine `dynamodb`.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use streamer_config::Config;
use streamer_store_dynamodb::{
    DynamoOptions, OpenError,
    tables::{self, Difference},
};

use crate::{
    Exit,
    arguments::ConfigSources,
    commands::config::sources,
    server::{dynamo_options, service_alarms},
};

/// Arguments of `streamer tables`.
#[derive(Args, Clone, Debug)]
pub(crate) struct TablesArguments {
    /// The command to run.
    #[command(subcommand)]
    pub(crate) command: TablesCommand,
}

/// Commands for tables.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum TablesCommand {
    /// Create missing tables and compare existing ones, which are never changed.
    Create(ConfigSources),
    /// Compare the tables with their required definitions.
    Check(ConfigSources),
    /// Print the tables, and the alarms of tables and services, as a CloudFormation template.
    Cloudformation(ConfigSources),
}

pub(crate) async fn run(arguments: &TablesArguments) -> ExitCode {
    let (TablesCommand::Create(from)
    | TablesCommand::Check(from)
    | TablesCommand::Cloudformation(from)) = &arguments.command;
    let config = match Config::load(&sources(from, Vec::new())) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("error: {error}");
            return Exit::Usage.code();
        }
    };
    let options = dynamo_options(&config);
    match &arguments.command {
        TablesCommand::Create(_) => create(&options).await,
        TablesCommand::Check(_) => check(&options).await,
        TablesCommand::Cloudformation(_) => {
            let namespace = &config.cloudwatch.namespace;
            print!(
                "{}",
                tables::cloudformation(&options.table_prefix, namespace, &service_alarms())
            );
            Exit::Done.code()
        }
    }
}

async fn create(options: &DynamoOptions) -> ExitCode {
    match tables::create(options).await {
        Ok((created, differences)) => {
            for name in &created {
                println!("created {name}");
            }
            if created.is_empty() && differences.is_empty() {
                println!("all tables exist; nothing was changed");
            }
            report(&differences)
        }
        Err(error) => failed(&error),
    }
}

async fn check(options: &DynamoOptions) -> ExitCode {
    match tables::check(options).await {
        Ok(differences) => {
            if differences.is_empty() {
                println!("all tables match the expected schema");
            }
            report(&differences)
        }
        Err(error) => failed(&error),
    }
}

fn report(differences: &[Difference]) -> ExitCode {
    if differences.is_empty() {
        return Exit::Done.code();
    }
    eprintln!("these tables differ from the expected schema and were not changed:");
    for difference in differences {
        eprintln!("  {difference}");
    }
    Exit::Failed.code()
}

fn failed(error: &OpenError) -> ExitCode {
    eprintln!("error: {error}");
    if error.is_configuration_error() { Exit::Usage.code() } else { Exit::Unreachable.code() }
}
