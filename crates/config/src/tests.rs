use super::*;

fn load(environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let owned = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    // An empty file prevents a file in the working folder from being read.
    let file = Some(PathBuf::from("/dev/null"));
    Config::load(&Sources { file, environment: owned(environment), flags: owned(flags) })
}

#[test]
fn flags_override_the_environment_which_overrides_defaults() {
    let environment = [
        ("STREAMER_GATEWAY_MAX_CONNECTIONS", "7"),
        ("STREAMER_LIMITS_MAX_PAYLOAD_BYTES", "2048"),
        ("STREAMER_LOG", "debug"),
        ("STREAMER_TOKEN_FILE", "not an option"),
        ("PATH", "/bin"),
    ];
    let config = load(&environment, &[("gateway.max_connections", "8")]).unwrap();
    assert_eq!(config.gateway.max_connections, 8);
    assert_eq!(config.limits.max_payload_bytes, ByteSize(2048));
    assert_eq!(config.log.filter, "debug");
    assert_eq!(config.execution, Execution::default());
}

#[test]
fn all_invalid_values_are_reported_together() {
    let environment = [
        ("STREAMER_GATEWAY_MAX_CONNECTIONS", "many"),
        ("STREAMER_GATEWAY_NOPE", "1"),
        ("STREAMER_SERVER_LISTEN", "0.0.0.0:80"),
    ];
    let flags = [("execution.lease_duration", "1ms"), ("log.format", "xml"), ("nonsense", "1")];
    let error = load(&environment, &flags).unwrap_err().to_string();
    for part in [
        "6 error(s)",
        "STREAMER_GATEWAY_MAX_CONNECTIONS: must be a non-negative integer",
        "STREAMER_GATEWAY_NOPE: unknown option",
        "server.listen: 0.0.0.0:80 is not a loopback address",
        "execution.lease_duration: must be 300ms to 1h, is 1ms",
        "log.format: must be text or json",
        "nonsense: must be section.option=value",
    ] {
        assert!(error.contains(part), "{part} is missing in {error}");
    }
}

#[test]
fn keys_require_issuers_and_audiences() {
    let error = load(&[("STREAMER_AUTH_KEYS", "RS256:/k.pem")], &[]).unwrap_err().to_string();
    assert!(
        error.contains("auth.issuers: is required") && error.contains("auth.audiences"),
        "{error}"
    );
}

#[test]
fn invalid_origins_and_addresses_are_rejected() {
    for origin in ["https://app.example.com", "http://localhost:3000", "https://a.example:80", "*"]
    {
        assert!(load(&[], &[("gateway.allowed_origins", origin)]).is_ok(), "{origin}");
    }
    for origin in ["app.example.com", "https://App.example", "https://a.example/", "https://a:443"]
    {
        let error = load(&[], &[("gateway.allowed_origins", origin)]).unwrap_err().to_string();
        assert!(error.contains("gateway.allowed_origins") && error.contains(origin), "{error}");
    }
    assert!(load(&[], &[("server.metrics_listen", "127.0.0.1:9090")]).is_ok());
    let error = load(&[], &[("server.metrics_listen", "9090")]).unwrap_err().to_string();
    assert!(error.contains("server.metrics_listen: \"9090\" must be ADDRESS:PORT"), "{error}");
}

fn load_file(text: &str) -> Result<Config, ConfigError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    Config::load(&Sources { file: Some(file.path().to_owned()), ..Sources::default() })
}

#[test]
fn tenants_override_limits() {
    let text = "[limits]\nwatches_per_user = 5\n[tenants.acme]\nqueued_requests_per_user = 7\n\
                stored_bytes_per_tenant = \"1GiB\"\n[tenants.\"a b.c\"]\nwatches_per_user = 0\n";
    let config = load_file(text).unwrap();
    let limits: Vec<_> = config.tenants.limits(&config.limits).collect();
    let common = config.limits.clone();
    assert_eq!(limits[0], ("a b.c", Limits { watches_per_user: 0, ..common.clone() }));
    let (queued_requests_per_user, stored_bytes_per_tenant) = (7, ByteSize::mib(1024));
    let acme = Limits { queued_requests_per_user, stored_bytes_per_tenant, ..common };
    assert_eq!(limits[1], ("acme", acme));
    assert_eq!(load_file(&config.to_toml()).unwrap(), config);
}

