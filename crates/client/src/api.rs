//! gRPC: what needs no WebSocket.

use http::HeaderValue;
use streamer_proto::{
    connections::v1::connections_service_client::ConnectionsServiceClient,
    progress::v1::progress_service_client::ProgressServiceClient,
    router::v1::router_service_client::RouterServiceClient,
};
use streamer_rpc::{request_error, with_authorization};
use tonic::{
    Request, Status,
    transport::{Channel, Endpoint},
};

use crate::ClientError;

/// Largest answer that a client takes.
const MAX_MESSAGE_BYTES: usize = 256 * 1024 * 1024;

/// The gRPC services, in the name of whoever holds the token.
#[derive(Clone)]
pub struct Api {
    channel: Channel,
    server: String,
    authorization: Option<HeaderValue>,
}

impl Api {
    /// Will connect to an `http://` URL when first used.
    ///
    /// # Errors
    /// When it is no URL.
    pub fn new(server: &str, token: &str) -> Result<Self, ClientError> {
        let endpoint = Endpoint::from_shared(server.to_owned()).map_err(|_| ClientError::Url {
            url: server.to_owned(),
            rule: "must be like http://127.0.0.1:8080",
        })?;
        let authorization = (!token.is_empty())
            .then(|| HeaderValue::try_from(format!("Bearer {token}")))
            .transpose()
            .map_err(|_| ClientError::Token)?;
        Ok(Self { channel: endpoint.connect_lazy(), server: server.to_owned(), authorization })
    }

    /// The router.
    #[must_use]
    pub fn router(&self) -> RouterServiceClient<Channel> {
        RouterServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// The event logs.
    #[must_use]
    pub fn progress(&self) -> ProgressServiceClient<Channel> {
        ProgressServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// The live connections.
    #[must_use]
    pub fn connections(&self) -> ConnectionsServiceClient<Channel> {
        ConnectionsServiceClient::new(self.channel.clone())
    }

    /// A call with the token.
    pub fn call<T>(&self, message: T) -> Request<T> {
        match &self.authorization {
            Some(authorization) => with_authorization(message, authorization.clone()),
            None => Request::new(message),
        }
    }

    /// What a failed call means.
    #[must_use]
    pub fn error(&self, status: &Status) -> ClientError {
        // A status that a server sent has no source.
        if std::error::Error::source(status).is_some() {
            return ClientError::Unreachable {
                server: self.server.clone(),
                reason: status.message().to_owned(),
            };
        }
        ClientError::Refused(request_error(status))
    }
}
