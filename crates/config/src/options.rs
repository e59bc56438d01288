//! Every option: its type, default, range and meaning.

use std::{
    fmt::Display,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use crate::{setting::Setting, tenants::Tenants};

/// Declares the sections and their options, in one place: struct, default, reading and the text of
/// the committed file all come from here.
macro_rules! options {
    ($(
        #[doc = $section_doc:literal]
        $section:ident: $Section:ident {
            $(
                $(#[doc = $doc:literal])+
                $option:ident: $Type:ty = $default:expr $(, in $low:literal..=$high:literal)?;
            )*
        }
    )*) => {
        $(
            #[doc = $section_doc]
            #[derive(Clone, Debug, PartialEq)]
            pub struct $Section {
                $($(#[doc = $doc])+ pub $option: $Type,)*
            }

            impl Default for $Section {
                fn default() -> Self {
                    Self { $($option: $default,)* }
                }
            }
        )*

        /// All options.
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct Config {
            $(#[doc = $section_doc] pub $section: $Section,)*
            /// Limits of single tenants, in place of those in section `limits`.
            pub tenants: Tenants,
        }

        impl Config {
            pub(crate) fn set_toml(
                &mut self,
                section: &str,
                option: &str,
                value: &toml::Value,
            ) -> Result<(), String> {
                match (section, option) {
                    $($((stringify!($section), stringify!($option)) => {
                        let value = <$Type as Setting>::from_toml(value)?;
                        $(check_range(value, $low, $high)?;)?
                        self.$section.$option = value;
                        Ok(())
                    })*)*
                    _ => Err("there is no such option".into()),
                }
            }

            pub(crate) fn set_text(
                &mut self,
                section: &str,
                option: &str,
                text: &str,
            ) -> Result<(), String> {
                match (section, option) {
                    $($((stringify!($section), stringify!($option)) => {
                        let value = <$Type as Setting>::from_text(text)?;
                        $(check_range(value, $low, $high)?;)?
                        self.$section.$option = value;
                        Ok(())
                    })*)*
                    _ => Err("there is no such option".into()),
                }
            }

            /// This configuration as a file, with what every option means.
            #[must_use]
            pub fn to_toml(&self) -> String {
                let mut text = String::from(FILE_HEAD);
                $(
                    text.push_str(&format!("\n#{}\n[{}]\n", $section_doc, stringify!($section)));
                    $(
                        $(text.push_str(&format!("#{}\n", $doc));)+
                        $(text.push_str(&format!("# Range: {} to {}.\n", $low, $high));)?
                        let value = Setting::to_toml(&self.$section.$option);
                        text.push_str(&format!("{} = {value}\n", stringify!($option)));
                    )*
                )*
                self.tenants.write_toml(&mut text);
                text
            }
        }
    };
}

const FILE_HEAD: &str = "# Every option of Streamer with its default. Copy what you change; what is \
absent keeps its default.\n# The environment overrides this file \
(STREAMER_<SECTION>_<OPTION>, lists separated by commas), flags\n# override both (--set \
section.option=value).\n";

options! {
    /// Where the server listens and keeps its data.
    server: Server {
        /// Address and port for everything: gRPC, WebSocket and HTTP. Beyond loopback only with keys
        /// of your own (section auth), unless allow_dev_key_beyond_loopback says otherwise.
        listen: SocketAddr = SocketAddr::from((Ipv4Addr::LOCALHOST, 8080));
        /// Folder of the store and of the development key; made when it is not there.
        data: PathBuf = PathBuf::from("./streamer-data");
        /// How long stopping may take, in milliseconds: clients are sent away, running work ends.
        drain_timeout_ms: u64 = 10_000, in 0..=600_000;
        /// Largest number of concurrent streams of one HTTP/2 connection.
        max_concurrent_streams: u64 = 1_024, in 1..=1_000_000;
        /// TCP connections in all; 0 means as many as there are file descriptors for, but for a fifth of
        /// them. Those without a valid token get half of them, and make room for each other.
        max_connections: u64 = 0, in 0..=10_000_000;
        /// TCP connections from one address (an IPv6 address counts by its first 64 bits); 0 means nine
        /// tenths of those in all.
        max_connections_per_address: u64 = 0, in 0..=10_000_000;
        /// Bytes of unfinished gRPC messages in all: one token gets a quarter of them, calls without a
        /// token a sixteenth together. Raised to four of the largest messages and 64 MiB. Only
        /// processes with a gateway have this limit.
        max_undecoded_bytes: u64 = 268_435_456, in 1_048_576..=2_147_483_647;
        /// Within this time the message of a gRPC call must come; of a stream of messages, each one from
        /// its first byte. In milliseconds.
        body_timeout_ms: u64 = 30_000, in 100..=3_600_000;
        /// Address and port for /metrics alone, like 127.0.0.1:9090; empty means that it is served with
        /// everything else.
        metrics_listen: String = String::new();
        /// Whether /metrics needs a token with permission operator.
        metrics_need_operator: bool = false;
    }
    /// Where requests and their logs are kept.
    store: Store {
        /// embedded: one file in the data folder, for one process. dynamodb: section dynamodb, for any
        /// number of processes.
        engine: String = String::from("embedded");
    }
    /// The tables of engine dynamodb; `streamer tables create` makes them.
    dynamodb: Dynamodb {
        /// URL of the service, like http://127.0.0.1:8000; empty means AWS itself. Where
        /// credentials come from: docs/dynamodb.md; an endpoint on this machine takes any.
        endpoint: String = String::new();
        /// AWS region; empty means what AWS_REGION or the AWS configuration says, and with an endpoint on
        /// this machine any.
        region: String = String::new();
        /// What the names of all tables begin with.
        table_prefix: String = String::from("streamer-");
        /// Over how many shards the queue is spread: each takes about 500 requests a second. The same
        /// in every process; with fewer than before, what stands in the others is not found.
        queue_shards: u64 = 4, in 1..=64;
        /// How many operations of the store a process has under way at once, half of them for callers;
        /// others wait for their turn, up to 10 s.
        max_concurrent_operations: u64 = 128, in 1..=10_000;
        /// How long requests are kept after they ended, in hours; 0 means for ever.
        retention_hours: u64 = 0, in 0..=87_600;
        /// Whether the stream of the requests table wakes processors, beside hints and polls.
        stream: bool = true;
        /// URL of an object store for values beyond 64 KiB: s3://bucket/prefix, or file:///folder for
        /// one machine. Empty means none; then no payload or chunk may be larger than 320 KiB.
        objects: String = String::new();
    }
    /// Where the other services are, when they are processes of their own.
    peers: Peers {
        /// Gateways, each http://HOST:PORT; a name with several addresses stands for all of them.
        gateway: Vec<String> = Vec::new();
        /// Routers.
        router: Vec<String> = Vec::new();
        /// Processors.
        processor: Vec<String> = Vec::new();
        /// Progress services.
        progress: Vec<String> = Vec::new();
        /// ADDRESS:PORT under which the others reach this process; empty means where it listens.
        advertise: String = String::new();
        /// File with a secret of at least 32 bytes that all services share. More lines hold other
        /// secrets that are accepted while it is being changed. Needed beyond loopback; on loopback,
        /// empty means service-token in the data folder, which is made when it is not there.
        secret_file: String = String::new();
        /// How often names are resolved anew, in milliseconds.
        resolve_interval_ms: u64 = 5_000, in 100..=600_000;
    }
    /// Whose tokens are accepted. Without keys, those of the development key in the data folder.
    auth: Auth {
        /// Public keys as ALGORITHM:FILE, the file in PEM: RS256, ES256 or EdDSA. HS256:FILE names a
        /// shared secret of at least 32 bytes.
        keys: Vec<String> = Vec::new();
        /// https:// URL of a JSON Web Key Set (http:// on this machine only); its RS256, ES256 and EdDSA
        /// keys are accepted and refreshed.
        jwks_url: String = String::new();
        /// How old fetched keys may be before they are fetched anew, so that withdrawn ones go, in
        /// milliseconds.
        jwks_max_age_ms: u64 = 600_000, in 1_000..=86_400_000;
        /// A token with an unknown key id makes us fetch again, but not more often than this, in
        /// milliseconds.
        jwks_min_refresh_ms: u64 = 10_000, in 0..=3_600_000;
        /// How long fetched keys count beyond jwks_max_age_ms while jwks_url cannot be fetched, in
        /// milliseconds.
        jwks_max_outage_ms: u64 = 3_600_000, in 0..=604_800_000;
        /// Accepted values of claim iss. Needed with keys or jwks_url.
        issuers: Vec<String> = Vec::new();
        /// Accepted values of claim aud. Needed with keys or jwks_url.
        audiences: Vec<String> = Vec::new();
        /// Tenants that may call; empty means all.
        tenants: Vec<String> = Vec::new();
        /// Which claim names the tenant; a.b is claim b in claim a, unless there is a claim a.b.
        tenant_claim: String = String::from("tenant_id");
        /// Which claim lists the permissions, as an array, or as one text with spaces between them
        /// (scope).
        permissions_claim: String = String::from("permissions");
        /// Largest token, in bytes.
        max_token_bytes: u64 = 8_192, in 512..=12_288;
        /// How far clocks may differ when exp, nbf and iat are checked, in milliseconds.
        leeway_ms: u64 = 5_000, in 0..=300_000;
        /// Accept the development key on an address that others can reach. Anybody who can read the
        /// data folder can then be anybody.
        allow_dev_key_beyond_loopback: bool = false;
    }
    /// How much may come in and be stored, in all and of each tenant.
    limits: Limits {
        /// Largest payload of a request, in bytes. A result may be 1,024 bytes larger.
        max_payload_bytes: u64 = 4_194_304, in 1_024..=67_108_864;
        /// Largest chunk of output, in bytes.
        max_output_chunk_bytes: u64 = 1_048_576, in 1_024..=16_777_216;
        /// Submissions a second of one tenant, twice as many at once; 0 for no limit. More are refused with
        /// RATE_LIMITED; several routers share it. This and the options below can be set for single tenants, and are read again on
        /// SIGHUP: section tenants.
        submissions_per_second_per_tenant: u64 = 20_000, in 0..=1_000_000;
        /// The same, of one user.
        submissions_per_second_per_user: u64 = 10_000, in 0..=1_000_000;
        /// Requests of one tenant that are queued, also those that are not due yet; 0 for no limit. Over
        /// DynamoDB they are counted with a delay: docs/dynamodb.md, "Limits".
        queued_requests_per_tenant: u64 = 100_000, in 0..=1_000_000_000;
        /// The same, of one user.
        queued_requests_per_user: u64 = 10_000, in 0..=1_000_000_000;
        /// Open watches and subscriptions of one tenant at one process; 0 for no limit.
        watches_per_tenant: u64 = 50_000, in 0..=1_000_000_000;
        /// The same, of one user.
        watches_per_user: u64 = 10_000, in 0..=1_000_000_000;
        /// Bytes of messages beyond 16 KiB that watchers over gRPC have been sent and have not read, at each
        /// process; raised to two of the largest. A user gets about half of it, and less while others use it
        /// too; watches wait beyond that.
        max_unread_watch_bytes: u64 = 268_435_456, in 1_048_576..=2_147_483_647;
        /// Bytes of payloads, metadata, events and checkpoints of one tenant's requests, beyond which it
        /// cannot submit; running requests go on. 0 for no limit. Only with engine embedded.
        stored_bytes_per_tenant: u64 = 0, in 0..=9_000_000_000_000_000_000_u64;
    }
    /// WebSocket connections.
    gateway: Gateway {
        /// Origins whose pages may connect, like https://app.example.com; empty means pages served
        /// from this machine only, * means all.
        allowed_origins: Vec<String> = Vec::new();
        /// Connections in all.
        max_connections: u64 = 50_000, in 1..=10_000_000;
        /// Connections of one user.
        max_connections_per_user: u64 = 100, in 1..=10_000_000;
        /// Connections from one address; an IPv6 address counts by its first 64 bits.
        max_connections_per_address: u64 = 10_000, in 1..=10_000_000;
        /// Bytes of unfinished messages of clients in all; raised to two of the largest messages.
        max_buffered_bytes: u64 = 268_435_456, in 1_048_576..=2_147_483_647;
        /// The same, of one user.
        max_buffered_bytes_per_user: u64 = 16_777_216, in 65_536..=2_147_483_647;
        /// How long a message of a client may take to come, once it has begun, in milliseconds.
        message_timeout_ms: u64 = 30_000, in 1_000..=3_600_000;
        /// Subscriptions of one connection.
        max_subscriptions: u64 = 10_000, in 1..=1_000_000;
        /// Unanswered calls of one connection; beyond that it is not read from until some are.
        max_in_flight: u64 = 1_024, in 1..=100_000;
        /// Messages a second from one connection, 0 for no limit; more are refused with RATE_LIMITED.
        messages_per_second: u64 = 10_000, in 0..=1_000_000;
        /// Messages at once beyond that rate.
        message_burst: u64 = 20_000, in 1..=1_000_000;
        /// A quiet client is pinged so often, in milliseconds, and dropped after twice that.
        heartbeat_ms: u64 = 25_000, in 1_000..=600_000;
        /// A socket that takes nothing for so long though something waits is closed with 4408, in
        /// milliseconds.
        slow_consumer_timeout_ms: u64 = 30_000, in 1_000..=600_000;
        /// How long a handshake may take, in milliseconds.
        handshake_timeout_ms: u64 = 10_000, in 100..=60_000;
        /// Clients are told to come back within this after a drain, in milliseconds.
        reconnect_after_ms: u64 = 5_000, in 0..=600_000;
    }
    /// Running actions.
    execution: Execution {
        /// Actions estimated faster than this are sync: answered at once and not stored, in
        /// milliseconds. It also bounds a sync action that sets no limit of its own.
        sync_threshold_ms: u64 = 5_000, in 0..=600_000;
        /// Async attempts that run at once.
        max_concurrent_attempts: u64 = 1_024, in 1..=1_000_000;
        /// Percent of those, and of the slots of all workers, that one tenant gets at most: the rest
        /// is there for whoever comes while one tenant floods.
        tenant_share_percent: u64 = 75, in 1..=100;
        /// Sync actions that run at once.
        max_concurrent_sync: u64 = 4_096, in 1..=1_000_000;
        /// Bytes of progress, output, checkpoints and results that are not stored yet, over all
        /// attempts of a processor; at least four times the largest message of a worker. Handlers and
        /// workers wait beyond that. A tenant gets about half of it, and less while others use it too.
        max_buffered_output_bytes: u64 = 268_435_456, in 1_048_576..=2_147_483_647;
        /// Those of the built-in handlers that this server runs itself, by action; * for all,
        /// empty for none. The others can be run by workers.
        local_actions: Vec<String> = vec!["*".into()];
        /// How long a processor that fell silent keeps its attempts, in milliseconds.
        lease_ms: u64 = 10_000, in 300..=3_600_000;
        /// Whether routers tell processors of new requests.
        hints: bool = true;
        /// How often the store is asked for work that nobody told of, and for attempts whose
        /// processors are gone, in milliseconds.
        poll_interval_ms: u64 = 1_000, in 10..=600_000;
        /// Whether it is asked for such work at each of them: without, every 30 s, and otherwise it is
        /// told of by hints or the stream.
        poll_queue: bool = true;
        /// How long a handler may go on after cancellation was asked for, in milliseconds.
        cancel_grace_ms: u64 = 10_000, in 0..=3_600_000;
    }
    /// Which callers changed what, and which calls were refused: docs/security.md, "The audit log".
    audit: Audit {
        /// File that gets a line of JSON for each; - for standard error, empty for none.
        file: PathBuf = PathBuf::new();
    }
    /// Logs, on standard error.
    log: Log {
        /// A level (error, warn, info, debug, trace) or directives like info,streamer_gateway=debug.
        /// STREAMER_LOG sets it too.
        filter: String = String::from("warn");
        /// text for people, json for machines.
        format: String = String::from("text");
    }
    /// Traces, sent to an OpenTelemetry collector. See docs/tracing.md.
    trace: Trace {
        /// OTLP over gRPC, like http://127.0.0.1:4317; empty for no traces. OTEL_EXPORTER_OTLP_ENDPOINT
        /// and OTEL_EXPORTER_OTLP_TRACES_ENDPOINT set it too.
        endpoint: String = String::new();
        /// Part of the requests that are traced. OTEL_TRACES_SAMPLER (always_on, always_off or
        /// traceidratio, also with parentbased_) and OTEL_TRACES_SAMPLER_ARG set it too.
        sample_ratio: f64 = 1.0, in 0.0..=1.0;
        /// Whether clients decide with the sampled flag of their traceparent; otherwise it is decided
        /// here by sample_ratio.
        trust_callers: bool = false;
    }
}

fn check_range<T: PartialOrd + Display + Copy>(value: T, low: T, high: T) -> Result<(), String> {
    if (low..=high).contains(&value) {
        Ok(())
    } else {
        Err(format!("must be {low} to {high}, is {value}"))
    }
}

impl Auth {
    /// Whether the development key is what tokens are signed with.
    #[must_use]
    pub fn uses_dev_key(&self) -> bool {
        self.keys.is_empty() && self.jwks_url.is_empty()
    }
}

impl Gateway {
    pub(crate) fn check(&self, problems: &mut Vec<String>) {
        for origin in self.allowed_origins.iter().filter(|origin| *origin != "*") {
            let host = origin.split_once("://").map(|(_, host)| host).unwrap_or_default();
            let is_lower_case = !origin.chars().any(|letter| letter.is_ascii_uppercase());
            let has_default_port = (origin.starts_with("https://") && origin.ends_with(":443"))
                || (origin.starts_with("http://") && origin.ends_with(":80"));
            if host.is_empty()
                || host.contains(['/', '?', '#', '@', '*'])
                || !is_lower_case
                || has_default_port
            {
                problems.push(format!(
                    "gateway.allowed_origins: {origin:?} is not an origin in the form that browsers send, \
                     like https://app.example.com or http://localhost:3000, and would never match"
                ));
            }
        }
    }
}

impl Trace {
    pub(crate) fn check(&self, problems: &mut Vec<String>) {
        let endpoint = &self.endpoint;
        if !endpoint.is_empty() && !endpoint.starts_with("http://") {
            problems.push(format!(
                "trace.endpoint: must begin with http:// (a collector nearby can send on with TLS), is \
                 {endpoint:?}"
            ));
        }
    }
}

impl Config {
    fn check_peers(&self, problems: &mut Vec<String>) {
        let peers = &self.peers;
        for (service, entries) in [
            ("gateway", &peers.gateway),
            ("router", &peers.router),
            ("processor", &peers.processor),
            ("progress", &peers.progress),
        ] {
            for entry in entries {
                let address = entry.strip_prefix("http://").unwrap_or_default();
                let port = address.rsplit_once(':').map(|(_, port)| port.parse::<u16>().is_ok());
                if port != Some(true) {
                    problems.push(format!("peers.{service}: {entry:?} must be http://HOST:PORT"));
                }
            }
        }
        for (option, address) in [
            ("peers.advertise", &peers.advertise),
            ("server.metrics_listen", &self.server.metrics_listen),
        ] {
            if !address.is_empty() && address.parse::<SocketAddr>().is_err() {
                problems.push(format!("{option}: {address:?} must be ADDRESS:PORT"));
            }
        }
    }

    fn check_dynamodb(&self, problems: &mut Vec<String>) {
        let endpoint = &self.dynamodb.endpoint;
        let has_scheme = ["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme));
        if !endpoint.is_empty() && !has_scheme {
            problems.push(format!(
                "dynamodb.endpoint: must begin with http:// or https://, is {endpoint:?}"
            ));
        }
        let prefix = &self.dynamodb.table_prefix;
        let is_part = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        if prefix.len() > 200 || !prefix.chars().all(is_part) {
            problems.push(format!(
                "dynamodb.table_prefix: must be at most 200 letters, digits, _, . and -, is {prefix:?}"
            ));
        }
    }

    fn check_stored_bytes(&self, problems: &mut Vec<String>) {
        let option = "stored_bytes_per_tenant";
        if self.store.engine != "dynamodb" {
            return;
        }
        let common = ("limits".to_owned(), self.limits.stored_bytes_per_tenant);
        let of_tenants = self.tenants.values(option);
        let of_tenants = of_tenants.map(|(tenant, bytes)| (format!("tenants.{tenant}"), bytes));
        for (section, bytes) in std::iter::once(common).chain(of_tenants) {
            if bytes > 0 {
                problems
                    .push(format!("{section}.{option}: is counted by store.engine embedded only"));
            }
        }
    }

    /// Rules of more than one option, and of what a value looks like.
    pub(crate) fn check_together(&self, problems: &mut Vec<String>) {
        let auth = &self.auth;
        if auth.uses_dev_key() {
            let loopback = self.server.listen.ip().is_loopback();
            if !loopback && !auth.allow_dev_key_beyond_loopback {
                problems.push(format!(
                    "server.listen: {} can be reached by others, and the development key is for \
                     this machine; set auth.keys or auth.jwks_url (or, knowingly, \
                     auth.allow_dev_key_beyond_loopback)",
                    self.server.listen
                ));
            }
        } else {
            for (name, list) in [("issuers", &auth.issuers), ("audiences", &auth.audiences)] {
                if list.is_empty() {
                    problems
                        .push(format!("auth.{name}: is required with auth.keys or auth.jwks_url"));
                }
            }
        }
        for key in &auth.keys {
            if !key.contains(':') {
                problems.push(format!("auth.keys: {key:?} must be ALGORITHM:FILE"));
            }
        }
        if auth.jwks_min_refresh_ms > auth.jwks_max_age_ms {
            problems.push(format!(
                "auth.jwks_min_refresh_ms: must be at most auth.jwks_max_age_ms, is {} of {}",
                auth.jwks_min_refresh_ms, auth.jwks_max_age_ms
            ));
        }
        if !matches!(self.store.engine.as_str(), "embedded" | "dynamodb") {
            let engine = &self.store.engine;
            problems.push(format!("store.engine: must be embedded or dynamodb, is {engine:?}"));
        }
        self.check_dynamodb(problems);
        self.check_stored_bytes(problems);
        self.trace.check(problems);
        self.gateway.check(problems);
        self.check_peers(problems);
        if !matches!(self.log.format.as_str(), "text" | "json") {
            problems.push(format!("log.format: must be text or json, is {:?}", self.log.format));
        }
    }
}
