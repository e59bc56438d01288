//! Rules that the macro of the options cannot express: formats, and rules that involve several options.

use std::{net::SocketAddr, time::Duration};

use crate::{Cloudwatch, Config, Gateway, StoreEngine, Trace};

/// Minimum retention: a smaller one is probably a typing error, like `6m` for six months.
const MIN_RETENTION: Duration = Duration::from_secs(3600);
/// Minimum interval of metrics for CloudWatch.
const MIN_METRICS_INTERVAL: Duration = Duration::from_secs(1);

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
                    "gateway.allowed_origins: {origin:?} never matches, since browsers send origins like \
                     https://app.example.com or http://localhost:3000"
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
                "trace.endpoint: must begin with http:// (use a local collector to forward over TLS), is \
                 {endpoint:?}"
            ));
        }
    }
}

impl Cloudwatch {
    pub(crate) fn check(&self, problems: &mut Vec<String>) {
        let interval = self.interval;
        if !interval.is_zero() && interval < MIN_METRICS_INTERVAL {
            problems.push(format!(
                "cloudwatch.interval: must be 0s or at least 1s, is {}",
                humantime::format_duration(interval)
            ));
        }
        // The characters that CloudWatch allows.
        let is_allowed = |letter: char| letter.is_ascii_alphanumeric() || "_.#/-".contains(letter);
        let namespace = &self.namespace;
        if namespace.is_empty() || namespace.len() > 255 || !namespace.chars().all(is_allowed) {
            problems.push(format!(
                "cloudwatch.namespace: must have 1 to 255 letters, digits or _.#/-, is {namespace:?}"
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
            ("peers.advertise_address", &peers.advertise_address),
            ("server.metrics_listen", &self.server.metrics_listen),
        ] {
            if !address.is_empty() && address.parse::<SocketAddr>().is_err() {
                problems.push(format!("{option}: {address:?} must be ADDRESS:PORT"));
            }
        }
    }

    fn check_dynamodb(&self, problems: &mut Vec<String>) {
        let retention = self.dynamodb.retention;
        if !retention.is_zero() && retention < MIN_RETENTION {
            problems.push(format!(
                "dynamodb.retention: must be 0s or at least 1h, is {}",
                humantime::format_duration(retention)
            ));
        }
        let endpoint = &self.dynamodb.endpoint;
        let has_scheme = ["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme));
        if !endpoint.is_empty() && !has_scheme {
            problems.push(format!(
                "dynamodb.endpoint: must begin with http:// or https://, is {endpoint:?}"
            ));
        }
        let prefix = &self.dynamodb.table_prefix;
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        if prefix.len() > 200 || !prefix.chars().all(is_allowed) {
            problems.push(format!(
                "dynamodb.table_prefix: must be at most 200 letters, digits, _, . and -, is {prefix:?}"
            ));
        }
    }

    fn check_stored_bytes(&self, problems: &mut Vec<String>) {
        let option = "stored_bytes_per_tenant";
        if self.store.engine != StoreEngine::Dynamodb {
            return;
        }
        let common = ("limits".to_owned(), self.limits.stored_bytes_per_tenant.0);
        let overrides = self.tenants.values(option);
        let overrides = overrides.map(|(tenant, bytes)| (format!("tenants.{tenant}"), bytes));
        for (section, bytes) in std::iter::once(common).chain(overrides) {
            if bytes > 0 {
                problems.push(format!("{section}.{option}: requires store.engine sqlite"));
            }
        }
    }

    /// Checks the formats of values and the rules that involve several options.
    pub(crate) fn validate(&self, problems: &mut Vec<String>) {
        let auth = &self.auth;
        if auth.uses_dev_key() {
            let loopback = self.server.listen.ip().is_loopback();
            if !loopback && !auth.allow_dev_key_on_public_address {
                problems.push(format!(
                    "server.listen: {} is not a loopback address, and the development key is for \
                     local use only; set auth.keys or auth.jwks_url (or override with \
                     auth.allow_dev_key_on_public_address)",
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
        if auth.jwks_min_refresh_interval > auth.jwks_max_age {
            problems.push(format!(
                "auth.jwks_min_refresh_interval: must be at most auth.jwks_max_age ({}), is {}",
                humantime::format_duration(auth.jwks_max_age),
                humantime::format_duration(auth.jwks_min_refresh_interval)
            ));
        }
        self.check_dynamodb(problems);
        self.check_stored_bytes(problems);
        self.trace.check(problems);
        self.gateway.check(problems);
        self.cloudwatch.check(problems);
        self.check_peers(problems);
    }
}
