//! All connections of this gateway, and the API to send messages to those of all gateways.

pub(crate) mod connection_registry;
pub(crate) mod connections_service;
pub(crate) mod peer_gateways;
