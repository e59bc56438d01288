//! One WebSocket.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use futures_util::{SinkExt, StreamExt};
use http::{HeaderValue, Uri, header::AUTHORIZATION};
use serde::Deserialize;
use serde_json::value::RawValue;
use streamer_core::{ErrorCode, RequestError, RequestState};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{
        self,
        client::IntoClientRequest,
        protocol::{CloseFrame, WebSocketConfig},
    },
};

use crate::{ClientError, OutputCheck};

/// How long each step of opening a WebSocket may take.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the first message may take.
const FIRST_PATIENCE: Duration = Duration::from_secs(30);
/// Given to a ping on its way.
const GRACE: Duration = Duration::from_secs(5);
/// Largest message that a client takes.
const MAX_MESSAGE_BYTES: usize = 256 * 1024 * 1024;

/// What every client looks at first in a message of the server.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Message {
    /// What it is.
    #[serde(rename = "type")]
    pub kind: String,
    /// Which request it is about.
    #[serde(default)]
    pub request_id: Option<String>,
    /// The server's id of that request.
    #[serde(default)]
    pub uid: Option<String>,
    /// Its place in the log.
    #[serde(default)]
    pub seq: Option<i64>,
    /// In a snapshot: the latest place in the log.
    #[serde(default)]
    pub last_seq: Option<i64>,
    /// In a snapshot: where the request stands.
    #[serde(default)]
    pub state: Option<String>,
    /// The message as it came.
    #[serde(skip)]
    pub text: String,
}

impl Message {
    /// What an `error` message says.
    #[must_use]
    pub fn error(&self) -> RequestError {
        #[derive(Default, Deserialize)]
        struct Said {
            #[serde(default)]
            error: Told,
        }
        #[derive(Default, Deserialize)]
        struct Told {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
            #[serde(default)]
            retryable: bool,
            details: Option<Box<RawValue>>,
        }
        let Said { error } = serde_json::from_str(&self.text).unwrap_or_default();
        RequestError {
            code: ErrorCode::from_name(&error.code).unwrap_or(ErrorCode::InternalError),
            message: error.message,
            retryable: error.retryable,
            details: error.details.map(|details| details.get().to_owned()),
        }
    }

    /// Notes what this message of a log says of the request's output.
    pub(crate) fn check_output(&self, check: &mut OutputCheck) -> Result<(), ClientError> {
        let unreadable = |error| ClientError::Unexpected(format!("{error} in {}", self.text));
        let said = || serde_json::from_str::<OutputMembers<'_>>(&self.text).map_err(unreadable);
        match (self.kind.as_str(), self.seq) {
            ("started", Some(seq)) => check.started(seq),
            ("output", _) => check.chunk(&said()?.chunk()?),
            ("retrying", _) => check.rewind(said()?.rewind_to_seq),
            ("complete" | "error" | "cancelled", Some(_)) => {
                let said = said()?;
                if self.kind == "error" {
                    check.rewind(said.rewind_to_seq);
                }
                if let Some(output) = said.output {
                    check.verify(output.chunks, output.sha256)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether it is a snapshot of a request that has ended.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        let state = self.state.as_deref().and_then(|state| state.parse().ok());
        state.is_some_and(RequestState::is_terminal)
    }
}

/// What the messages of a log say of the output.
#[derive(Deserialize)]
struct OutputMembers<'a> {
    /// As it stands there: JSON is hashed as the bytes that it is.
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    #[serde(default)]
    content_type: Option<String>,
    #[serde(default)]
    encoding: Option<String>,
    #[serde(default)]
    rewind_to_seq: i64,
    #[serde(borrow)]
    output: Option<Proof<'a>>,
}

#[derive(Deserialize)]
struct Proof<'a> {
    chunks: i64,
    sha256: &'a str,
}

impl OutputMembers<'_> {
    /// The bytes of the chunk.
    fn chunk(&self) -> Result<Vec<u8>, ClientError> {
        let data = self.data.map_or("", RawValue::get);
        if self.content_type.is_none() {
            return Ok(data.as_bytes().to_vec());
        }
        let malformed = |error: &dyn std::fmt::Display| {
            ClientError::Unexpected(format!("an output chunk: {error}"))
        };
        let text: String = serde_json::from_str(data).map_err(|error| malformed(&error))?;
        match self.encoding.as_deref() {
            Some("base64") => STANDARD.decode(text).map_err(|error| malformed(&error)),
            _ => Ok(text.into_bytes()),
        }
    }
}

/// An open WebSocket that speaks `streamer.v1.json`.
pub struct Session {
    socket: WebSocketStream<TcpStream>,
    server: String,
    /// A server that says nothing for so long, not even a ping, is gone.
    patience: Duration,
}

impl Session {
    /// Opens a WebSocket at an `http://` URL. The first message is `connected`.
    ///
    /// # Errors
    /// When the server cannot be reached or does not speak the protocol.
    pub async fn connect(server: &str, token: &str) -> Result<Self, ClientError> {
        Self::connect_with_buffers(server, token, 16 * 1024).await
    }

