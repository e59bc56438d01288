//! A WebSocket connection.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, Uri, header::AUTHORIZATION};
use serde::Deserialize;
use streamer_core::CloseCode;
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{
        self,
        client::IntoClientRequest,
        protocol::{CloseFrame, WebSocketConfig},
    },
};

use crate::{ClientError, ReceivedMessage};

/// Timeout for each step of opening a WebSocket.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for the first message.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time added to the read timeout to allow for network delay.
const PING_GRACE: Duration = Duration::from_secs(5);
/// Maximum size of a message.
const MAX_MESSAGE_BYTES: usize = 256 * 1024 * 1024;

/// An open WebSocket with the subprotocol `streamer.v1.json`.
pub struct Session {
    socket: WebSocketStream<TcpStream>,
    server: String,
    /// Ping interval of the server; `None` before `connected`, which announces it.
    heartbeat: Option<Duration>,
}

impl Session {
    /// Opens a WebSocket to the server at an `http://` URL. The first message is `connected`.
    ///
    /// # Errors
    /// Returns an error if the URL or the token is malformed, or the handshake fails.
    pub async fn connect(server: &str, token: &str) -> Result<Self, ClientError> {
        Self::connect_with_read_buffer(server, token, 16 * 1024).await
    }

    /// Opens a WebSocket in the same way as [`Self::connect`], with a read buffer of the given size in bytes. A
    /// small buffer saves memory with many connections.
    ///
    /// # Errors
    /// Returns the same errors as [`Self::connect`].
    pub async fn connect_with_read_buffer(
        server: &str,
        token: &str,
        read_buffer: usize,
    ) -> Result<Self, ClientError> {
        let bad_url = |rule| ClientError::InvalidUrl { url: server.to_owned(), rule };
        let unreachable =
            |reason: String| ClientError::Unreachable { server: server.to_owned(), reason };
        let uri: Uri = server.parse().map_err(|_| bad_url("is not a URL"))?;
        if uri.scheme_str() != Some("http") {
            return Err(bad_url("must begin with http://"));
        }
        let host = uri.host().ok_or_else(|| bad_url("must name a host"))?;
        let port = uri.port_u16().unwrap_or(80);
        let address = (host.trim_matches(['[', ']']), port);
        let timed_out = || unreachable(format!("no response within {} s", OPEN_TIMEOUT.as_secs()));
        let stream = timeout(OPEN_TIMEOUT, TcpStream::connect(address))
            .await
            .map_err(|_| timed_out())?
            .map_err(|error| unreachable(error.to_string()))?;
        stream.set_nodelay(true).map_err(|error| unreachable(error.to_string()))?;
        let mut request = format!("ws://{host}:{port}/ws")
            .into_client_request()
            .map_err(|error| unreachable(error.to_string()))?;
        let headers = request.headers_mut();
        let protocol = HeaderValue::from_static("streamer.v1.json");
        headers.insert(http::header::SEC_WEBSOCKET_PROTOCOL, protocol);
        if !token.is_empty() {
            let bearer = HeaderValue::try_from(format!("Bearer {token}"))
                .map_err(|_| ClientError::MalformedToken)?;
            headers.insert(AUTHORIZATION, bearer);
        }
        let config = WebSocketConfig::default()
            .read_buffer_size(read_buffer)
            .write_buffer_size(4 * 1024)
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES));
        let opening = client_async_with_config(request, stream, Some(config));
        let opened = timeout(OPEN_TIMEOUT, opening).await.map_err(|_| timed_out())?;
        let (socket, _) = opened.map_err(|error| unreachable(error.to_string()))?;
        Ok(Self { socket, server: server.to_owned(), heartbeat: None })
    }

    /// Sends a message.
    ///
    /// # Errors
    /// Returns an error if the connection is lost.
    pub async fn send(&mut self, text: impl Into<String>) -> Result<(), ClientError> {
        let text: String = text.into();
        let sent = self.socket.send(tungstenite::Message::text(text)).await;
        sent.map_err(|error| self.connection_error(&error))
    }

    /// Queues a message, which [`Self::flush`] sends.
    ///
    /// # Errors
    /// Returns an error if the connection is lost.
    pub async fn feed(&mut self, text: impl Into<String>) -> Result<(), ClientError> {
        let text: String = text.into();
        let fed = self.socket.feed(tungstenite::Message::text(text)).await;
        fed.map_err(|error| self.connection_error(&error))
    }

    /// Sends the queued messages.
    ///
    /// # Errors
    /// Returns an error if the connection is lost.
    pub async fn flush(&mut self) -> Result<(), ClientError> {
        let flushed = self.socket.flush().await;
        flushed.map_err(|error| self.connection_error(&error))
    }

    /// Returns the text of the next message.
    ///
    /// # Errors
    /// Returns an error if the connection is lost or the server closes it.
    pub async fn next_text(&mut self) -> Result<tungstenite::Utf8Bytes, ClientError> {
        loop {
            let read_timeout = self.read_timeout();
            let Ok(message) = timeout(read_timeout, self.socket.next()).await else {
                let reason = format!("no message for {} s", read_timeout.as_secs());
                return Err(ClientError::Unreachable { server: self.server.clone(), reason });
            };
            match message {
                Some(Ok(tungstenite::Message::Text(text))) => {
                    self.read_heartbeat(&text);
                    return Ok(text);
                }
                Some(Ok(tungstenite::Message::Close(frame))) => return Err(closed(frame)),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(self.connection_error(&error)),
                None => return Err(closed(None)),
            }
        }
    }

    /// Returns the maximum time without a message or a ping, after which the connection is considered lost.
    fn read_timeout(&self) -> Duration {
        self.heartbeat.map_or(FIRST_MESSAGE_TIMEOUT, |heartbeat| heartbeat * 2 + PING_GRACE)
    }

    /// Sets the heartbeat if the message is `connected`.
    fn read_heartbeat(&mut self, text: &str) {
        #[derive(Deserialize)]
        struct Heartbeat {
            heartbeat_ms: u64,
        }
        // Only `connected` has this member, and only it is needed here.
        if self.heartbeat.is_none()
            && let Ok(Heartbeat { heartbeat_ms }) = serde_json::from_str(text)
        {
            self.heartbeat = Some(Duration::from_millis(heartbeat_ms));
        }
    }

    /// Returns the next message.
    ///
    /// # Errors
    /// Returns an error if the connection is lost, the server closes it, or the message is malformed.
    pub async fn next(&mut self) -> Result<ReceivedMessage, ClientError> {
        ReceivedMessage::parse(self.next_text().await?.as_str())
    }

    /// Closes the connection.
    ///
    /// # Errors
    /// Returns an error if the connection is already lost.
    pub async fn close(mut self) -> Result<(), ClientError> {
        let closing = self.socket.close(None).await;
        closing.map_err(|error| self.connection_error(&error))
    }

    fn connection_error(&self, error: &tungstenite::Error) -> ClientError {
        ClientError::Unreachable { server: self.server.clone(), reason: error.to_string() }
    }
}

fn closed(frame: Option<CloseFrame>) -> ClientError {
    match frame {
        Some(frame) => ClientError::Closed {
            code: u16::from(frame.code).into(),
            reason: frame.reason.to_string(),
        },
        None => ClientError::Closed { code: CloseCode::NoStatus, reason: String::new() },
    }
}
