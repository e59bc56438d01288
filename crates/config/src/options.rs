//! All options: type, default, range and description.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use crate::{
    ByteSize, LogFormat, StoreEngine,
    setting::{Setting, check_range},
    tenant_overrides::TenantOverrides,
};

/// Declares the sections and their options, and generates the structs, their defaults, the setters and the
/// text of the committed file.
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
            /// Limits of individual tenants, which override the limits in section `limits`.
            pub tenants: TenantOverrides,
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
                        $(check_range(&value, $low, $high)?;)?
                        self.$section.$option = value;
                        Ok(())
                    })*)*
                    _ => Err("unknown option".into()),
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
                        $(check_range(&value, $low, $high)?;)?
                        self.$section.$option = value;
                        Ok(())
                    })*)*
                    _ => Err("unknown option".into()),
                }
            }

            /// Returns this configuration as a file with a description of every option.
            #[must_use]
            pub fn to_toml(&self) -> String {
                let mut text = String::from(FILE_HEADER);
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

const FILE_HEADER: &str = "# All options of Streamer with their defaults. Copy the options that you \
change; omitted options\n# keep their defaults. Durations have units, such as 500ms, 10s or 1h 30m; sizes \
are numbers of bytes or\n# have units, such as 512KiB or 4MiB. The environment overrides this file \
(STREAMER_<SECTION>_<OPTION>,\n# lists separated by commas), and flags override both (--set \
section.option=value).\n";

options! {
    /// Listener, connection limits and data folder.
    server: Server {
        /// Address and port for gRPC, WebSocket and HTTP. An address other than loopback requires auth.keys or
        /// auth.jwks_url, or auth.allow_dev_key_on_public_address.
        listen: SocketAddr = SocketAddr::from((Ipv4Addr::LOCALHOST, 8080));
        /// Folder for the store and the development key. Created if it does not exist.
        data_dir: PathBuf = PathBuf::from("./streamer-data");
        /// Maximum duration of the drain on shutdown: clients are disconnected, and running attempts may finish.
        drain_timeout: Duration = Duration::from_secs(10), in "0s"..="10m";
        /// Maximum number of concurrent streams per HTTP/2 connection.
        max_concurrent_streams: u64 = 1_024, in 1..=1_000_000;
        /// Maximum number of open TCP connections; 0 means four fifths of the file descriptor limit.
        /// Connections without a valid token may use half of them; at that limit, a new connection replaces the
        /// oldest one.
        max_connections: u64 = 0, in 0..=10_000_000;
        /// Maximum number of open TCP connections per client address (per /64 prefix for IPv6); 0 means nine
        /// tenths of max_connections.
        max_connections_per_address: u64 = 0, in 0..=10_000_000;
        /// Maximum total size of incomplete gRPC messages. Each token may use a quarter of it, and all calls
        /// without a token together may use a sixteenth. The value is raised to at least four times the maximum
        /// message size plus 64 MiB. Applies only to processes with a gateway.
        max_undecoded_bytes: ByteSize = ByteSize::mib(256), in "1MiB"..="2047MiB";
        /// Maximum time to receive the message of a gRPC call. In a client stream, it applies to each message,
        /// from its first byte.
        body_timeout: Duration = Duration::from_secs(30), in "100ms"..="1h";
        /// Separate address and port for /metrics, such as 127.0.0.1:9090; empty means the main address.
        metrics_listen: String = String::new();
        /// Whether /metrics requires a token with permission operator.
        metrics_require_operator: bool = false;
        /// Maximum number of actions with separate series in metrics, among those that are declared for all tenants;
        /// all others are counted as `_other`.
        metrics_max_actions: u64 = 100;
        /// Whether actions that workers declare for single tenants also have separate series, up to the same number. A
        /// tenant chooses the names of its actions, which are visible in /metrics.
        metrics_tenant_actions: bool = false;
    }
    /// Storage of requests and their logs.
    store: Store {
        /// sqlite uses one file in the data folder, for a single process. dynamodb uses the tables of section
        /// dynamodb, for any number of processes.
        engine: StoreEngine = StoreEngine::Sqlite;
    }
    /// Tables of engine dynamodb; `streamer tables create` creates them.
    dynamodb: Dynamodb {
        /// URL of the service, such as http://127.0.0.1:8000; empty means AWS. docs/dynamodb.md lists the sources
        /// of credentials. An endpoint on this machine accepts any credentials.
        endpoint: String = String::new();
        /// AWS region; empty uses AWS_REGION or the AWS configuration. Not required with an endpoint on this
        /// machine.
        region: String = String::new();
        /// Prefix of all table names.
        table_prefix: String = String::from("streamer-");
        /// Number of queue shards; each handles about 500 requests per second. Must be the same in every process.
        /// After a reduction, processors do not find requests in the removed shards.
        queue_shards: u64 = 4, in 1..=64;
        /// Maximum number of concurrent store operations per process, of which calls of clients may use half.
        /// Further operations wait for up to 10 s.
        max_concurrent_operations: u64 = 128, in 1..=10_000;
        /// Time for which requests are kept after they end; 0s keeps them
        /// indefinitely, otherwise at least 1h.
        retention: Duration = Duration::ZERO, in "0s"..="87600h";
        /// Whether the stream of the requests table wakes processors, in addition to hints and polls.
        streams_enabled: bool = true;
        /// URL of an object store for values larger than 64 KiB: s3://bucket/prefix, or file:///folder for a
        /// single machine. If empty, payloads and chunks are limited to 320 KiB.
        object_store_url: String = String::new();
    }
    /// Addresses of the other services when they run in separate processes.
    peers: Peers {
        /// URLs of the gateways, each as http://HOST:PORT. A host name that resolves to several addresses means an
        /// instance at each address.
        gateway: Vec<String> = Vec::new();
        /// URLs of the routers, in the same format.
        router: Vec<String> = Vec::new();
        /// URLs of the processors, in the same format.
        processor: Vec<String> = Vec::new();
        /// URLs of the progress services, in the same format.
        progress: Vec<String> = Vec::new();
        /// ADDRESS:PORT at which other services reach this process; empty means its listening address.
        advertise_address: String = String::new();
        /// File with a secret of at least 32 bytes that all services share; further lines contain secrets that are
        /// also accepted during rotation. Required to listen on an address other than loopback. On loopback, empty
        /// means the file service-token in the data folder, which is created if it does not exist.
        shared_secret_file: String = String::new();
        /// Interval at which host names are resolved again.
        dns_refresh_interval: Duration = Duration::from_secs(5), in "100ms"..="10m";
    }
    /// Accepted tokens. Without keys, tokens that are signed with the development key in the data folder.
    auth: Auth {
        /// Public keys, each as ALGORITHM:FILE, with algorithm RS256, ES256 or EdDSA and a file in PEM format.
        /// HS256:FILE specifies a shared secret of at least 32 bytes.
        keys: Vec<String> = Vec::new();
        /// https:// URL of a JSON Web Key Set (http:// on this machine only). Its RS256, ES256 and EdDSA keys are
        /// accepted and refreshed.
        jwks_url: String = String::new();
        /// Maximum age of fetched keys. Older keys are fetched again, so that revoked keys are rejected.
        jwks_max_age: Duration = Duration::from_secs(600), in "1s"..="24h";
        /// Minimum interval between fetches caused by tokens with an unknown key ID.
        jwks_min_refresh_interval: Duration = Duration::from_secs(10), in "0s"..="1h";
        /// Maximum time for which fetched keys stay valid beyond jwks_max_age while jwks_url cannot be fetched.
        jwks_max_stale: Duration = Duration::from_secs(3600), in "0s"..="168h";
        /// Accepted values of claim iss. Required with keys or jwks_url.
        issuers: Vec<String> = Vec::new();
        /// Accepted values of claim aud. Required with keys or jwks_url.
        audiences: Vec<String> = Vec::new();
        /// Allowed tenants; empty means all.
        tenants: Vec<String> = Vec::new();
        /// Claim that contains the tenant; a.b is claim b in claim a, unless a claim a.b exists.
        tenant_claim: String = String::from("tenant_id");
        /// Claim that lists the permissions, as an array or as one space-separated string (such as scope).
        permissions_claim: String = String::from("permissions");
        /// Maximum size of a token.
        max_token_bytes: ByteSize = ByteSize::kib(8), in "512"..="12KiB";
        /// Allowed clock skew when exp, nbf and iat are checked.
        leeway: Duration = Duration::from_secs(5), in "0s"..="5m";
        /// Accept the development key on an address other than loopback. Anyone who can read the data folder can
        /// then impersonate any user.
        allow_dev_key_on_public_address: bool = false;
    }
    /// Limits on size, rate and storage, in total and per tenant.
    limits: Limits {
        /// Maximum size of a request payload. A result may be 1,024 bytes larger.
        max_payload_bytes: ByteSize = ByteSize::mib(4), in "1KiB"..="64MiB";
        /// Maximum size of an output chunk.
        max_output_chunk_bytes: ByteSize = ByteSize::mib(1), in "1KiB"..="16MiB";
        /// Maximum number of submissions per second per tenant, with bursts of twice that number; 0 means no limit.
        /// Excess submissions are rejected with RATE_LIMITED. Routers share the limit. Options whose names end in
        /// _per_tenant or _per_user can be set for individual tenants in section tenants, and are reloaded on
        /// SIGHUP.
        submissions_per_second_per_tenant: u64 = 20_000, in 0..=1_000_000;
        /// Maximum number of submissions per second per user, with bursts of twice that number; 0 means no limit.
        submissions_per_second_per_user: u64 = 10_000, in 0..=1_000_000;
        /// Maximum number of queued requests per tenant, including requests that are not due yet; 0 means no limit.
        /// DynamoDB counts them with a delay: docs/dynamodb.md, "Limits".
        queued_requests_per_tenant: u64 = 100_000, in 0..=1_000_000_000;
        /// Maximum number of queued requests per user, counted in the same way; 0 means no limit.
        queued_requests_per_user: u64 = 10_000, in 0..=1_000_000_000;
        /// Maximum number of open watches and subscriptions per tenant in each process; 0 means no limit.
        watches_per_tenant: u64 = 50_000, in 0..=1_000_000_000;
        /// Maximum number of open watches and subscriptions per user in each process; 0 means no limit.
        watches_per_user: u64 = 10_000, in 0..=1_000_000_000;
        /// Maximum total size of messages larger than 16 KiB that were sent to gRPC watchers and are unread, in each
        /// process; raised to at least twice the maximum message size. One user gets about half of it, and less
        /// while other users need it; beyond that, watches wait.
        max_unread_watch_bytes: ByteSize = ByteSize::mib(256), in "1MiB"..="2047MiB";
        /// Maximum size of stored payloads, metadata, events and checkpoints per tenant; 0 means no limit. At the
        /// limit, submissions are rejected and running requests continue. Supported only by engine sqlite.
        stored_bytes_per_tenant: ByteSize = ByteSize(0), in "0"..="4194304TiB";
    }
    /// WebSocket connections.
    gateway: Gateway {
        /// Origins whose pages may connect, such as https://app.example.com; empty allows only pages served from
        /// this machine, and * allows all pages.
        allowed_origins: Vec<String> = Vec::new();
        /// Maximum number of connections.
        max_connections: u64 = 50_000, in 1..=10_000_000;
        /// Maximum number of connections per user.
        max_connections_per_user: u64 = 100, in 1..=10_000_000;
        /// Maximum number of connections per client address (per /64 prefix for IPv6).
        max_connections_per_address: u64 = 10_000, in 1..=10_000_000;
        /// Maximum total size of incomplete client messages; raised to at least twice the maximum message size.
        max_buffered_bytes: ByteSize = ByteSize::mib(256), in "1MiB"..="2047MiB";
        /// Maximum total size of the incomplete messages of one user; raised in the same way.
        max_buffered_bytes_per_user: ByteSize = ByteSize::mib(16), in "64KiB"..="2047MiB";
        /// Maximum time to receive a client message, from its first byte.
        message_timeout: Duration = Duration::from_secs(30), in "1s"..="1h";
        /// Maximum number of subscriptions per connection.
        max_subscriptions: u64 = 10_000, in 1..=1_000_000;
        /// Maximum number of pending calls per connection; at the limit, the connection is not read.
        max_in_flight_requests: u64 = 1_024, in 1..=100_000;
        /// Maximum number of messages per second per connection; 0 means no limit. Excess messages are rejected with
        /// RATE_LIMITED.
        rate_limit: u64 = 10_000, in 0..=1_000_000;
        /// Maximum number of messages in a burst above that rate.
        rate_limit_burst: u64 = 20_000, in 1..=1_000_000;
        /// Interval at which silent clients are pinged. Clients are disconnected after twice this interval.
        ping_interval: Duration = Duration::from_secs(25), in "1s"..="10m";
        /// Maximum time for which a socket may accept no data while messages are pending. The connection is then
        /// closed with code 4408.
        slow_consumer_timeout: Duration = Duration::from_secs(30), in "1s"..="10m";
        /// Maximum duration of a handshake.
        handshake_timeout: Duration = Duration::from_secs(10), in "100ms"..="1m";
        /// Time within which clients are asked to reconnect when the gateway drains.
        reconnect_after: Duration = Duration::from_secs(5), in "0s"..="10m";
        /// Whether to log each HTTP request, gRPC call and WebSocket connection, regardless of log.filter. The target
        /// of the lines is streamer::access. Applies only to processes with a gateway.
        access_log: bool = false;
    }
    /// Execution of actions.
    execution: Execution {
        /// Estimated duration below which an action is sync: its result is returned directly and not stored.
        /// Also the timeout of sync actions that do not specify one.
        sync_threshold: Duration = Duration::from_secs(5), in "0s"..="10m";
        /// Maximum number of concurrent async attempts.
        max_concurrent_attempts: u64 = 1_024, in 1..=1_000_000;
        /// Maximum percentage of max_concurrent_attempts, and of the slots of all workers, that one tenant may use.
        /// The remainder stays available to other tenants while one tenant floods the queue.
        max_tenant_share_percent: u64 = 75, in 1..=100;
        /// Waiting time after which the priority of a due request counts as one higher, so that a request of a low
        /// priority starts eventually; 0 means never.
        priority_aging: Duration = Duration::from_secs(60), in "0s"..="1d";
        /// Maximum number of concurrent sync actions.
        max_concurrent_sync: u64 = 4_096, in 1..=1_000_000;
        /// Maximum total size of progress, output, checkpoints and results that are not stored yet, across all
        /// attempts of a processor; raised to at least four times the maximum size of a worker message. At the limit,
        /// handlers and workers wait. One tenant gets about half of it, and less while other tenants need it.
        max_buffered_output_bytes: ByteSize = ByteSize::mib(256), in "1MiB"..="2047MiB";
        /// Built-in actions that this server runs itself; * means all, empty means none. Workers can run the other
        /// actions.
        builtin_actions: Vec<String> = vec!["*".into()];
        /// Lease duration: the time after which other processors recover the attempts of a processor that stops
        /// renewing its leases.
        lease_duration: Duration = Duration::from_secs(10), in "300ms"..="1h";
        /// Whether routers notify processors of new requests.
        push_notifications: bool = true;
        /// Interval at which the store is polled for requests that were not announced, and for attempts whose
        /// processors have failed.
        poll_interval: Duration = Duration::from_secs(1), in "10ms"..="10m";
        /// Whether each poll reads the queue. If false, the queue is read every 30 s, and hints or the stream
        /// announce new requests.
        queue_polling: bool = true;
        /// Maximum time for which a handler may continue after its cancellation is requested.
        cancellation_grace_period: Duration = Duration::from_secs(10), in "0s"..="1h";
    }
    /// Audit log of changes and rejected calls, with their callers: docs/security.md, "The audit log".
    audit: Audit {
        /// File to which each record is appended as a line of JSON; - means standard error, empty means none.
        file: PathBuf = PathBuf::new();
    }
    /// Metrics for CloudWatch, as lines on standard output: docs/operations.md, "CloudWatch".
    cloudwatch: Cloudwatch {
        /// Interval of lines in the embedded metric format, from which CloudWatch Logs creates metrics; 0s means none,
        /// otherwise at least 1s. The alarms of `streamer tables cloudformation` expect 1m.
        interval: Duration = Duration::ZERO, in "0s"..="1h";
        /// Namespace of the metrics.
        namespace: String = String::from("Streamer");
    }
    /// Logs, written to standard error.
    log: Log {
        /// Level (error, warn, info, debug, trace) or directives, such as info,streamer_gateway=debug. STREAMER_LOG
        /// also sets it.
        filter: String = String::from("warn");
        /// Format of log lines: text, or json for one JSON object per line.
        format: LogFormat = LogFormat::Text;
    }
    /// Traces, exported to an OpenTelemetry collector: docs/tracing.md.
    trace: Trace {
        /// URL for OTLP over gRPC, such as http://127.0.0.1:4317; empty disables tracing. OTEL_EXPORTER_OTLP_ENDPOINT
        /// and OTEL_EXPORTER_OTLP_TRACES_ENDPOINT also set it.
        endpoint: String = String::new();
        /// Fraction of requests that are traced. OTEL_TRACES_SAMPLER (always_on, always_off or traceidratio, with or
        /// without parentbased_) and OTEL_TRACES_SAMPLER_ARG also set it.
        sample_ratio: f64 = 1.0, in 0.0..=1.0;
        /// Whether the sampled flag of a client's traceparent decides if a request is traced; otherwise sample_ratio
        /// decides.
        trust_callers: bool = false;
    }
}

impl Auth {
    /// Returns whether tokens are verified with the development key.
    #[must_use]
    pub fn uses_dev_key(&self) -> bool {
        self.keys.is_empty() && self.jwks_url.is_empty()
    }
}