    /// As [`Self::connect`], with a read buffer of this size: small for very many connections.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_with_buffers(
        server: &str,
        token: &str,
        read_buffer: usize,
    ) -> Result<Self, ClientError> {
        let bad_url = |rule| ClientError::Url { url: server.to_owned(), rule };
        let unreachable =
            |reason: String| ClientError::Unreachable { server: server.to_owned(), reason };
        let uri: Uri = server.parse().map_err(|_| bad_url("is not a URL"))?;
        if uri.scheme_str() != Some("http") {
            return Err(bad_url("must begin with http://"));
        }
        let host = uri.host().ok_or_else(|| bad_url("must name a host"))?;
        let port = uri.port_u16().unwrap_or(80);
        let address = (host.trim_matches(['[', ']']), port);
        let in_time = || unreachable(format!("no answer within {} s", OPEN_TIMEOUT.as_secs()));
        let stream = timeout(OPEN_TIMEOUT, TcpStream::connect(address))
            .await
            .map_err(|_| in_time())?
            .map_err(|error| unreachable(error.to_string()))?;
        stream.set_nodelay(true).map_err(|error| unreachable(error.to_string()))?;
        let mut request = format!("ws://{host}:{port}/ws")
            .into_client_request()
            .map_err(|error| unreachable(error.to_string()))?;
        let headers = request.headers_mut();
        let protocol = HeaderValue::from_static("streamer.v1.json");
        headers.insert(http::header::SEC_WEBSOCKET_PROTOCOL, protocol);
        if !token.is_empty() {
            let bearer =
                HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| ClientError::Token)?;
            headers.insert(AUTHORIZATION, bearer);
        }
        let config = WebSocketConfig::default()
            .read_buffer_size(read_buffer)
            .write_buffer_size(4 * 1024)
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES));
        let opening = client_async_with_config(request, stream, Some(config));
        let opened = timeout(OPEN_TIMEOUT, opening).await.map_err(|_| in_time())?;
        let (socket, _) = opened.map_err(|error| unreachable(error.to_string()))?;
        Ok(Self { socket, server: server.to_owned(), patience: FIRST_PATIENCE })
    }

    /// Sends a message.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn send(&mut self, text: impl Into<String>) -> Result<(), ClientError> {
        let text: String = text.into();
        let sent = self.socket.send(tungstenite::Message::text(text)).await;
        sent.map_err(|error| self.lost(&error))
    }

    /// Queues a message; [`Self::flush`] sends what is queued.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn feed(&mut self, text: impl Into<String>) -> Result<(), ClientError> {
        let text: String = text.into();
        let fed = self.socket.feed(tungstenite::Message::text(text)).await;
        fed.map_err(|error| self.lost(&error))
    }

    /// Sends what is queued.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn flush(&mut self) -> Result<(), ClientError> {
        let flushed = self.socket.flush().await;
        flushed.map_err(|error| self.lost(&error))
    }

    /// The next message, as it came.
    ///
    /// # Errors
    /// When the connection is lost, or the server closes it.
    pub async fn next_text(&mut self) -> Result<tungstenite::Utf8Bytes, ClientError> {
        loop {
            let Ok(message) = timeout(self.patience, self.socket.next()).await else {
                let reason = format!("silent for {} s", self.patience.as_secs());
                return Err(ClientError::Unreachable { server: self.server.clone(), reason });
            };
            match message {
                Some(Ok(tungstenite::Message::Text(text))) => {
                    self.learn_heartbeat(&text);
                    return Ok(text);
                }
                Some(Ok(tungstenite::Message::Close(frame))) => return Err(closed(frame)),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(self.lost(&error)),
                None => return Err(closed(None)),
            }
        }
    }

    /// `connected` says how often the server pings who is silent.
    fn learn_heartbeat(&mut self, text: &str) {
        #[derive(Deserialize)]
        struct Connected {
            heartbeat_ms: u64,
        }
        if self.patience == FIRST_PATIENCE
            && text.starts_with("{\"type\":\"connected\"")
            && let Ok(Connected { heartbeat_ms }) = serde_json::from_str(text)
        {
            self.patience = Duration::from_millis(heartbeat_ms) * 2 + GRACE;
        }
    }

    /// The next message.
    ///
    /// # Errors
    /// When the connection is lost, the server closes it, or it sends no message of the protocol.
    pub async fn next(&mut self) -> Result<Message, ClientError> {
        let text = self.next_text().await?;
        let mut message: Message = serde_json::from_str(&text)
            .map_err(|error| ClientError::Unexpected(format!("{error} in {text}")))?;
        message.text = text.as_str().to_owned();
        Ok(message)
    }

    /// Closes the connection.
    ///
    /// # Errors
    /// When it is lost already.
    pub async fn close(mut self) -> Result<(), ClientError> {
        let closing = self.socket.close(None).await;
        closing.map_err(|error| self.lost(&error))
    }

    fn lost(&self, error: &tungstenite::Error) -> ClientError {
        ClientError::Unreachable { server: self.server.clone(), reason: error.to_string() }
    }
}

fn closed(frame: Option<CloseFrame>) -> ClientError {
    match frame {
        Some(frame) => {
            ClientError::Closed { code: frame.code.into(), reason: frame.reason.to_string() }
        }
        // RFC 6455 section 7.1.5: no status was there.
        None => ClientError::Closed { code: 1005, reason: String::new() },
    }
}
