use super::*;

fn load(environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let owned = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    // A file that holds nothing, so that one in the working folder does not matter.
    let file = Some(PathBuf::from("/dev/null"));
    Config::load(&Sources { file, environment: owned(environment), flags: owned(flags) })
}

#[test]
fn flags_win_over_the_environment_and_that_over_defaults() {
    let environment = [
        ("STREAMER_GATEWAY_MAX_CONNECTIONS", "7"),
        ("STREAMER_LIMITS_MAX_PAYLOAD_BYTES", "2048"),
        ("STREAMER_LOG", "debug"),
        ("STREAMER_TOKEN", "not an option"),
        ("PATH", "/bin"),
    ];
    let config = load(&environment, &[("gateway.max_connections", "8")]).unwrap();
    assert_eq!(config.gateway.max_connections, 8);
    assert_eq!(config.limits.max_payload_bytes, 2048);
    assert_eq!(config.log.filter, "debug");
    assert_eq!(config.execution, Execution::default());
}

#[test]
fn all_bad_values_are_reported_together() {
    let environment = [
        ("STREAMER_GATEWAY_MAX_CONNECTIONS", "many"),
        ("STREAMER_GATEWAY_NOPE", "1"),
        ("STREAMER_SERVER_LISTEN", "0.0.0.0:80"),
    ];
    let flags = [("execution.lease_ms", "1"), ("log.format", "xml"), ("nonsense", "1")];
    let told = load(&environment, &flags).unwrap_err().to_string();
    for part in [
        "6 error(s)",
        "STREAMER_GATEWAY_MAX_CONNECTIONS: must be a whole number",
        "STREAMER_GATEWAY_NOPE: there is no such option",
        "server.listen: 0.0.0.0:80 can be reached by others",
        "execution.lease_ms: must be 300 to 3600000, is 1",
        "log.format: must be text or json",
        "nonsense: must be section.option=value",
    ] {
        assert!(told.contains(part), "{part} is missing in {told}");
    }
}

#[test]
fn keys_need_issuer_and_audience() {
    let told = load(&[("STREAMER_AUTH_KEYS", "RS256:/k.pem")], &[]).unwrap_err().to_string();
    assert!(
        told.contains("auth.issuers: is required") && told.contains("auth.audiences"),
        "{told}"
    );
}

#[test]
fn the_committed_file_is_the_default() {
    let committed = concat!(env!("CARGO_MANIFEST_DIR"), "/streamer.toml");
    let default = Config::default();
    assert_eq!(
        fs::read_to_string(committed).unwrap(),
        default.to_toml(),
        "write it anew with `streamer config --default > crates/config/streamer.toml`"
    );
    let read = Config::load(&Sources { file: Some(committed.into()), ..Sources::default() });
    assert_eq!(read.unwrap(), default);
}

#[test]
fn a_missing_file_is_an_error_only_when_it_was_named() {
    let named = Sources { file: Some("/nowhere/streamer.toml".into()), ..Sources::default() };
    assert!(Config::load(&named).unwrap_err().to_string().contains("/nowhere/streamer.toml"));
}
