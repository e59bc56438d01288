//! A WebSocket connection.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, Uri, header::AUTHORIZATION};
use serde::Deserialize;
use serde_json::value::RawValue;
use streamer_core::{CloseCode, ErrorCode, RequestError, RequestState};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{
        self,
        client::IntoClientRequest,
        protocol::{CloseFrame, WebSocketConfig},
    },
};

use crate::{ClientError, OutputVerifier};

/// Timeout for each step of opening a WebSocket.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for the first message.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time added to the read timeout to allow for network delay.
const PING_GRACE: Duration = Duration::from_secs(5);
/// Maximum size of a message.
const MAX_MESSAGE_BYTES: usize = 256 * 1024 * 1024;

/// Message from the server, with the members that every client reads.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Message {
    /// Type of the message.
    #[serde(rename = "type")]
    pub kind: String,
    /// ID of the request.
    #[serde(default)]
    pub request_id: Option<String>,
    /// UID of the request, which the server assigned.
    #[serde(default)]
    pub uid: Option<String>,
    /// Sequence number of the event in the log.
    #[serde(default)]
    pub seq: Option<i64>,
    /// In a snapshot: sequence number of the latest event.
    #[serde(default)]
    pub last_seq: Option<i64>,
    /// In a snapshot: state of the request.
    #[serde(default)]
    pub state: Option<String>,
    /// The message as received.
    #[serde(skip)]
    pub text: String,
}

impl Message {
    /// Returns the error of an `error` message.
    #[must_use]
    pub fn error(&self) -> RequestError {
        #[derive(Default, Deserialize)]
        struct ErrorMessage {
            #[serde(default)]
            error: ErrorBody,
        }
        #[derive(Default, Deserialize)]
        struct ErrorBody {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
            #[serde(default)]
            retryable: bool,
            details: Option<Box<RawValue>>,
        }
        let ErrorMessage { error } = serde_json::from_str(&self.text).unwrap_or_default();
        RequestError {
            code: ErrorCode::from_name(&error.code).unwrap_or(ErrorCode::InternalError),
            message: error.message,
            retryable: error.retryable,
            details: error.details.map(|details| details.get().to_owned()),
        }
    }

    /// Updates `check` with the event, and verifies the output if the event is terminal.
    pub(crate) fn check_output(&self, check: &mut OutputVerifier) -> Result<(), ClientError> {
        let unreadable = |error| ClientError::Protocol(format!("{error} in {}", self.text));
        let parse = || serde_json::from_str::<OutputMembers<'_>>(&self.text).map_err(unreadable);
        match (self.kind.as_str(), self.seq) {
            ("started", Some(seq)) => check.started(seq),
            ("output", _) => check.chunk(&parse()?.chunk()?),
            ("retrying", _) => check.rewind(parse()?.rewind_to_seq),
            ("complete" | "error" | "cancelled", Some(_)) => {
                let members = parse()?;
                if self.kind == "error" {
                    check.rewind(members.rewind_to_seq);
                }
                if let Some(output) = members.output {
                    check.verify(output.chunks, output.sha256)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Returns whether the message is a snapshot of a request that has ended.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        let state = self.state.as_deref().and_then(|state| state.parse().ok());
        state.is_some_and(RequestState::is_terminal)
    }
}

/// Members of event messages that concern the output.
#[derive(Deserialize)]
struct OutputMembers<'a> {
    /// Output chunk as raw text, because the checksum covers the JSON bytes as sent.
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    #[serde(default)]
    content_type: Option<String>,
    #[serde(default)]
    encoding: Option<String>,
    #[serde(default)]
    rewind_to_seq: i64,
    #[serde(borrow)]
    output: Option<OutputSummary<'a>>,
}

#[derive(Deserialize)]
struct OutputSummary<'a> {
    chunks: i64,
    sha256: &'a str,
}

impl OutputMembers<'_> {
    /// Returns the bytes of the chunk.
    fn chunk(&self) -> Result<Vec<u8>, ClientError> {
        let data = self.data.map_or("", RawValue::get);
        if self.content_type.is_none() {
            return Ok(data.as_bytes().to_vec());
        }
        let malformed = |error: &dyn std::fmt::Display| {
            ClientError::Protocol(format!("malformed output chunk: {error}"))
        };
        let text: String = serde_json::from_str(data).map_err(|error| malformed(&error))?;
        match self.encoding.as_deref() {
            Some("base64") => STANDARD.decode(text).map_err(|error| malformed(&error)),
            _ => Ok(text.into_bytes()),
        }
    }
}

/// An open WebSocket with the subprotocol `streamer.v1.json`.
pub struct Session {
    socket: WebSocketStream<TcpStream>,
    server: String,
    /// Maximum time without a message or a ping, after which the connection is considered lost.
    read_timeout: Duration,
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
        Ok(Self { socket, server: server.to_owned(), read_timeout: FIRST_MESSAGE_TIMEOUT })
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
            let Ok(message) = timeout(self.read_timeout, self.socket.next()).await else {
                let reason = format!("no message for {} s", self.read_timeout.as_secs());
                return Err(ClientError::Unreachable { server: self.server.clone(), reason });
            };
            match message {
                Some(Ok(tungstenite::Message::Text(text))) => {
                    self.apply_heartbeat(&text);
                    return Ok(text);
                }
                Some(Ok(tungstenite::Message::Close(frame))) => return Err(closed(frame)),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(self.connection_error(&error)),
                None => return Err(closed(None)),
            }
        }
    }

    /// Sets the read timeout to twice the ping interval that `connected` announces.
    fn apply_heartbeat(&mut self, text: &str) {
        #[derive(Deserialize)]
        struct Connected {
            heartbeat_ms: u64,
        }
        if self.read_timeout == FIRST_MESSAGE_TIMEOUT
            && text.starts_with("{\"type\":\"connected\"")
            && let Ok(Connected { heartbeat_ms }) = serde_json::from_str(text)
        {
            self.read_timeout = Duration::from_millis(heartbeat_ms) * 2 + PING_GRACE;
        }
    }

    /// Returns the next message.
    ///
    /// # Errors
    /// Returns an error if the connection is lost, the server closes it, or the message is malformed.
    pub async fn next(&mut self) -> Result<Message, ClientError> {
        let text = self.next_text().await?;
        let mut message: Message = serde_json::from_str(&text)
            .map_err(|error| ClientError::Protocol(format!("{error} in {text}")))?;
        message.text = text.as_str().to_owned();
        Ok(message)
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