#[test]
fn tenants_override_only_tenant_and_user_limits() {
    let text = "[tenants]\nx = 1\n[tenants.acme]\nmax_payload_bytes = 1024\nnope_per_user = 1\n\
                watches_per_user = -1\nqueued_requests_per_user = 1000000001\n";
    let error = load_file(text).unwrap_err().to_string();
    for part in [
        "5 error(s)",
        "tenants.x: must be a section, [tenants.\"NAME\"]",
        "tenants.acme.max_payload_bytes: cannot be set for a tenant",
        "tenants.acme.nope_per_user: unknown option",
        "tenants.acme.watches_per_user: must not be negative",
        "tenants.acme.queued_requests_per_user: must be 0 to 1000000000, is 1000000001",
    ] {
        assert!(error.contains(part), "{part} is missing in {error}");
    }
    let text = "[store]\nengine = \"dynamodb\"\n[tenants.acme]\nstored_bytes_per_tenant = 1\n";
    let error = load_file(text).unwrap_err().to_string();
    assert!(error.contains("tenants.acme.stored_bytes_per_tenant: requires"), "{error}");
}

#[test]
fn the_committed_file_holds_the_defaults() {
    let committed = concat!(env!("CARGO_MANIFEST_DIR"), "/streamer.toml");
    let default = Config::default();
    assert_eq!(
        fs::read_to_string(committed).unwrap(),
        default.to_toml(),
        "regenerate it with `streamer config --default > crates/config/streamer.toml`"
    );
    let read = Config::load(&Sources { file: Some(committed.into()), ..Sources::default() });
    assert_eq!(read.unwrap(), default);
}

#[test]
fn a_missing_file_is_an_error_if_it_was_named() {
    let named = Sources { file: Some("/nowhere/streamer.toml".into()), ..Sources::default() };
    assert!(Config::load(&named).unwrap_err().to_string().contains("/nowhere/streamer.toml"));
}

#[test]
fn standard_opentelemetry_variables_set_trace_options() {
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317"),
        ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
        ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
    ];
    let trace = load(&environment, &[]).unwrap().trace;
    let endpoint = "http://collector:4317".to_owned();
    assert_eq!(trace, Trace { endpoint, sample_ratio: 0.25, trust_callers: false });
    let streamer = [("STREAMER_TRACE_ENDPOINT", "http://other:4317")];
    let trace = load(&[&environment[..], &streamer].concat(), &[]).unwrap().trace;
    assert_eq!(trace.endpoint, "http://other:4317");
    let off = [("OTEL_SDK_DISABLED", "true")];
    assert_eq!(load(&[&environment[..], &off].concat(), &[]).unwrap().trace.endpoint, "");

    let wrong = [
        ("OTEL_TRACES_SAMPLER", "traceidratio"),
        ("OTEL_TRACES_SAMPLER_ARG", "2"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector:4317"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
    ];
    let error = load(&wrong, &[]).unwrap_err().to_string();
    assert!(error.contains("OTEL_TRACES_SAMPLER_ARG: must be 0 to 1, is 2"), "{error}");
    assert!(error.contains("trace.endpoint: must begin with http://"), "{error}");
    assert!(error.contains("OTEL_EXPORTER_OTLP_PROTOCOL: must be grpc"), "{error}");
    let unknown = load(&[("OTEL_TRACES_SAMPLER", "jaeger_remote")], &[]).unwrap_err().to_string();
    assert!(unknown.contains("OTEL_TRACES_SAMPLER: must be always_on"), "{unknown}");
}
