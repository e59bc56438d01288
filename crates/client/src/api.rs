//! gRPC client.

use std::sync::Arc;

use http::HeaderValue;
use parking_lot::RwLock;
use streamer_proto::{
    admin::v1::admin_service_client::AdminServiceClient,
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

/// Maximum size of a response.
const MAX_MESSAGE_BYTES: usize = 256 * 1024 * 1024;

/// Client of the gRPC services. Its calls carry the user's token.
#[derive(Clone)]
pub struct Api {
    channel: Channel,
    server: String,
    authorization: Arc<RwLock<Option<HeaderValue>>>,
    /// Source of fresh tokens; `None` if the token is never renewed.
    tokens: Option<Arc<dyn TokenSource>>,
}

impl Api {
    /// Creates a client of the server at an `http://` URL, with a token that is never renewed. The client
    /// connects on the first call.
    ///
    /// # Errors
    /// Returns an error if the URL or the token is malformed.
    pub fn new(server: &str, token: &str) -> Result<Self, ClientError> {
        let endpoint =
            Endpoint::from_shared(server.to_owned()).map_err(|_| ClientError::InvalidUrl {
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

    /// Creates a client that gets its tokens from a token source: one immediately, and a fresh one when a
    /// watch ends because its token expired.
    ///
    /// # Errors
    /// Returns an error if the URL or the token is malformed, or the token source fails.
    pub async fn with_tokens(
        server: &str,
        tokens: Arc<dyn TokenSource>,
    ) -> Result<Self, ClientError> {
        let api = Self::new(server, &tokens.token().await?)?;
        Ok(Self { tokens: Some(tokens), ..api })
    }

    /// Requests a fresh token for subsequent calls of this client and its clones. Returns whether the token
    /// changed.
    ///
    /// # Errors
    /// Returns an error if the token source fails or the token is malformed.
    pub async fn renew_token(&self) -> Result<bool, ClientError> {
        let Some(tokens) = &self.tokens else { return Ok(false) };
        let fresh = authorization(&tokens.token().await?)?;
        let mut current = self.authorization.write();
        let is_different = *current != fresh;
        *current = fresh;
        Ok(is_different)
    }

    /// Returns a client of the router.
    #[must_use]
    pub fn router(&self) -> RouterServiceClient<Channel> {
        RouterServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Returns a client of the progress service, which serves event logs.
    #[must_use]
    pub fn progress(&self) -> ProgressServiceClient<Channel> {
        ProgressServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Returns a client of the service for live connections.
    #[must_use]
    pub fn connections(&self) -> ConnectionsServiceClient<Channel> {
        ConnectionsServiceClient::new(self.channel.clone())
    }

    /// Returns a client of the service for operators.
    #[must_use]
    pub fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.channel.clone())
    }

    /// Returns a gRPC request that carries the token.
    pub fn call<T>(&self, message: T) -> Request<T> {
        match &*self.authorization.read() {
            Some(authorization) => with_authorization(message, authorization.clone()),
            None => Request::new(message),
        }
    }

    /// Converts the status of a failed call to an error.
    #[must_use]
    pub fn error(&self, status: &Status) -> ClientError {
        // A status from the server has no source; a status that the transport created has one.
        if std::error::Error::source(status).is_some() {
            return ClientError::Unreachable {
                server: self.server.clone(),
                reason: status.message().to_owned(),
            };
        }
        ClientError::Rejected(request_error(status))
    }
}

fn authorization(token: &str) -> Result<Option<HeaderValue>, ClientError> {
    let value = (!token.is_empty()).then(|| HeaderValue::try_from(format!("Bearer {token}")));
    value.transpose().map_err(|_| ClientError::MalformedToken)
}
