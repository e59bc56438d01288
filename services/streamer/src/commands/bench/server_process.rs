//! A server in a separate process, for benchmarks.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, bail};
use streamer_auth::{DevKey, NewToken};
use streamer_core::{Clock, SystemClock};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::commands::serve::READY;

/// A running server with a temporary data folder. It is killed on drop.
pub(crate) struct ServerProcess {
    child: Child,
    data: TempDir,
    pub(crate) url: String,
}

impl ServerProcess {
    /// Starts this program as a server on a free port, with a new data folder.
    pub(crate) fn start(settings: &[String]) -> anyhow::Result<Self> {
        let data =
            TempDir::with_prefix("streamer-bench-").context("failed to create a data folder")?;
        Self::start_in(data, settings)
    }

    /// Starts this program as a server on a free port, with an existing data folder.
    pub(crate) fn start_in(data: TempDir, settings: &[String]) -> anyhow::Result<Self> {
        let mut command = Command::new(env::current_exe().context("failed to find this program")?);
        command.args(["up", "--listen", "127.0.0.1:0", "--data"]).arg(data.path());
        for setting in settings {
            command.args(["--set", setting]);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("failed to start a server")?;
        let Some(stdout) = child.stdout.take() else { bail!("the server has no standard output") };
        let mut first_line = String::new();
        BufReader::new(stdout).read_line(&mut first_line).context("no output from the server")?;
        let Some(url) = first_line.trim().strip_prefix(READY) else {
            bail!("the server did not start: {first_line}");
        };
        let url = url.split_whitespace().next().unwrap_or_default().to_owned();
        Ok(Self { child, data, url })
    }

    /// Stops the server and returns its data folder.
    pub(crate) fn stop(self) -> anyhow::Result<TempDir> {
        let status = Command::new("kill").arg(self.child.id().to_string()).status()?;
        if !status.success() {
            bail!("cannot stop the server: kill: {status}");
        }
        let mut this = self;
        this.child.wait().context("failed to wait for the server to stop")?;
        let empty =
            TempDir::with_prefix("streamer-bench-").context("failed to create a data folder")?;
        Ok(std::mem::replace(&mut this.data, empty))
    }

    /// Returns a token for the given tenant with all permissions.
    pub(crate) fn token(&self, tenant: &str) -> anyhow::Result<String> {
        self.token_with(tenant, "*")
    }

    /// Returns a token for the given tenant with one permission.
    pub(crate) fn token_with(&self, tenant: &str, permission: &str) -> anyhow::Result<String> {
        let token = NewToken {
            user: "bench".into(),
            tenant: tenant.to_owned(),
            permissions: vec![permission.to_owned()],
            expires_in: std::time::Duration::from_secs(24 * 3600),
        };
        Ok(DevKey::load(self.data.path())?.sign(&token, SystemClock.now())?)
    }

    /// Returns the resident memory of the server, in bytes.
    pub(crate) fn resident_bytes(&self) -> anyhow::Result<u64> {
        self.status_bytes("VmRSS:")
    }

    /// Returns the peak resident memory of the server, in bytes.
    pub(crate) fn peak_resident_bytes(&self) -> anyhow::Result<u64> {
        self.status_bytes("VmHWM:")
    }

    fn status_bytes(&self, field: &str) -> anyhow::Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .context("failed to read the server's memory")?;
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kilobytes = line.and_then(|rest| rest.split_whitespace().next());
        let kilobytes: u64 = kilobytes.with_context(|| format!("{field} is missing"))?.parse()?;
        Ok(kilobytes * 1024)
    }

    /// Returns the value of a counter or gauge from /metrics: the sum of the series with the given label, such as
    /// `name{outcome="succeeded"}`; 0 if there are none.
    pub(crate) async fn metric(&self, series: &str) -> anyhow::Result<u64> {
        let address = self.url.trim_start_matches("http://");
        let mut stream = TcpStream::connect(address).await?;
        let request =
            format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        let (name, label) = series.split_once('{').unwrap_or((series, ""));
        let label = label.trim_end_matches('}');
        let mut sum = 0;
        for line in text.lines() {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let (of, labels) = series.split_once('{').unwrap_or((series, ""));
            if of == name && labels.contains(label) {
                sum += value.parse::<u64>().with_context(|| format!("{series} is not a number"))?;
            }
        }
        Ok(sum)
    }

    /// Returns the processor time that the server has used, in milliseconds.
    pub(crate) fn processor_ms(&self) -> anyhow::Result<u64> {
        /// /proc counts 100 clock ticks per second on all supported Linux platforms.
        const MS_PER_TICK: u64 = 10;
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|text| text.parse().ok()).unwrap_or(0_u64);
        Ok((ticks(11) + ticks(12)) * MS_PER_TICK)
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // The process may have exited already.
        if self.child.kill().is_ok() {
            drop(self.child.wait());
        }
    }
}
