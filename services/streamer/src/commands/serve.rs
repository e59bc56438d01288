//! `streamer up`, `gateway`, `router`, `processor` and `progress`: run a server until a signal stops it.

use std::{
    io::{self, IsTerminal, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use rustix::process::{Resource, getrlimit, setrlimit};
use streamer_auth::NewToken;
use streamer_config::{Config, ConfigError, DEFAULT_FILE, Sources};
use streamer_telemetry::{LogFormat, TraceOptions, init};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::Instant,
};

use crate::{
    Exit,
    arguments::ConfigSources,
    commands::{config::sources, select_handlers::select_handlers},
    server::{ACCESS_LOG, Role, Server},
};

/// Text that `streamer up` prints before its address.
pub(crate) const READY: &str = "Streamer is ready: ";

/// Minimum timeout for exporting the last spans, regardless of the duration of the shutdown.
const MIN_FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// Lifetime of the printed token.
const TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Arguments of `streamer up` and of the commands that start a single service.
#[derive(Args, Clone, Debug)]
#[command(after_help = "--set accepts every configuration option:
  streamer up --set gateway.max_connections=100 --set log.filter=info
`streamer config --default` lists all options with their descriptions.")]
pub(crate) struct ServerArguments {
    /// Address and port; port 0 selects a free port [default: 127.0.0.1:8080].
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Option<SocketAddr>,
    /// Folder for the store and the development key [default: ./streamer-data].
    #[arg(long, env = "STREAMER_DATA", value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) config: ConfigSources,
}

pub(crate) async fn run(arguments: &ServerArguments, role: Role) -> ExitCode {
    let had_file = Path::new(DEFAULT_FILE).exists();
    let config = match load(arguments) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("error: {error}");
            return Exit::Usage.code();
        }
    };
    let format = match config.log.format {
        streamer_config::LogFormat::Text => LogFormat::Text,
        streamer_config::LogFormat::Json => LogFormat::Json,
    };
    raise_descriptors();
    let telemetry = match init(&log_filter(&config), format, &trace_options(&config, role)) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("error: {error}");
            return Exit::Usage.code();
        }
    };
    log_start(role, &config_sources(arguments));
    let handlers =
        match select_handlers(streamer_builtin_actions::all(), &config.execution.builtin_actions) {
            Ok(handlers) => handlers,
            Err(error) => {
                eprintln!("error: execution.builtin_actions: {error}");
                return Exit::Usage.code();
            }
        };
    let traces = telemetry.traces.clone();
    let server = match Server::start(&config, handlers, role, telemetry).await {
        Ok(server) => server,
        Err(error) => {
            eprintln!("error: {error}");
            return if error.is_configuration_error() {
                Exit::Usage.code()
            } else {
                Exit::Failed.code()
            };
        }
    };
    let mut signals = match Signals::listen() {
        Ok(signals) => signals,
        Err(error) => {
            eprintln!("error: cannot listen for signals: {error}");
            return Exit::Failed.code();
        }
    };
    announce(&server, &config, role);
    while signals.next().await == ServerSignal::Reload {
        reload(&server, arguments, had_file);
    }
    print_to_stderr(&format!(
        "Stopping: running work has {} s to complete. A second signal stops immediately.",
        config.server.drain_timeout.as_secs()
    ));
    let deadline = Instant::now() + config.server.drain_timeout;
    let stop = async {
        server.stop().await;
        let left = deadline.saturating_duration_since(Instant::now());
        traces.flush(left.max(MIN_FLUSH_TIMEOUT)).await;
    };
    tokio::select! {
        () = stop => {}
        // Interrupted work is resumed after a restart or by other processors.
        () = signals.stop() => {}
    }
    Exit::Done.code()
}

/// Logs the version and the sources of the configuration, without values, which may be secret.
fn log_start(role: Role, sources: &Sources) {
    let service = role.trace_name();
    let file = sources.existing_file().map(|path| path.display().to_string());
    let variables = sources.variables();
    let flags: Vec<&str> = sources.flags.iter().map(|(name, _)| name.as_str()).collect();
    let version = env!("CARGO_PKG_VERSION");
    tracing::info!(version, service, file, ?variables, ?flags, "starting");
}

