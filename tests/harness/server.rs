//! The real binary, in a process of its own.

use std::{
    env,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ChildStderr, Output, Stdio},
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

/// The `streamer` binary of this build.
///
/// # Panics
/// When it has not been built.
#[must_use]
pub fn binary() -> PathBuf {
    built("streamer")
}

/// The `check-history` binary of this build.
///
/// # Panics
/// When it has not been built.
#[must_use]
pub fn checker() -> PathBuf {
    built("check-history")
}

fn built(name: &str) -> PathBuf {
    let test = env::current_exe().expect("a test knows where it is");
    // target/debug/deps/suite-0123 → target/debug/streamer
    let profile = test.parent().and_then(|deps| deps.parent()).expect("cargo's folders");
    let binary = profile.join(name);
    assert!(
        binary.exists(),
        "{} is not there: run `cargo build --workspace --bins` first (tests/run does)",
        binary.display()
    );
    binary
}

/// A tool that tests/run installs, by the environment variable that names it.
///
/// # Panics
/// When it is not named: nothing is skipped in silence.
#[must_use]
pub fn tool(variable: &str) -> PathBuf {
    match env::var_os(variable) {
        Some(path) => path.into(),
        None => panic!("{variable} is not set: run the tests with tests/run"),
    }
}

/// A running server with a data folder and a loopback address of its own.
pub struct Server {
    process: Process,
    data: TempDir,
    settings: Vec<String>,
    environment: Vec<(String, String)>,
    address: SocketAddr,
    /// A different server writes to the same store.
    shares_store: bool,
    _claim: LoopbackAddress,
    /// `http://127.X.Y.Z:PORT`
    pub url: String,
}

impl Server {
    /// Starts a server with these settings (`section.option=value`).
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start(settings: &[&str]) -> Self {
        let data = TempDir::with_prefix("streamer-test-").expect("a temporary folder");
        Self::start_in(data, settings)
    }

    /// Starts a server with the data in this folder.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start_in(data: TempDir, settings: &[&str]) -> Self {
        Self::start_with(data, settings, &[])
    }

    /// Starts a server with the data in this folder, these environment variables and no others.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start_with(data: TempDir, settings: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::launch(data, settings, environment, Stdio::inherit())
    }

    /// Starts a server with these settings, whose log the test reads.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start_logged(settings: &[&str]) -> (Self, BufReader<ChildStderr>) {
        let data = TempDir::with_prefix("streamer-test-").expect("a temporary folder");
        let mut server = Self::launch(data, settings, &[], Stdio::piped());
        let log = BufReader::new(server.process.stderr());
        (server, log)
    }

    /// Starts a server with the data in this folder and these environment variables, whose log the test
    /// reads.
    ///
    /// # Panics
    /// When it does not start.
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
        let mut all = engine_settings(&data);
        all.extend(settings.iter().map(ToString::to_string));
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let environment: Vec<_> = environment.iter().map(owned).collect();
        let claim = LoopbackAddress::claim();
        let address = claim.next();
        let process = spawn_service("up", data.path(), &all, &environment, address, stderr);
        let url = format!("http://{address}");
        Self {
            process,
            data,
            settings: all,
            environment,
            address,
            shares_store: false,
            _claim: claim,
            url,
        }
    }

    /// Kills it with SIGKILL and starts it again on the same address and data.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.restart();
    }

    /// Starts it again, after it has ended, on the same address and data.
    pub fn restart(&mut self) {
        let (data, environment) = (self.data.path(), &self.environment);
        let stderr = Stdio::inherit();
        self.process = spawn_service("up", data, &self.settings, environment, self.address, stderr);
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Sends it SIGHUP.
    pub fn reload(&self) {
        self.process.signal(Signal::HUP);
    }

    /// Sends it SIGTERM.
    pub fn terminate(&self) {
        self.process.signal(Signal::TERM);
    }

    /// Waits for it to end; returns its exit code.
    pub fn ended(&mut self) -> Option<i32> {
        self.process.wait().code()
    }

    /// Sends it SIGTERM and waits for it to end; returns its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        self.process.stop()
    }

    /// Most resident memory of it so far, in bytes.
    #[must_use]
    pub fn peak_resident_bytes(&self) -> u64 {
        self.process.peak_resident_bytes()
    }

    /// Resident memory of it, in bytes.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        self.process.resident_bytes()
    }

    /// Notes that a different server writes to the same store. What that one stores is announced there;
    /// this one finds it by comparing.
    pub fn share_store(&mut self) {
        self.shares_store = true;
    }

    /// What it was started with.
    #[must_use]
    pub fn settings(&self) -> &[String] {
        &self.settings
    }

    /// Its data folder.
    #[must_use]
    pub fn data(&self) -> &Path {
        self.data.path()
    }

    /// A token of its development key, valid for an hour.
    #[must_use]
    pub fn token(&self, tenant: &str, user: &str, permissions: &[&str]) -> String {
        self.token_for(tenant, user, permissions, Duration::from_secs(3600))
    }

    /// A token of its development key.
    ///
    /// # Panics
    /// When there is no key.
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
        let key = DevKey::load(self.data.path()).expect("the server has made a key");
        key.sign(&token, SystemClock.now()).expect("the key signs")
    }
}

