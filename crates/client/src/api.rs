//! gRPC: what needs no WebSocket.

use std::sync::Arc;

use http::HeaderValue;
use parking_lot::RwLock;
use streamer_proto::{
    connections::v1::connections_service_client::ConnectionsServiceClient,
    progress::v1::progress_service_client::ProgressServiceClient,
    router::v1::router_service_client::RouterServiceClient,
};
use streamer_rpc::{TokenSource, request_error, with_authorization};
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
    authorization: Arc<RwLock<Option<HeaderValue>>>,
    /// Where fresh tokens come from.
    tokens: Option<Arc<dyn TokenSource>>,
}

impl Api {
    /// Will connect to an `http://` URL when first used, with a token that lasts as long as it is needed.
    ///
    /// # Errors
    /// When it is no URL.
    pub fn new(server: &str, token: &str) -> Result<Self, ClientError> {
        let endpoint = Endpoint::from_shared(server.to_owned()).map_err(|_| ClientError::Url {
            url: server.to_owned(),
            rule: "must be like http://127.0.0.1:8080",
        })?;
        Ok(Self {
            channel: endpoint.connect_lazy(),
            server: server.to_owned(),
            authorization: Arc::new(RwLock::new(authorization(token)?)),
            tokens: None,
        })
    }

    /// As [`Self::new`], with tokens that are renewed: asked for now, and again when a watch ends because
    /// the one in use has expired.
    ///
    /// # Errors
    /// When it is no URL, or there is no token.
    pub async fn with_tokens(
        server: &str,
        tokens: Arc<dyn TokenSource>,
    ) -> Result<Self, ClientError> {
        let api = Self::new(server, &tokens.token().await?)?;
        Ok(Self { tokens: Some(tokens), ..api })
    }

    /// Takes a fresh token for the calls from now on, here and in clones. Returns whether it is a
    /// different one.
    ///
    /// # Errors
    /// When there is none.
    pub async fn renew_token(&self) -> Result<bool, ClientError> {
        let Some(tokens) = &self.tokens else { return Ok(false) };
        let fresh = authorization(&tokens.token().await?)?;
        let mut current = self.authorization.write();
        let is_different = *current != fresh;
        *current = fresh;
        Ok(is_different)
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
        match &*self.authorization.read() {
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

fn authorization(token: &str) -> Result<Option<HeaderValue>, ClientError> {
    let value = (!token.is_empty()).then(|| HeaderValue::try_from(format!("Bearer {token}")));
    value.transpose().map_err(|_| ClientError::Token)
}
