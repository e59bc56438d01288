//! Real DynamoDB servers: AWS's own DynamoDB Local, and dynoxide, which shares no code with it.
//!
//! tests/run installs both. They take any credentials, but DynamoDB Local wants an access key of
//! letters and digits. What they write goes to the test's stderr, where little is expected.

use std::{
    env,
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::Path,
    process::{self, Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::tool;

/// Starting the Java machine takes 4 s on an idle machine of two cores.
const PATIENCE: Duration = Duration::from_secs(90);

/// Becomes the server, and leaves a guard behind that kills it when the test lets go of the other
/// end of the guard's input: so also when the test is killed.
const GUARDED: &str =
    r#"exec 3<&0 </dev/null; { read _ <&3; kill -9 $$ 2>/dev/null; } & exec "$@" 3<&-"#;

/// Dynoxide looks whether there are a signature and a date, not what they say.
const LIST_TABLES: &str = "POST / HTTP/1.1\r\n\
    Host: 127.0.0.1\r\n\
    Connection: close\r\n\
    Content-Type: application/x-amz-json-1.0\r\n\
    Content-Length: 2\r\n\
    X-Amz-Target: DynamoDB_20120810.ListTables\r\n\
    X-Amz-Date: 20260101T000000Z\r\n\
    Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/dynamodb/aws4_request, \
    SignedHeaders=host, Signature=0\r\n\
    \r\n\
    {}";

/// Which implementation.
#[derive(Clone, Copy, Debug)]
pub enum Implementation {
    /// AWS's own, on Java.
    DynamoDbLocal,
    /// An independent one.
    Dynoxide,
}

/// The endpoint of a server in memory, like `http://127.0.0.1:20123`: one of each kind in this
/// process, ready when returned.
///
/// # Panics
/// When it does not start.
#[must_use]
pub fn endpoint(implementation: Implementation) -> &'static str {
    static DYNAMODB_LOCAL: OnceLock<Server> = OnceLock::new();
    static DYNOXIDE: OnceLock<Server> = OnceLock::new();
    let server = match implementation {
        Implementation::DynamoDbLocal => &DYNAMODB_LOCAL,
        Implementation::Dynoxide => &DYNOXIDE,
    };
    server.get_or_init(|| Server::launch(implementation, None)).endpoint()
}

/// A server of one's own, with its data on disk, so that it can be killed and restarted.
///
/// # Panics
/// When it does not start.
#[must_use]
pub fn start(implementation: Implementation) -> Server {
    let data = TempDir::with_prefix("streamer-dynamodb-").expect("a temporary folder");
    Server::launch(implementation, Some(data))
}

/// A running server, until dropped.
pub struct Server {
    implementation: Implementation,
    port: u16,
    endpoint: String,
    child: Child,
    data: Option<TempDir>,
}

impl Server {
    fn launch(implementation: Implementation, data: Option<TempDir>) -> Self {
        let port = free_port();
        let child = spawn(implementation, port, data.as_ref().map(TempDir::path));
        let endpoint = format!("http://127.0.0.1:{port}");
        let mut server = Self { implementation, port, endpoint, child, data };
        server.wait_until_ready();
        server
    }

    /// `http://127.0.0.1:PORT`
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Kills it with SIGKILL.
    ///
    /// # Panics
    /// When it cannot be killed.
    pub fn kill(&mut self) {
        self.child.kill().expect("the server can be killed");
        self.child.wait().expect("the server can be waited for");
    }

    /// Starts it again, after it has been killed, on the same port and data.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        let data = self.data.as_ref().map(TempDir::path);
        self.child = spawn(self.implementation, self.port, data);
        self.wait_until_ready();
    }

    fn wait_until_ready(&mut self) {
        let started = Instant::now();
        while !lists_tables(self.port).unwrap_or(false) {
            let ended = self.child.try_wait().expect("the server can be asked for");
            assert!(ended.is_none(), "{:?} has ended: {ended:?}", self.implementation);
            assert!(
                started.elapsed() < PATIENCE,
                "{:?} does not answer on port {} after {PATIENCE:?}",
                self.implementation,
                self.port
            );
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have been killed.
        if self.child.kill().is_ok() {
            drop(self.child.wait());
        }
    }
}

fn spawn(implementation: Implementation, port: u16, data: Option<&Path>) -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", GUARDED, "guarded"]);
    match implementation {
        Implementation::DynamoDbLocal => {
            command.current_dir(tool("STREAMER_TESTS_DYNAMODB_LOCAL")).args([
                "java",
                // Else it warns, each time, of a library that it can do without.
                "-Djava.util.logging.config.file=/dev/null",
                "-Djava.library.path=DynamoDBLocal_lib",
                "-jar",
                "DynamoDBLocal.jar",
                "-disableTelemetry",
                // Else every access key and region has tables of its own.
                "-sharedDb",
            ]);
            match data {
                Some(folder) => command.arg("-dbPath").arg(folder),
                None => command.arg("-inMemory"),
            };
            command.arg("-port").arg(port.to_string());
        }
        Implementation::Dynoxide => {
            command.arg(tool("STREAMER_TESTS_DYNOXIDE")).args(["--log", "quiet"]);
            if let Some(folder) = data {
                command.arg("--db-path").arg(folder.join("dynoxide.db"));
            }
            command.arg("--port").arg(port.to_string());
        }
    }
    // Nothing of the tester's own configuration counts.
    command.env_clear().env("PATH", env::var_os("PATH").unwrap_or_default());
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("a DynamoDB server can be started")
}

fn lists_tables(port: u16) -> io::Result<bool> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(LIST_TABLES.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.starts_with("HTTP/1.1 200") && answer.contains("TableNames"))
}

/// DynamoDB Local has to be told a port, and takes seconds until it listens there. So this is one
/// that systems do not give away by themselves, and that other test processes do not try first.
fn free_port() -> u16 {
    const FIRST: u32 = 20_000;
    const COUNT: u32 = 12_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let mine = process::id().wrapping_mul(16);
    (0..COUNT)
        .map(|_| mine.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT + FIRST)
        .filter_map(|port| u16::try_from(port).ok())
        .find(|port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_ok())
        .expect("a port is free")
}
