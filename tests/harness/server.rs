//! The real binary, in a process of its own.

use std::{
    env,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{self, Child, Command, Output, Stdio},
    sync::Once,
    thread,
    time::Duration,
};

use streamer_auth::{DevKey, NewToken};
use streamer_core::{Clock, SystemClock, Uid};
use tempfile::TempDir;

use crate::dynamodb::{Implementation, endpoint};

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

/// A running server with a data folder of its own.
pub struct Server {
    child: Child,
    data: TempDir,
    settings: Vec<String>,
    environment: Vec<(String, String)>,
    /// `http://127.0.0.1:PORT`
    pub url: String,
}

impl Server {
    /// Starts a server on a free port, with these settings (`section.option=value`).
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start(settings: &[&str]) -> Self {
        watch_for_hangs();
        let data = TempDir::with_prefix("streamer-test-").expect("a temporary folder");
        Self::start_in(data, settings)
    }

    /// Starts a server on a free port, with the data that is in this folder.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start_in(data: TempDir, settings: &[&str]) -> Self {
        Self::start_with(data, settings, &[])
    }

    /// The same with these environment variables and no others.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start_with(data: TempDir, settings: &[&str], environment: &[(&str, &str)]) -> Self {
        watch_for_hangs();
        let mut all = engine_settings(&data);
        all.extend(settings.iter().map(ToString::to_string));
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let environment: Vec<_> = environment.iter().map(owned).collect();
        let (child, url) = spawn(&data, &all, &environment, "127.0.0.1:0");
        Self { child, data, settings: all, environment, url }
    }

    /// Kills it with SIGKILL and starts it again on the same port and data.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.restart();
    }

    /// Starts it again, after it has ended, on the same port and data.
    pub fn restart(&mut self) {
        let address = self.url.trim_start_matches("http://").to_owned();
        let (child, url) = spawn(&self.data, &self.settings, &self.environment, &address);
        self.child = child;
        self.url = url;
    }

    /// Kills it with SIGKILL.
    ///
    /// # Panics
    /// When it cannot be killed.
    pub fn kill(&mut self) {
        self.child.kill().expect("the server can be killed");
        self.child.wait().expect("the server can be waited for");
    }

    /// Sends it SIGTERM.
    ///
    /// # Panics
    /// When it cannot be told.
    pub fn terminate(&self) {
        terminate(&self.child);
    }

    /// Waits for it to end; its exit code.
    ///
    /// # Panics
    /// When it cannot be waited for.
    pub fn ended(&mut self) -> Option<i32> {
        ended(&mut self.child)
    }

    /// Sends it SIGTERM and waits for it to end; its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        self.terminate();
        self.ended()
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
    fn drop(&mut self) {
        // It may have ended by itself.
        if self.child.kill().is_ok() {
            drop(self.child.wait());
        }
    }
}

/// Sends SIGTERM to a process.
pub(crate) fn terminate(child: &Child) {
    let told = Command::new("kill").arg(child.id().to_string()).status();
    assert!(told.expect("kill runs").success());
}

/// Waits for a process to end; its exit code.
pub(crate) fn ended(child: &mut Child) -> Option<i32> {
    child.wait().expect("the server can be waited for").code()
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
    let mut tables = Command::new(binary());
    tables.args(["tables", command]);
    for setting in settings {
        tables.args(["--set", setting]);
    }
    tables
        .env_clear()
        .envs([NO_METADATA])
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .expect("it can be run")
}

/// What a server says that must not start with the data in this folder.
///
/// # Panics
/// When it starts all the same.
#[must_use]
pub fn refusal_to_start(data: &Path) -> String {
    let output = Command::new(binary())
        .args(["up", "--listen", "127.0.0.1:0", "--data"])
        .arg(data)
        .env_clear()
        .current_dir(data)
        .stdin(Stdio::null())
        .output()
        .expect("the server can be started");
    assert_eq!(output.status.code(), Some(1), "it ends by itself");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A suite that waits for what never comes ends, and says so, instead of holding up everything.
pub(crate) fn watch_for_hangs() {
    const PATIENCE: Duration = Duration::from_secs(300);
    // The crash suite can be told to go on for long.
    let kills = env::var("STREAMER_TESTS_KILLS").ok().and_then(|text| text.parse().ok());
    let patience = PATIENCE + Duration::from_secs(kills.unwrap_or(0));
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        thread::spawn(move || {
            thread::sleep(patience);
            eprintln!("a test of this suite has not ended after {} s", patience.as_secs());
            process::exit(101);
        });
    });
}

fn spawn(
    data: &TempDir,
    settings: &[String],
    environment: &[(String, String)],
    address: &str,
) -> (Child, String) {
    spawn_service("up", data.path(), settings, environment, address)
}

/// Starts a service; returns once it says that it is ready.
pub(crate) fn spawn_service(
    service: &str,
    data: &Path,
    settings: &[String],
    environment: &[(String, String)],
    address: &str,
) -> (Child, String) {
    let mut command = Command::new(binary());
    command.args([service, "--listen", address, "--data"]).arg(data);
    for setting in settings {
        command.args(["--set", setting]);
    }
    // Nothing of the tester's own configuration counts.
    command.env_clear().envs(environment.iter().cloned()).current_dir(data);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the server can be started");
    let stdout = child.stdout.take().expect("its output is piped");
    let mut first = String::new();
    BufReader::new(stdout).read_line(&mut first).expect("the server says that it is ready");
    let url = first.trim().strip_prefix(READY).unwrap_or_else(|| panic!("it said {first:?}"));
    let url = url.split_whitespace().next().expect("an address follows").to_owned();
    (child, url)
}
