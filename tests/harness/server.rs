//! Runs the `streamer` binary in a separate process.

use std::{
    env,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ChildStderr, ChildStdout, Output, Stdio},
    thread,
    time::Duration,
};

use streamer_auth::{DevKey, NewToken};
use streamer_core::{Clock, SystemClock, Uid};
use tempfile::TempDir;

use crate::{
    LoopbackAddress, Process, Signal,
    dynamodb::{Implementation, endpoint},
    metrics::value,
};

const READY: &str = "Streamer is ready: ";

/// Returns the path of the `streamer` binary of this build.
///
/// # Panics
/// Panics if the binary has not been built.
#[must_use]
pub fn binary() -> PathBuf {
    build_output("streamer")
}

/// Returns the path of the `check-history` binary of this build.
///
/// # Panics
/// Panics if the binary has not been built.
#[must_use]
pub fn checker() -> PathBuf {
    build_output("check-history")
}

fn build_output(name: &str) -> PathBuf {
    let test = env::current_exe().expect("the path of the test binary is known");
    // target/debug/deps/suite-0123 → target/debug/streamer
    let profile = test
        .parent()
        .and_then(|deps| deps.parent())
        .expect("the test binary is in a folder of cargo");
    let binary = profile.join(name);
    assert!(
        binary.exists(),
        "{} does not exist: run `cargo build --workspace --bins` first (tests/run does)",
        binary.display()
    );
    binary
}

/// Returns the path of a tool that tests/run installs, from the given environment variable.
///
/// # Panics
/// Panics if the variable is not set, so that no test is skipped silently.
#[must_use]
pub fn tool(variable: &str) -> PathBuf {
    match env::var_os(variable) {
        Some(path) => path.into(),
        None => panic!("{variable} is not set: run the tests with tests/run"),
    }
}

/// A running server with a separate data folder and loopback address.
pub struct Server {
    process: Process,
    data: TempDir,
    settings: Vec<String>,
    environment: Vec<(String, String)>,
    address: SocketAddr,
    /// Whether a different server writes to the same store.
    shares_store: bool,
    _claim: LoopbackAddress,
    /// URL of the server: `http://127.X.Y.Z:PORT`.
    pub url: String,
}

impl Server {
    /// Starts a server with the given settings (`section.option=value`).
    ///
    /// # Panics
    /// Panics if the server does not start.
    #[must_use]
    pub fn start(settings: &[&str]) -> Self {
        let data = TempDir::with_prefix("streamer-test-").expect("a temporary folder");
        Self::start_in(data, settings)
    }

    /// Starts a server with the given data folder.
    ///
    /// # Panics
    /// Panics if the server does not start.
    #[must_use]
    pub fn start_in(data: TempDir, settings: &[&str]) -> Self {
        Self::start_with(data, settings, &[])
    }

    /// Starts a server with the given data folder and environment variables, and without other variables.
    ///
    /// # Panics
    /// Panics if the server does not start.
    #[must_use]
    pub fn start_with(data: TempDir, settings: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::launch(data, settings, environment, Stdio::inherit())
    }

    /// Starts a server with the given settings; also returns its log.
    ///
    /// # Panics
    /// Panics if the server does not start.
    #[must_use]
    pub fn start_logged(settings: &[&str]) -> (Self, BufReader<ChildStderr>) {
        let data = TempDir::with_prefix("streamer-test-").expect("a temporary folder");
        let mut server = Self::launch(data, settings, &[], Stdio::piped());
        let log = BufReader::new(server.process.stderr());
        (server, log)
    }

    /// Starts a server with the given settings; also returns what it prints after the line with its address.
    ///
    /// # Panics
    /// Panics if the server does not start.
    #[must_use]
    pub fn start_printing(settings: &[&str]) -> (Self, BufReader<ChildStdout>) {
        let data = TempDir::with_prefix("streamer-test-").expect("a temporary folder");
        Self::launch_printing(data, settings, &[], Stdio::inherit())
    }

    /// Starts a server with the given data folder and environment variables; also returns its log.
    ///
    /// # Panics
    /// Panics if the server does not start.
    #[must_use]
    pub fn start_logged_with(
        data: TempDir,
        environment: &[(&str, &str)],
    ) -> (Self, BufReader<ChildStderr>) {
        let mut server = Self::launch(data, &[], environment, Stdio::piped());
        let log = BufReader::new(server.process.stderr());
        (server, log)
    }

