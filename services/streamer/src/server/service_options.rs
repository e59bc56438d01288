//! Converts sections of the configuration to options of the services and the store.

use std::time::Duration;

use streamer_config::Config;
use streamer_core::{Limits, limits::PAYLOAD_OPTION, saturate};
use streamer_gateway::GatewayOptions;
use streamer_processor::ProcessorOptions;
use streamer_store_dynamodb::DynamoOptions;

/// Converts the section `dynamodb`.
pub(crate) fn dynamo_options(config: &Config) -> DynamoOptions {
    let dynamodb = &config.dynamodb;
    let given = |text: &String| (!text.is_empty()).then(|| text.clone());
    DynamoOptions {
        endpoint: given(&dynamodb.endpoint),
        region: given(&dynamodb.region),
        table_prefix: dynamodb.table_prefix.clone(),
        queue_shards: number(dynamodb.queue_shards),
        max_concurrent_operations: size(dynamodb.max_concurrent_operations),
        retention: Some(dynamodb.retention).filter(|retention| !retention.is_zero()),
        stream: dynamodb.streams_enabled,
        objects: given(&dynamodb.object_store_url),
    }
}

/// Rule that errors name if the limit of the store engine is lower than the configured limit.
const ENGINE_RULE: &str = "store.engine dynamodb without dynamodb.object_store_url";

/// Returns the limits of payloads and results for a store whose maximum value size is `max_value_bytes`.
pub(crate) fn limits(config: &Config, max_value_bytes: Option<usize>) -> Limits {
    let max_payload_bytes = size(config.limits.max_payload_bytes.0);
    let max_output_chunk_bytes = size(config.limits.max_output_chunk_bytes.0);
    let max_value_bytes = max_value_bytes.unwrap_or(usize::MAX);
    Limits {
        max_payload_bytes: max_payload_bytes.min(max_value_bytes),
        max_output_chunk_bytes: max_output_chunk_bytes.min(max_value_bytes),
        payload_option: if max_payload_bytes <= max_value_bytes {
            PAYLOAD_OPTION
        } else {
            ENGINE_RULE
        },
    }
}

/// Converts the section `execution`. `shared` states whether other processes write to the store.
pub(crate) fn processor_options(config: &Config, limits: Limits, shared: bool) -> ProcessorOptions {
    let execution = &config.execution;
    // A tenant may use half of the buffer, and its reports may wait for a pending batch.
    let least_output = limits.max_worker_message_bytes().saturating_mul(4);
    ProcessorOptions {
        max_concurrent_attempts: number(execution.max_concurrent_attempts),
        tenant_share: number(execution.max_tenant_share_percent),
        priority_aging: execution.priority_aging,
        max_concurrent_sync: size(execution.max_concurrent_sync),
        sync_timeout: execution.sync_threshold.max(Duration::from_millis(1)),
        lease: execution.lease_duration,
        cancellation_grace_period: execution.cancellation_grace_period,
        poll_interval: execution.poll_interval,
        drain_timeout: config.server.drain_timeout,
        max_buffered_output_bytes: size(execution.max_buffered_output_bytes.0).max(least_output),
        limits,
        sync_threshold: execution.sync_threshold,
        shared,
        queue_polling: execution.queue_polling,
    }
}

/// Converts the section `gateway`.
pub(crate) fn gateway_options(config: &Config, limits: Limits) -> GatewayOptions {
    let gateway = &config.gateway;
    // The budget must be sufficient for a message of the maximum size: its fragments and the next frame.
    let min_buffered_bytes = limits.max_message_bytes().saturating_mul(2);
    GatewayOptions {
        allowed_origins: gateway.allowed_origins.clone(),
        max_connections: size(gateway.max_connections),
        max_connections_per_user: size(gateway.max_connections_per_user),
        max_connections_per_address: size(gateway.max_connections_per_address),
        max_subscriptions: size(gateway.max_subscriptions),
        max_in_flight_requests: size(gateway.max_in_flight_requests),
        rate_limit: number(gateway.rate_limit),
        rate_limit_burst: number(gateway.rate_limit_burst),
        max_message_bytes: limits.max_message_bytes(),
        max_buffered_bytes: size(gateway.max_buffered_bytes.0).max(min_buffered_bytes),
        max_buffered_bytes_per_user: size(gateway.max_buffered_bytes_per_user.0)
            .max(min_buffered_bytes),
        message_timeout: gateway.message_timeout,
        heartbeat: gateway.ping_interval,
        slow_consumer_timeout: gateway.slow_consumer_timeout,
        handshake_timeout: gateway.handshake_timeout,
        reconnect_after: gateway.reconnect_after,
        access_log: gateway.access_log,
    }
}

/// Converts the value of an option to 32 bits, saturating.
fn number(value: u64) -> u32 {
    saturate::to_u32(value)
}

/// Converts a size or count, saturating.
pub(crate) fn size(value: u64) -> usize {
    saturate::to_usize(value)
}
