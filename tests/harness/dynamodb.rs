//! Local DynamoDB servers: DynamoDB Local by AWS, and dynoxide, an independent implementation.
//!
//! tests/run installs both. They accept any credentials, but DynamoDB Local requires an access key of
//! letters and digits. Their standard error is forwarded to that of the test.

use std::{
    env,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, TcpStream},
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::{Process, loopback::WildcardPort, tool};

/// Timeout of the start of a server; the Java virtual machine takes 4 s on an idle machine with two cores.
const START_TIMEOUT: Duration = Duration::from_secs(90);
/// Maximum number of ports to try: a process that is not a test may bind a port before the server does.
const PORT_ATTEMPTS: usize = 5;

/// Request that lists the tables. dynoxide requires a signature and a date, but does not verify them.
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

/// Implementation of DynamoDB.
#[derive(Clone, Copy, Debug)]
pub enum Implementation {
    /// DynamoDB Local by AWS, in Java.
    DynamoDbLocal,
    /// dynoxide, in Rust.
    Dynoxide,
}

/// Returns the endpoint of an in-memory server, such as `http://127.0.0.1:20123`, once the server is ready. The
/// tests of one process share one server per implementation.
///
/// # Panics
/// Panics if the server does not start.
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

/// Starts a separate server with its data on disk, so that it can be killed and restarted.
///
/// # Panics
/// Panics if the server does not start.
#[must_use]
pub fn start(implementation: Implementation) -> Server {
    let data = TempDir::with_prefix("streamer-dynamodb-").expect("a temporary folder");
    Server::launch(implementation, Some(data))
}

/// A running server; stopped on drop.
pub struct Server {
    implementation: Implementation,
    port: WildcardPort,
    endpoint: String,
    process: Process,
    data: Option<TempDir>,
}

impl Server {
    fn launch(implementation: Implementation, data: Option<TempDir>) -> Self {
        for _ in 0..PORT_ATTEMPTS {
            let port = WildcardPort::claim();
            let folder = data.as_ref().map(TempDir::path);
            let process = start_process(implementation, port.number, folder);
            if let Some(process) = process {
                let endpoint = format!("http://127.0.0.1:{}", port.number);
                return Self { implementation, port, endpoint, process, data };
            }
        }
        panic!("{implementation:?} does not start; the reason is on its standard error");
    }

    /// Returns the endpoint of the server: `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Kills the server with SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Restarts a killed server on the same port with the same data.
    ///
    /// # Panics
    /// Panics if the server does not start.
    pub fn restart(&mut self) {
        let data = self.data.as_ref().map(TempDir::path);
        let process = start_process(self.implementation, self.port.number, data);
        self.process = process.expect("the server restarts");
    }
}

/// Starts a server and waits until it responds. Returns `None` if it exits first or its port is in use.
fn start_process(
    implementation: Implementation,
    port: u16,
    data: Option<&Path>,
) -> Option<Process> {
    const POLL_INTERVAL: Duration = Duration::from_millis(10);
    let mut process = Process::spawn(&mut command(implementation, port, data));
    let port_in_use = forward_stderr(&mut process);
    let started = Instant::now();
    loop {
        let is_ready = lists_tables(port).unwrap_or(false);
        // Also checked after a response, which may come from a different server on the port.
        let has_exited = process.wait_timeout(POLL_INTERVAL).is_some();
        if has_exited || port_in_use.load(Ordering::Relaxed) {
            return None;
        }
        if is_ready {
            return Some(process);
        }
        assert!(
            started.elapsed() < START_TIMEOUT,
            "{implementation:?} did not respond on port {port} within {START_TIMEOUT:?}"
        );
    }
}

/// Forwards the standard error of a server to that of the test; sets the flag when the server reports
/// that its port is in use. DynamoDB Local does not exit in this case.
fn forward_stderr(process: &mut Process) -> Arc<AtomicBool> {
    let port_in_use = Arc::new(AtomicBool::new(false));
    let (flag, lines) = (port_in_use.clone(), BufReader::new(process.stderr()).lines());
    thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            eprintln!("{line}");
            flag.fetch_or(line.contains("already in use"), Ordering::Relaxed);
        }
    });
    port_in_use
}

fn command(implementation: Implementation, port: u16, data: Option<&Path>) -> Command {
    let mut command = match implementation {
        Implementation::DynamoDbLocal => {
            let mut command = Process::command("java");
            command.current_dir(tool("STREAMER_TESTS_DYNAMODB_LOCAL")).args([
                // Suppresses a warning about an optional library, which is logged at every start.
                "-Djava.util.logging.config.file=/dev/null",
                "-Djava.library.path=DynamoDBLocal_lib",
                "-jar",
                "DynamoDBLocal.jar",
                "-disableTelemetry",
                // Without this option, every access key and region has separate tables.
                "-sharedDb",
            ]);
            match data {
                Some(folder) => command.arg("-dbPath").arg(folder),
                None => command.arg("-inMemory"),
            };
            command.arg("-port").arg(port.to_string());
            command
        }
        Implementation::Dynoxide => {
            let mut command = Process::command(tool("STREAMER_TESTS_DYNOXIDE"));
            command.args(["--log", "quiet"]);
            if let Some(folder) = data {
                command.arg("--db-path").arg(folder.join("dynoxide.db"));
            }
            command.arg("--port").arg(port.to_string());
            command
        }
    };
    // The configuration of the user must not affect the tests.
    command.env_clear().env("PATH", env::var_os("PATH").unwrap_or_default());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn lists_tables(port: u16) -> io::Result<bool> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(LIST_TABLES.as_bytes())?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    Ok(response.starts_with("HTTP/1.1 200") && response.contains("TableNames"))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_start_on_a_port_in_use_fails_without_waiting() {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a port is free");
        let port = listener.local_addr().expect("the listener is bound").port();
        thread::spawn(move || listener.incoming().for_each(drop));
        for implementation in [Implementation::DynamoDbLocal, Implementation::Dynoxide] {
            let started = start_process(implementation, port, None);
            assert!(started.is_none(), "{implementation:?} started on a port that is in use");
        }
    }
}