    fn launch(
        data: TempDir,
        settings: &[&str],
        environment: &[(&str, &str)],
        stderr: Stdio,
    ) -> Self {
        Self::launch_printing(data, settings, environment, stderr).0
    }

    fn launch_printing(
        data: TempDir,
        settings: &[&str],
        environment: &[(&str, &str)],
        stderr: Stdio,
    ) -> (Self, BufReader<ChildStdout>) {
        let mut all = engine_settings(&data);
        all.extend(settings.iter().map(ToString::to_string));
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let environment: Vec<_> = environment.iter().map(owned).collect();
        let claim = LoopbackAddress::claim();
        let address = claim.next();
        let (process, printed) =
            spawn_printing("up", data.path(), &all, &environment, address, stderr);
        let url = format!("http://{address}");
        let server = Self {
            process,
            data,
            settings: all,
            environment,
            address,
            shares_store: false,
            _claim: claim,
            url,
        };
        (server, printed)
    }

    /// Kills the server with SIGKILL and restarts it on the same address with the same data.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.restart();
    }

    /// Restarts the server after it has exited, on the same address with the same data.
    pub fn restart(&mut self) {
        let (data, environment) = (self.data.path(), &self.environment);
        let stderr = Stdio::inherit();
        self.process = spawn_service("up", data, &self.settings, environment, self.address, stderr);
    }

    /// Kills the server with SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Sends SIGHUP.
    pub fn reload(&self) {
        self.process.signal(Signal::HUP);
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.process.signal(Signal::TERM);
    }

    /// Waits until the server exits; returns its exit code.
    pub fn wait(&mut self) -> Option<i32> {
        self.process.wait().code()
    }

    /// Sends SIGTERM and waits until the server exits; returns its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        self.process.stop()
    }

    /// Returns the peak resident memory of the server, in bytes.
    #[must_use]
    pub fn peak_resident_bytes(&self) -> u64 {
        self.process.peak_resident_bytes()
    }

    /// Returns the resident memory of the server, in bytes.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        self.process.resident_bytes()
    }

    /// Marks the store as shared with a different server. The events that the other server stores are
    /// announced only there; this server finds them by comparing watched requests with the store.
    pub fn share_store(&mut self) {
        self.shares_store = true;
    }

    /// Returns the settings with which the server was started.
    #[must_use]
    pub fn settings(&self) -> &[String] {
        &self.settings
    }

    /// Returns the data folder of the server.
    #[must_use]
    pub fn data(&self) -> &Path {
        self.data.path()
    }

    /// Returns a token that is signed with the development key and valid for an hour.
    #[must_use]
    pub fn token(&self, tenant: &str, user: &str, permissions: &[&str]) -> String {
        self.token_for(tenant, user, permissions, Duration::from_secs(3600))
    }

    /// Returns a token that is signed with the development key.
    ///
    /// # Panics
    /// Panics if the key does not exist.
    #[must_use]
    pub fn token_for(
        &self,
        tenant: &str,
        user: &str,
        permissions: &[&str],
        expires_in: Duration,
    ) -> String {
        let token = NewToken {
            user: user.into(),
            tenant: tenant.into(),
            permissions: permissions.iter().map(ToString::to_string).collect(),
            expires_in,
        };
        let key = DevKey::load(self.data.path()).expect("the server has created a key");
        key.sign(&token, SystemClock.now()).expect("the key signs")
    }
}

impl Drop for Server {
    /// Stops the server.
    ///
    /// # Panics
    /// Panics if the server delivered events only because it compared watched requests with its store: in one
    /// process, every stored event is announced.
    fn drop(&mut self) {
        let is_checked = !self.shares_store && !thread::panicking();
        let missed =
            if is_checked && self.process.is_running() { missed_events(self.address) } else { 0 };
        Process::stop_all([&mut self.process]);
        assert_eq!(missed, 0, "events were stored and not announced");
    }
}

