//! The server under load.

use std::time::Duration;

use clap::Args;

use super::{report::Report, server_process::ServerProcess};

/// Duration of the load before the measurement starts.
pub(super) const WARM_UP: Duration = Duration::from_secs(1);

/// Arguments for the server under load and the output format.
#[derive(Args, Clone, Debug)]
pub(crate) struct BenchCommon {
    /// URL of a running server; requires --token.
    #[arg(long, requires = "token", value_name = "URL")]
    pub(crate) server: Option<String>,
    /// Token for the server.
    #[arg(long, requires = "server", hide_env_values = true, value_name = "TOKEN")]
    pub(crate) token: Option<String>,
    /// Set a configuration option of the started server; may be repeated.
    #[arg(long = "set", value_name = "SECTION.OPTION=VALUE")]
    pub(crate) set: Vec<String>,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Server under load.
pub(crate) struct LoadTarget {
    pub(crate) url: String,
    pub(crate) token: String,
    /// Server process, for readings of its memory and processor time; `None` if this program did not start
    /// the server.
    pub(crate) process: Option<ServerProcess>,
}

impl LoadTarget {
    pub(super) fn open(common: &BenchCommon) -> anyhow::Result<Self> {
        Self::open_with(common, &[])
    }

    pub(super) fn open_with(common: &BenchCommon, settings: &[String]) -> anyhow::Result<Self> {
        let extra_settings = settings;
        if let (Some(url), Some(token)) = (&common.server, &common.token) {
            return Ok(Self { url: url.clone(), token: token.clone(), process: None });
        }
        let mut settings: Vec<String> = [
            "gateway.rate_limit=0",
            "limits.submissions_per_second_per_tenant=0",
            "limits.submissions_per_second_per_user=0",
            "limits.queued_requests_per_tenant=0",
            "limits.queued_requests_per_user=0",
            "limits.watches_per_tenant=0",
            "limits.watches_per_user=0",
            "gateway.max_connections_per_user=1000000",
            "gateway.max_connections_per_address=1000000",
            "server.max_connections_per_address=1000000",
            "gateway.max_buffered_bytes_per_user=268435456",
        ]
        .map(str::to_owned)
        .to_vec();
        settings.extend(extra_settings.iter().chain(&common.set).cloned());
        let process = ServerProcess::start(&settings)?;
        Ok(Self {
            url: process.url.clone(),
            token: process.token("bench")?,
            process: Some(process),
        })
    }

    /// Adds to the report the delivery faults that the server counted, if this program started the server.
    pub(super) async fn check(&self, mut report: Report) -> anyhow::Result<Report> {
        if let Some(process) = &self.process {
            report.check_delivery(process).await?;
        }
        Ok(report)
    }

    /// Returns the processor time that the server has used, in milliseconds, or 0 if this program did not
    /// start the server.
    pub(crate) fn processor_ms(&self) -> u64 {
        let process = self.process.as_ref().map(ServerProcess::processor_ms);
        process.and_then(Result::ok).unwrap_or(0)
    }
}
