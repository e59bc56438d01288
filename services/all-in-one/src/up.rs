//! `streamer up`, `gateway`, `router`, `processor` and `progress`: servers until they are told to
//! stop.

use std::{
    env,
    io::{self, IsTerminal, Write},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use rustix::process::{Resource, getrlimit, setrlimit};
use streamer_all_in_one::{AllInOne, Role};
use streamer_auth::NewToken;
use streamer_cli::{ConfigArguments, ConfigSources, Exit, READY, UpArguments};
use streamer_config::{Config, ConfigError, DEFAULT_FILE, Sources};
use streamer_handler::Handlers;
use streamer_telemetry::{TraceOptions, init};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::Instant,
};

/// The last spans have this long to be exported, whatever else took the time to stop.
const MIN_FLUSH: Duration = Duration::from_secs(1);
/// The printed token is valid for so long.
const TOKEN_LIFE: Duration = Duration::from_secs(24 * 3600);

pub(crate) async fn run(arguments: &UpArguments, role: Role) -> ExitCode {
    let had_file = Path::new(DEFAULT_FILE).exists();
    let config = match load(arguments) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("error: {error}");
            return Exit::Usage.code();
        }
    };
    let format = config.log.format.parse().unwrap_or_default();
    raise_descriptors();
    let traces = match init(&config.log.filter, format, &trace_options(&config, role)) {
        Ok(traces) => traces,
        Err(error) => {
            eprintln!("error: {error}");
            return Exit::Usage.code();
        }
    };
    let handlers = match some_of(streamer_examples::all(), &config.execution.local_actions) {
        Ok(handlers) => handlers,
        Err(error) => {
            eprintln!("error: execution.local_actions: {error}");
            return Exit::Usage.code();
        }
    };
    let server = match AllInOne::start(&config, handlers, role, traces.clone()).await {
        Ok(server) => server,
        Err(error) => {
            eprintln!("error: {error}");
            return if error.is_usage() { Exit::Usage.code() } else { Exit::Failed.code() };
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
        "Stopping; running work has {} s. A second signal stops at once.",
        config.server.drain_timeout_ms / 1000
    ));
    let deadline = Instant::now() + Duration::from_millis(config.server.drain_timeout_ms);
    let stop = async {
        server.stop().await;
        let left = deadline.saturating_duration_since(Instant::now());
        traces.flush(left.max(MIN_FLUSH)).await;
    };
    tokio::select! {
        () = stop => {}
        // Work that is cut off continues after a restart, or at other processors.
        () = signals.stop() => {}
    }
    Exit::Done.code()
}

/// Reads the limits of tenants again. An error in the configuration changes nothing.
fn reload(server: &AllInOne, arguments: &UpArguments, had_file: bool) {
    let mut arguments = arguments.clone();
    // A file that has gone since the start is an error, and not a configuration without overrides.
    if had_file && arguments.config.config.is_none() {
        arguments.config.config = Some(DEFAULT_FILE.into());
    }
    match load(&arguments) {
        Ok(config) => {
            server.replace_limits(&config);
            print_to_stderr(&format!(
                "The limits of tenants were read again; {} tenant(s) have limits of their own. Other options \
                 need a restart.",
                config.tenants.len()
            ));
        }
        Err(error) => {
            print_to_stderr(&format!("error: the limits of tenants are not changed: {error}"));
        }
    }
}

/// Prints a line to standard error. It may be closed, which must not end a server.
fn print_to_stderr(text: &str) {
    if let Err(error) = writeln!(io::stderr(), "{text}") {
        tracing::debug!(%error, text, "cannot write to standard error");
    }
}

/// Raises the number of file descriptors that may be open to the most that the system allows.
fn raise_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        eprintln!("The limit of open files could not be raised: {error}");
    }
}

fn trace_options(config: &Config, role: Role) -> TraceOptions {
    let trace = &config.trace;
    TraceOptions {
        endpoint: (!trace.endpoint.is_empty()).then(|| trace.endpoint.clone()),
        sample_ratio: trace.sample_ratio,
        trust_callers: trace.trust_callers,
        service: match role {
            Role::All => "streamer",
            Role::Gateway => "streamer-gateway",
            Role::Router => "streamer-router",
            Role::Processor => "streamer-processor",
            Role::Progress => "streamer-progress",
        },
        version: env!("CARGO_PKG_VERSION"),
    }
}

