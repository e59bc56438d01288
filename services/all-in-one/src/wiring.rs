//! From a configuration to services that know each other.

use std::{sync::Arc, time::Duration};

use streamer_auth::{
    AuthLayer, Authenticator, DEV_AUDIENCE, DEV_ISSUER, DevKey, JwksRefresh, JwksSource,
    TokenRules, VerificationKey,
};
use streamer_config::Config;
use streamer_core::{Clock, Limits};
use streamer_gateway::{GatewayOptions, GatewayServer};
use streamer_handler::Handlers;
use streamer_processor::{Processor, ProcessorOptions};
use streamer_progress::Progress;
use streamer_router::Router;
use streamer_rpc::local;
use streamer_store::{Engine, Store};
use streamer_telemetry::Metrics;
use tokio::task::JoinHandle;

use crate::{Shutdown, StartError, http::Health};

pub(crate) struct Services {
    pub(crate) router: Router,
    pub(crate) processor: Processor,
    pub(crate) progress: Progress,
    pub(crate) gateway: GatewayServer,
    pub(crate) health: Health,
    pub(crate) metrics: Metrics,
    pub(crate) max_message_bytes: usize,
}

impl Services {
    pub(crate) fn build(
        config: &Config,
        handlers: Handlers,
        clock: Arc<dyn Clock>,
    ) -> Result<(Self, Option<DevKey>), StartError> {
        let engine = Engine::Embedded { data: config.server.data.clone() };
        let store = streamer_store::open(&engine).map_err(StartError::Store)?;
        let (authenticator, dev_key) = authenticator(config, clock.clone())?;
        let auth = AuthLayer::new(authenticator.clone());
        let metrics = Metrics::new();
        let limits = limits(config);

        let progress = Progress::build(streamer_progress::Dependencies {
            store: store.clone(),
            clock: clock.clone(),
            auth: auth.clone(),
            metrics: metrics.clone(),
            limits,
        });
        let processor = Processor::build(streamer_processor::Dependencies {
            store: store.clone(),
            clock: clock.clone(),
            authenticator: authenticator.clone(),
            handlers,
            progress: local(progress.internal.clone()),
            metrics: metrics.clone(),
            options: processor_options(config),
        });
        let router = Router::build(streamer_router::Dependencies {
            store: store.clone(),
            clock: clock.clone(),
            auth,
            processor: local(processor.internal.clone()),
            event_log: local(progress.internal.clone()),
            progress: local(progress.public.clone()),
            metrics: metrics.clone(),
            limits,
        });
        let gateway = GatewayServer::build(streamer_gateway::Dependencies {
            store: store.clone(),
            clock,
            authenticator,
            router: local(router.public.clone()),
            progress: local(progress.public.clone()),
            metrics: metrics.clone(),
            options: gateway_options(config),
        });
        let health = Health::new(store as Arc<dyn Store>);
        let max_message_bytes = limits.max_message_bytes();
        let services =
            Self { router, processor, progress, gateway, health, metrics, max_message_bytes };
        Ok((services, dev_key))
    }

    /// Starts what runs beside the calls.
    pub(crate) fn spawn(self: Arc<Self>, shutdown: &Shutdown) -> Vec<JoinHandle<()>> {
        let (working, serving) = (&shutdown.working, &shutdown.serving);
        let services = self.clone();
        let stop = working.clone();
        let processor = tokio::spawn(async move { services.processor.run(stop).await });
        let services = self.clone();
        let stop = serving.clone();
        let router = tokio::spawn(async move { services.router.run(stop).await });
        let services = self.clone();
        let stop = serving.clone();
        let progress = tokio::spawn(async move { services.progress.run(stop).await });
        let services = self.clone();
        let stop = serving.clone();
        let gateway = tokio::spawn(async move { services.gateway.run(stop).await });
        let stop = serving.clone();
        let health = tokio::spawn(async move { self.health.watch(stop).await });
        vec![processor, router, progress, gateway, health]
    }
}

fn authenticator(
    config: &Config,
    clock: Arc<dyn Clock>,
) -> Result<(Arc<Authenticator>, Option<DevKey>), StartError> {
    let auth = &config.auth;
    let leeway = Duration::from_millis(auth.leeway_ms);
    if auth.uses_dev_key() {
        let dev_key = DevKey::load_or_create(&config.server.data).map_err(StartError::DevKey)?;
        let key = dev_key.verification_key().map_err(StartError::Key)?;
        let rules = TokenRules {
            issuers: vec![DEV_ISSUER.to_owned()],
            audiences: vec![DEV_AUDIENCE.to_owned()],
            leeway,
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
                max_age: Duration::from_millis(auth.jwks_max_age_ms),
                min_interval: Duration::from_millis(auth.jwks_min_refresh_ms),
            };
            Some(JwksSource::new(url, refresh).map_err(StartError::Key)?)
        }
    };
    let rules =
        TokenRules { issuers: auth.issuers.clone(), audiences: auth.audiences.clone(), leeway };
    Ok((Arc::new(Authenticator::new(keys, jwks, rules, clock)), None))
}

fn limits(config: &Config) -> Limits {
    Limits {
        max_payload_bytes: size(config.limits.max_payload_bytes),
        max_output_chunk_bytes: size(config.limits.max_output_chunk_bytes),
    }
}

fn processor_options(config: &Config) -> ProcessorOptions {
    let execution = &config.execution;
    ProcessorOptions {
        max_concurrent_attempts: number(execution.max_concurrent_attempts),
        tenant_share: number(execution.tenant_share_percent),
        max_concurrent_sync: size(execution.max_concurrent_sync),
        sync_timeout: Duration::from_millis(execution.sync_threshold_ms.max(1)),
        lease: Duration::from_millis(execution.lease_ms),
        cancel_grace: Duration::from_millis(execution.cancel_grace_ms),
        poll_interval: Duration::from_millis(execution.poll_interval_ms),
        drain_timeout: Duration::from_millis(config.server.drain_timeout_ms),
        limits: limits(config),
        sync_threshold: Duration::from_millis(execution.sync_threshold_ms),
    }
}

fn gateway_options(config: &Config) -> GatewayOptions {
    let gateway = &config.gateway;
    GatewayOptions {
        allowed_origins: gateway.allowed_origins.clone(),
        max_connections: size(gateway.max_connections),
        max_connections_per_user: size(gateway.max_connections_per_user),
        max_connections_per_address: size(gateway.max_connections_per_address),
        max_subscriptions: size(gateway.max_subscriptions),
        max_in_flight: size(gateway.max_in_flight),
        messages_per_second: number(gateway.messages_per_second),
        message_burst: number(gateway.message_burst),
        max_message_bytes: limits(config).max_message_bytes(),
        heartbeat: Duration::from_millis(gateway.heartbeat_ms),
        slow_consumer_timeout: Duration::from_millis(gateway.slow_consumer_timeout_ms),
        handshake_timeout: Duration::from_millis(gateway.handshake_timeout_ms),
        reconnect_after: Duration::from_millis(gateway.reconnect_after_ms),
    }
}

fn number(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn size(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
