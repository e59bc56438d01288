//! `streamer health`: checks the health of a server, for probes of containers without a shell.

use std::{process::ExitCode, time::Duration};

use clap::Args;
use tokio::time::timeout;
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::Exit;

/// Arguments of `streamer health`.
#[derive(Args, Clone, Debug)]
pub(crate) struct HealthArguments {
    /// URL of the server.
    #[arg(
        long,
        env = "STREAMER_SERVER",
        default_value = "http://127.0.0.1:8080",
        value_name = "URL"
    )]
    pub(crate) server: String,
    /// Service to check, such as streamer.router.v1.RouterService; empty means the whole server.
    #[arg(long, default_value = "", value_name = "NAME")]
    pub(crate) service: String,
}

const CHECK_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) async fn run(arguments: &HealthArguments) -> ExitCode {
    match timeout(CHECK_TIMEOUT, check(arguments)).await {
        Ok(Ok(ServingStatus::Serving)) => {
            println!("serving");
            Exit::Done.code()
        }
        Ok(Ok(status)) => {
            println!("{}", status.as_str_name().to_lowercase().replace('_', " "));
            Exit::Failed.code()
        }
        Ok(Err(error)) => {
            eprintln!("error: {}: {error:#}", arguments.server);
            Exit::Unreachable.code()
        }
        Err(_) => {
            eprintln!("error: {} does not respond", arguments.server);
            Exit::Unreachable.code()
        }
    }
}

async fn check(arguments: &HealthArguments) -> anyhow::Result<ServingStatus> {
    let channel = Endpoint::from_shared(arguments.server.clone())?.connect().await?;
    let request = HealthCheckRequest { service: arguments.service.clone() };
    Ok(HealthClient::new(channel).check(request).await?.into_inner().status())
}