/// Returns the number of events that were delivered only because the server compared watched requests with
/// its store. Waits for pending announcements first.
fn missed_events(address: SocketAddr) -> u64 {
    while matches!(value(address, "streamer_progress_unannounced_events"), Some(1_i64..)) {
        thread::sleep(Duration::from_millis(100));
    }
    value(address, "streamer_progress_missed_events_total").unwrap_or(0)
}

/// Returns settings for the engine that `STREAMER_TESTS_ENGINE` selects, by default `sqlite`. Other
/// engines get separate tables.
fn engine_settings(data: &TempDir) -> Vec<String> {
    let implementation = match env::var("STREAMER_TESTS_ENGINE").as_deref() {
        Err(_) | Ok("sqlite") => return Vec::new(),
        Ok("dynamodb-local") => Implementation::DynamoDbLocal,
        Ok("dynoxide") => Implementation::Dynoxide,
        Ok(other) => panic!("STREAMER_TESTS_ENGINE: unknown engine {other}"),
    };
    dynamodb_settings(endpoint(implementation), data.path())
}

/// Creates separate tables at the given endpoint, and returns settings for them. Large values are stored in the
/// folder `data`.
///
/// # Panics
/// Panics if the tables cannot be created.
#[must_use]
pub fn dynamodb_settings(endpoint: &str, data: &Path) -> Vec<String> {
    let settings = vec![
        "store.engine=dynamodb".to_owned(),
        format!("dynamodb.endpoint={endpoint}"),
        format!("dynamodb.table_prefix=t-{}-", Uid::new(SystemClock.now())),
        format!("dynamodb.object_store_url=file://{}/objects", data.display()),
        // More concurrent operations do not increase the throughput of these servers.
        "dynamodb.max_concurrent_operations=32".to_owned(),
    ];
    let output = run_tables("create", &settings, data);
    assert!(output.status.success(), "{output:?}");
    settings
}

/// Environment variable that disables EC2 instance metadata, which must not affect the tests.
const NO_METADATA: (&str, &str) = ("AWS_EC2_METADATA_DISABLED", "true");

/// Runs `streamer tables`.
///
/// # Panics
/// Panics if the command cannot be run.
#[must_use]
pub fn run_tables(command: &str, settings: &[String], folder: &Path) -> Output {
    let mut tables = Process::command(binary());
    tables.args(["tables", command]);
    for setting in settings {
        tables.args(["--set", setting]);
    }
    Process::output(tables.env_clear().envs([NO_METADATA]).current_dir(folder))
}

/// Returns the standard error of a server that fails to start with the given data folder.
///
/// # Panics
/// Panics if the server starts.
#[must_use]
pub fn start_error(data: &Path) -> String {
    let mut command = Process::command(binary());
    command.args(["up", "--listen", "127.0.0.1:0", "--data"]).arg(data);
    let output = Process::output(command.env_clear().current_dir(data));
    assert_eq!(output.status.code(), Some(1), "the server exits");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Starts a service on the given address; returns once the service reports that it is ready.
pub(crate) fn spawn_service(
    service: &str,
    data: &Path,
    settings: &[String],
    environment: &[(String, String)],
    address: SocketAddr,
    stderr: Stdio,
) -> Process {
    spawn_printing(service, data, settings, environment, address, stderr).0
}

/// Starts a service like [`spawn_service`]; also returns what it prints after the line with its address.
fn spawn_printing(
    service: &str,
    data: &Path,
    settings: &[String],
    environment: &[(String, String)],
    address: SocketAddr,
    stderr: Stdio,
) -> (Process, BufReader<ChildStdout>) {
    let mut command = Process::command(binary());
    command.args([service, "--listen", &address.to_string(), "--data"]).arg(data);
    for setting in settings {
        command.args(["--set", setting]);
    }
    // The configuration of the user must not affect the tests.
    command.env_clear().envs(environment.iter().cloned()).current_dir(data);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
    let mut process = Process::spawn(&mut command);
    let mut printed = BufReader::new(process.stdout());
    let mut first_line = String::new();
    printed.read_line(&mut first_line).expect("the output of the server can be read");
    let ready = format!("{READY}http://{address} ");
    assert!(first_line.starts_with(&ready), "the server printed {first_line:?}");
    (process, printed)
}