/// The handlers of these actions; all of them when `*` is named.
pub(crate) fn some_of(all: Handlers, actions: &[String]) -> Result<Handlers, String> {
    if actions.iter().any(|action| action == "*") {
        return Ok(all);
    }
    let names: Vec<_> = all.specs().map(|spec| spec.name.clone()).collect();
    match actions.iter().find(|action| !names.contains(action)) {
        None => Ok(all.only(actions)),
        Some(unknown) => {
            Err(format!("there is no built-in handler {unknown:?}; there are {}", names.join(", ")))
        }
    }
}

pub(crate) fn show_config(arguments: &ConfigArguments) -> ExitCode {
    let config = if arguments.default {
        Ok(Config::default())
    } else {
        Config::load(&sources(&arguments.sources, Vec::new()))
    };
    match config {
        Ok(config) => {
            print!("{}", config.to_toml());
            Exit::Done.code()
        }
        Err(error) => {
            eprintln!("error: {error}");
            Exit::Usage.code()
        }
    }
}

fn load(arguments: &UpArguments) -> Result<Config, ConfigError> {
    let mut flags = Vec::new();
    if let Some(listen) = arguments.listen {
        flags.push(("server.listen".to_owned(), listen.to_string()));
    }
    if let Some(data) = &arguments.data {
        flags.push(("server.data".to_owned(), data.display().to_string()));
    }
    Config::load(&sources(&arguments.config, flags))
}

pub(crate) fn sources(from: &ConfigSources, mut flags: Vec<(String, String)>) -> Sources {
    flags.extend(from.set.iter().map(|setting| match setting.split_once('=') {
        Some((name, value)) => (name.to_owned(), value.to_owned()),
        None => (setting.clone(), String::new()),
    }));
    Sources { file: from.config.clone(), environment: environment(), flags }
}

/// The environment, without what is not text.
pub(crate) fn environment() -> Vec<(String, String)> {
    env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// In one write, so that a reader who leaves after the first line does not end the server.
fn announce(server: &AllInOne, config: &Config, role: Role) {
    let metrics =
        server.metrics_address().map(|address| format!("Metrics: http://{address}/metrics\n"));
    let metrics = metrics.unwrap_or_default();
    if role != Role::All {
        return say(&format!("{READY}http://{} ({role:?})\n{metrics}", server.address()));
    }
    let token = NewToken {
        user: "dev".into(),
        tenant: "dev".into(),
        permissions: vec!["*".into()],
        expires_in: TOKEN_LIFE,
    };
    let token = server.dev_token(&token).map_or_else(String::new, |token| {
        format!(
            "Token: {token}\n       (user dev of tenant dev, everything permitted, for 24 hours)\n"
        )
    });
    let text = format!(
        "{READY}http://{} (gRPC, WebSocket at /ws, HTTP)\nData:  {}\n{metrics}{token}\
         Try:   streamer submit echo_async --payload '{{\"steps\":20,\"delay_ms\":100}}'\n",
        server.address(),
        config.server.data.display(),
    );
    say(&text);
}

fn say(text: &str) {
    let mut out = io::stdout().lock();
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        tracing::warn!(%error, "cannot say on standard output that the server is ready");
    }
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ServerSignal {
    Stop,
    Reload,
}

/// SIGTERM, Ctrl-C and SIGHUP. It listens all the time, so that no second signal is missed.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    /// Which standard streams are terminals: the end of a terminal is a SIGHUP too.
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

    /// Returns once there is one more.
    async fn next(&mut self) -> ServerSignal {
        tokio::select! {
            _ = self.terminate.recv() => ServerSignal::Stop,
            _ = self.interrupt.recv() => ServerSignal::Stop,
            _ = self.hang_up.recv() => {
                // A stream to a terminal that has gone is no terminal.
                if self.terminals == terminals() { ServerSignal::Reload } else { ServerSignal::Stop }
            }
        }
    }

    /// Returns after one more SIGTERM or Ctrl-C. A terminal may send more than one SIGHUP when it ends.
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