impl Drop for Server {
    /// Ends the server.
    ///
    /// # Panics
    /// When it delivered events only because it compared watched requests with its store: in one process
    /// every event that is stored is announced.
    fn drop(&mut self) {
        let is_checked = !self.shares_store && !thread::panicking();
        let missed =
            if is_checked && self.process.is_running() { missed_events(self.address) } else { 0 };
        Process::end_all([&mut self.process]);
        assert_eq!(missed, 0, "events were stored and not announced");
    }
}

/// Events that were delivered only because the server compared watched requests with its store. Waits
/// for announcements that may still come.
fn missed_events(address: SocketAddr) -> u64 {
    while matches!(value(address, "streamer_progress_unannounced_events"), Some(1_i64..)) {
        thread::sleep(Duration::from_millis(100));
    }
    value(address, "streamer_progress_missed_events_total").unwrap_or(0)
}

/// Which engine the suites run on: `embedded` unless `STREAMER_TESTS_ENGINE` names another. The
/// others get tables of their own.
fn engine_settings(data: &TempDir) -> Vec<String> {
    let implementation = match env::var("STREAMER_TESTS_ENGINE").as_deref() {
        Err(_) | Ok("embedded") => return Vec::new(),
        Ok("dynamodb-local") => Implementation::DynamoDbLocal,
        Ok("dynoxide") => Implementation::Dynoxide,
        Ok(other) => panic!("STREAMER_TESTS_ENGINE: there is no engine {other}"),
    };
    dynamodb_settings(endpoint(implementation), data.path())
}

/// Settings for tables of their own on this server, made already; large values go to this folder.
///
/// # Panics
/// When the tables cannot be made.
#[must_use]
pub fn dynamodb_settings(endpoint: &str, data: &Path) -> Vec<String> {
    let settings = vec![
        "store.engine=dynamodb".to_owned(),
        format!("dynamodb.endpoint={endpoint}"),
        format!("dynamodb.table_prefix=t-{}-", Uid::new(SystemClock.now())),
        format!("dynamodb.objects=file://{}/objects", data.display()),
        // These engines answer no sooner when more is asked of them at once.
        "dynamodb.max_concurrent_operations=32".to_owned(),
    ];
    let output = tables("create", &settings, data);
    assert!(output.status.success(), "{output:?}");
    settings
}

/// Where the tester's own machine stands must not count.
const NO_METADATA: (&str, &str) = ("AWS_EC2_METADATA_DISABLED", "true");

/// Runs `streamer tables`.
///
/// # Panics
/// When it cannot be run.
#[must_use]
pub fn tables(command: &str, settings: &[String], folder: &Path) -> Output {
    let mut tables = Process::command(binary());
    tables.args(["tables", command]);
    for setting in settings {
        tables.args(["--set", setting]);
    }
    Process::output(tables.env_clear().envs([NO_METADATA]).current_dir(folder))
}

/// What a server says that must not start with the data in this folder.
///
/// # Panics
/// When it starts all the same.
#[must_use]
pub fn refusal_to_start(data: &Path) -> String {
    let mut command = Process::command(binary());
    command.args(["up", "--listen", "127.0.0.1:0", "--data"]).arg(data);
    let output = Process::output(command.env_clear().current_dir(data));
    assert_eq!(output.status.code(), Some(1), "it ends by itself");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Starts a service on this address; returns once it reports that it is ready.
pub(crate) fn spawn_service(
    service: &str,
    data: &Path,
    settings: &[String],
    environment: &[(String, String)],
    address: SocketAddr,
    stderr: Stdio,
) -> Process {
    let mut command = Process::command(binary());
    command.args([service, "--listen", &address.to_string(), "--data"]).arg(data);
    for setting in settings {
        command.args(["--set", setting]);
    }
    // The configuration of the user who runs the tests has no effect.
    command.env_clear().envs(environment.iter().cloned()).current_dir(data);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
    let mut process = Process::spawn(&mut command);
    let mut first = String::new();
    let count = BufReader::new(process.stdout()).read_line(&mut first);
    count.expect("the output of the server can be read");
    let ready = format!("{READY}http://{address} ");
    assert!(first.starts_with(&ready), "the server printed {first:?}");
    process
}
