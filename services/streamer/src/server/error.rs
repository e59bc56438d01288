//! Errors that prevent a server from starting.

use std::{io, net::SocketAddr, path::PathBuf};

use streamer_auth::{DevKeyError, KeyError};
use streamer_cluster::Service;
use streamer_store::StoreError;
use streamer_store_dynamodb::OpenError;

/// Error that prevents a server from starting.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// The store cannot be opened.
    #[error("cannot open the store: {0}")]
    Store(StoreError),
    /// The DynamoDB store cannot be opened.
    #[error("cannot open the DynamoDB store: {0}")]
    OpenDynamo(OpenError),
    /// The service token cannot be loaded.
    #[error("peers.shared_secret_file: {0}")]
    Secret(String),
    /// The configured store engine cannot be shared by separate processes.
    #[error("store.engine: must be dynamodb for services in separate processes")]
    Engine,
    /// No peer is configured for a required service, which does not run in this process.
    #[error("peers.{name}: is required", name = .0.name())]
    Peers(Service),
    /// A key cannot be used.
    #[error("auth.keys, auth.jwks_url: {0}")]
    Key(KeyError),
    /// The development key cannot be used.
    #[error(transparent)]
    DevKey(DevKeyError),
    /// `server.metrics_listen` is not a valid address.
    #[error("server.metrics_listen: must be ADDRESS:PORT, is {0:?}")]
    MetricsAddress(String),
    /// The threads for handlers cannot be started.
    #[error("cannot start threads for handlers: {0}")]
    Threads(io::Error),
    /// The server cannot listen on the address.
    #[error("cannot listen on {0}: {1}")]
    Listen(SocketAddr, io::Error),
    /// The audit log cannot be opened.
    #[error("audit.file: cannot open {path}: {1}", path = .0.display())]
    Audit(PathBuf, io::Error),
    /// The server is not ready after all resources were opened.
    #[error("{0}")]
    NotReady(String),
    /// The schema for reflection cannot be read. The tests ensure that this error does not occur.
    #[error("cannot serve reflection: {0}")]
    Reflection(String),
}

impl StartError {
    /// Returns whether the error is caused by the configuration.
    pub(crate) fn is_configuration_error(&self) -> bool {
        match self {
            Self::OpenDynamo(error) => error.is_configuration_error(),
            Self::Secret(_)
            | Self::Engine
            | Self::Peers(_)
            | Self::Key(_)
            | Self::Audit(..)
            | Self::MetricsAddress(_) => true,
            Self::Store(_)
            | Self::DevKey(_)
            | Self::Threads(_)
            | Self::Listen(..)
            | Self::NotReady(_)
            | Self::Reflection(_) => false,
        }
    }
}
