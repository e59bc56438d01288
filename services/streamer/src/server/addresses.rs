//! Addresses of this process and its peers, from the configuration.

use std::net::SocketAddr;

use streamer_cluster::{Need, Service};
use streamer_config::{Config, StoreEngine};
use tokio::net::UdpSocket;

use crate::server::{error::StartError, role::Role};

/// Returns the configured addresses of a service in other processes.
pub(crate) fn configured(config: &Config, service: Service) -> &[String] {
    let peers = &config.peers;
    match service {
        Service::Gateway => &peers.gateway,
        Service::Router => &peers.router,
        Service::Processor => &peers.processor,
        Service::Progress => &peers.progress,
    }
}

/// Checks the options that a service in a separate process requires.
pub(crate) fn check(config: &Config, role: Role) -> Result<(), StartError> {
    let Role::Only(service) = role else { return Ok(()) };
    if config.store.engine != StoreEngine::Dynamodb {
        return Err(StartError::Engine);
    }
    if config.peers.shared_secret_file.is_empty() && !config.server.listen.ip().is_loopback() {
        let reason = "is required unless server.listen is a loopback address".to_owned();
        return Err(StartError::Secret(reason));
    }
    let missing = service
        .calls()
        .iter()
        .find(|call| call.need != Need::Optional && configured(config, call.callee).is_empty());
    match missing {
        Some(call) => Err(StartError::Peers(call.callee)),
        None => Ok(()),
    }
}

/// Returns the name of this process among its peers, in the same form as their addresses.
pub(crate) async fn own(listening: SocketAddr, config: &Config) -> String {
    match config.peers.advertise_address.as_str() {
        "" => advertised(listening, config).await.to_string(),
        // Formats the address in the same way as the addresses of peers.
        text => match text.parse::<SocketAddr>() {
            Ok(advertised) => advertised.to_string(),
            Err(_) => text.to_owned(),
        },
    }
}

/// Returns the address at which other processes reach a listener on `address`. If `address` is
/// unspecified, returns the source address of the route to those processes, which a datagram socket
/// provides without sending a packet.
async fn advertised(address: SocketAddr, config: &Config) -> SocketAddr {
    if !address.ip().is_unspecified() {
        return address;
    }
    // The peers come first, because they connect to this process. The last address belongs to no machine
    // and selects the default route.
    let endpoint = config.dynamodb.endpoint.trim_start_matches("http://");
    let peers = config.peers.progress.iter().map(|peer| peer.trim_start_matches("http://"));
    for other in peers.chain([endpoint, "192.0.2.1:9"]) {
        let Ok(socket) = UdpSocket::bind((address.ip(), 0)).await else { continue };
        if socket.connect(other).await.is_ok()
            && let Ok(local) = socket.local_addr()
            && !local.ip().is_loopback()
        {
            return SocketAddr::new(local.ip(), address.port());
        }
    }
    address
}
