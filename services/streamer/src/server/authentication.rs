//! Builds the authenticator and the audit log from the configuration.

use std::sync::Arc;

use streamer_auth::{
    Audit, Authenticator, DEV_AUDIENCE, DEV_ISSUER, DevKey, JwksRefresh, JwksSource, TokenRules,
    VerificationKey,
};
use streamer_config::Config;
use streamer_core::Clock;
use streamer_telemetry::Metrics;

use crate::server::{error::StartError, service_options::size};

/// Opens the audit log as configured in the section `audit`.
pub(crate) fn audit(
    config: &Config,
    clock: &Arc<dyn Clock>,
    metrics: &Metrics,
) -> Result<Audit, StartError> {
    let dropped = metrics.counter(
        "streamer_audit_dropped",
        "Audit records dropped because the log could not be written fast enough",
    );
    let path = config.audit.file.as_path();
    let on_dropped = move || {
        dropped.inc();
    };
    let opened = Audit::open(path, clock.clone(), on_dropped);
    opened.map_err(|error| StartError::Audit(path.to_owned(), error))
}

/// Returns the authenticator, and the development key if the server uses it.
pub(crate) fn authenticator(
    config: &Config,
    clock: Arc<dyn Clock>,
) -> Result<(Arc<Authenticator>, Option<DevKey>), StartError> {
    let auth = &config.auth;
    let leeway = auth.leeway;
    if auth.uses_dev_key() {
        let dev_key =
            DevKey::load_or_create(&config.server.data_dir).map_err(StartError::DevKey)?;
        let key = dev_key.verification_key().map_err(StartError::Key)?;
        let rules = TokenRules {
            issuers: vec![DEV_ISSUER.to_owned()],
            audiences: vec![DEV_AUDIENCE.to_owned()],
            tenants: auth.tenants.clone(),
            leeway,
            max_token_bytes: size(auth.max_token_bytes.0),
            ..TokenRules::default()
        };
        let authenticator = Authenticator::new(vec![key], None, rules, clock);
        return Ok((Arc::new(authenticator), Some(dev_key)));
    }
    let mut keys = Vec::new();
    for key in &auth.keys {
        let (algorithm, file) = key.split_once(':').unwrap_or((key, ""));
        let key = VerificationKey::from_file(algorithm, file.as_ref()).map_err(StartError::Key)?;
        keys.push(key);
    }
    let jwks = match auth.jwks_url.as_str() {
        "" => None,
        url => {
            let refresh = JwksRefresh {
                max_age: auth.jwks_max_age,
                min_interval: auth.jwks_min_refresh_interval,
                max_outage: auth.jwks_max_stale,
            };
            Some(JwksSource::new(url, refresh).map_err(StartError::Key)?)
        }
    };
    let rules = TokenRules {
        issuers: auth.issuers.clone(),
        audiences: auth.audiences.clone(),
        tenants: auth.tenants.clone(),
        tenant_claim: auth.tenant_claim.clone(),
        permissions_claim: auth.permissions_claim.clone(),
        leeway,
        max_token_bytes: size(auth.max_token_bytes.0),
    };
    Ok((Arc::new(Authenticator::new(keys, jwks, rules, clock)), None))
}