/// Reloads the tenant limits. If the configuration has an error, the limits remain unchanged.
fn reload(server: &Server, arguments: &ServerArguments, had_file: bool) {
    let mut arguments = arguments.clone();
    // If the file has been deleted since the start, the reload fails instead of removing all overrides.
    if had_file && arguments.config.config.is_none() {
        arguments.config.config = Some(DEFAULT_FILE.into());
    }
    match load(&arguments) {
        Ok(config) => {
            server.replace_limits(&config);
            print_to_stderr(&format!(
                "Tenant limits reloaded; {} tenant(s) have separate limits. Other options require a \
                 restart.",
                config.tenants.len()
            ));
        }
        Err(error) => {
            print_to_stderr(&format!("error: tenant limits not changed: {error}"));
        }
    }
}

/// Prints a line to standard error. The server must continue even if standard error is closed.
fn print_to_stderr(text: &str) {
    if let Err(error) = writeln!(io::stderr(), "{text}") {
        tracing::debug!(%error, text, "cannot write to standard error");
    }
}

/// Raises the limit of open file descriptors to the maximum that the system allows.
fn raise_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        eprintln!("warning: failed to raise the limit of open files: {error}");
    }
}

/// Returns the filter of log lines, which includes the access log if it is enabled.
fn log_filter(config: &Config) -> String {
    let filter = &config.log.filter;
    if config.gateway.access_log { format!("{filter},{ACCESS_LOG}=info") } else { filter.clone() }
}

fn trace_options(config: &Config, role: Role) -> TraceOptions {
    let trace = &config.trace;
    TraceOptions {
        endpoint: (!trace.endpoint.is_empty()).then(|| trace.endpoint.clone()),
        sample_ratio: trace.sample_ratio,
        trust_callers: trace.trust_callers,
        service: role.trace_name(),
        version: env!("CARGO_PKG_VERSION"),
    }
}

fn load(arguments: &ServerArguments) -> Result<Config, ConfigError> {
    Config::load(&config_sources(arguments))
}

fn config_sources(arguments: &ServerArguments) -> Sources {
    let mut flags = Vec::new();
    if let Some(listen) = arguments.listen {
        flags.push(("server.listen".to_owned(), listen.to_string()));
    }
    if let Some(data) = &arguments.data {
        flags.push(("server.data_dir".to_owned(), data.display().to_string()));
    }
    sources(&arguments.config, flags)
}

/// Prints the addresses and the token in a single write, so that a reader that exits after the first line
/// does not end the server.
fn announce(server: &Server, config: &Config, role: Role) {
    let metrics =
        server.metrics_address().map(|address| format!("Metrics: http://{address}/metrics\n"));
    let metrics = metrics.unwrap_or_default();
    if let Role::Only(service) = role {
        return print_to_stdout(&format!(
            "{READY}http://{} ({service:?})\n{metrics}",
            server.address()
        ));
    }
    let token = NewToken {
        user: "dev".into(),
        tenant: "dev".into(),
        permissions: vec!["*".into()],
        expires_in: TOKEN_LIFETIME,
    };
    let token = server.dev_token(&token).map_or_else(String::new, |token| {
        format!(
            "Token: {token}\n       (user dev of tenant dev, all permissions, valid for 24 hours)\n"
        )
    });
    let text = format!(
        "{READY}http://{} (gRPC, WebSocket at /ws, HTTP)\nData:  {}\n{metrics}{token}\
         Try:   streamer submit echo_async --payload '{{\"steps\":20,\"delay_ms\":100}}'\n",
        server.address(),
        config.server.data_dir.display(),
    );
    print_to_stdout(&text);
}

fn print_to_stdout(text: &str) {
    let mut out = io::stdout().lock();
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        tracing::warn!(%error, "cannot write to standard output");
    }
}

/// Action that a signal requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ServerSignal {
    Stop,
    Reload,
}

/// Listens continuously for SIGTERM, Ctrl-C and SIGHUP, so that a second signal is not missed.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    /// Whether each standard stream is a terminal. Closing a terminal also sends SIGHUP.
    terminals: [bool; 3],
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
            terminals: terminals(),
        })
    }

    /// Waits for the next signal.
    async fn next(&mut self) -> ServerSignal {
        tokio::select! {
            _ = self.terminate.recv() => ServerSignal::Stop,
            _ = self.interrupt.recv() => ServerSignal::Stop,
            _ = self.hang_up.recv() => {
                // A stream is no longer a terminal after its terminal is closed.
                if self.terminals == terminals() { ServerSignal::Reload } else { ServerSignal::Stop }
            }
        }
    }

    /// Waits for the next SIGTERM or Ctrl-C. A terminal may send more than one SIGHUP when it closes.
    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

fn terminals() -> [bool; 3] {
    [io::stdin().is_terminal(), io::stdout().is_terminal(), io::stderr().is_terminal()]
}
