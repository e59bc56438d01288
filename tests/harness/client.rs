//! A WebSocket client that checks the messages that it receives.

use serde_json::{Value, json};
use streamer_client::{ClientError, Session};

use crate::timeout::within_timeout;

/// A connected WebSocket client.
pub struct Client {
    session: Session,
    /// `connected`, the first message from the server.
    pub connected: Value,
}

impl Client {
    /// Connects to the server at `url`.
    ///
    /// # Panics
    /// Panics if the server rejects the connection.
    pub async fn connect(url: &str, token: &str) -> Self {
        Self::try_connect(url, token).await.expect("the server accepts the connection")
    }

    /// Connects to the server at `url`.
    ///
    /// # Errors
    /// Returns an error if the server rejects the connection.
    ///
    /// # Panics
    /// Panics if the first message is not `connected`.
    pub async fn try_connect(url: &str, token: &str) -> Result<Self, ClientError> {
        let mut session = Session::connect(url, token).await?;
        let first = within_timeout("the first message", session.next()).await?;
        let connected: Value = serde_json::from_str(&first.text).expect("messages are JSON");
        assert_eq!(connected["type"], "connected", "{connected}");
        Ok(Self { session, connected })
    }

    /// Sends a message.
    ///
    /// # Panics
    /// Panics if the connection is closed.
    pub async fn send(&mut self, message: Value) {
        self.send_text(message.to_string()).await;
    }

    /// Sends a text frame.
    ///
    /// # Panics
    /// Panics if the connection is closed.
    pub async fn send_text(&mut self, text: impl Into<String>) {
        self.session.send(text).await.expect("the connection is open");
    }

    /// Returns the next message.
    ///
    /// # Panics
    /// Panics if the connection is closed.
    pub async fn next(&mut self) -> Value {
        self.try_next().await.expect("the connection is open")
    }

    /// Returns the text of the next message.
    ///
    /// # Panics
    /// Panics if the connection is closed.
    pub async fn next_text(&mut self) -> String {
        let text = within_timeout("the next message", self.session.next_text()).await;
        text.expect("the connection is open").as_str().to_owned()
    }

    /// Returns the next message.
    ///
    /// # Errors
    /// Returns an error if the connection is closed.
    ///
    /// # Panics
    /// Panics if the message is not JSON, or has no type or timestamp.
    pub async fn try_next(&mut self) -> Result<Value, ClientError> {
        let text = within_timeout("the next message", self.session.next_text()).await?;
        let value: Value = serde_json::from_str(&text).expect("messages are JSON");
        assert!(value["type"].is_string() && value["timestamp"].is_string(), "{value}");
        Ok(value)
    }

    /// Sends a message and returns the next one.
    pub async fn request(&mut self, message: Value) -> Value {
        self.send(message).await;
        self.next().await
    }

    /// Sends a text frame and returns the next message.
    pub async fn request_text(&mut self, text: impl Into<String>) -> Value {
        self.send_text(text).await;
        self.next().await
    }

    /// Submits an async request and returns its acknowledgment.
    ///
    /// # Panics
    /// Panics if the request is rejected.
    pub async fn submit(&mut self, id: &str, action: &str, payload: Value) -> Value {
        let message = json!({ "id": id, "action": action, "payload": payload });
        let reply = self.request(message).await;
        assert_eq!(reply["type"], "acknowledgment", "{reply}");
        reply
    }

    /// Reads the events of `log` up to the terminal event.
    pub async fn follow(&mut self, mut log: Log) -> Log {
        while !log.has_ended() {
            log.push(self.next().await);
        }
        log
    }
}

/// Events of one request. They are contiguous, and none follows the terminal event.
#[derive(Debug, Default, PartialEq)]
pub struct Log {
    after_seq: i64,
    /// Events in the order in which they arrived.
    pub events: Vec<Value>,
}

impl Log {
    /// Creates an empty log whose first event must follow `after_seq`.
    #[must_use]
    pub fn after(after_seq: i64) -> Self {
        Self { after_seq, events: Vec::new() }
    }

    /// Adds an event; ignores other messages.
    ///
    /// # Panics
    /// Panics if the message is not the next event, or is an error.
    pub fn push(&mut self, message: Value) {
        let Some(seq) = message["seq"].as_i64() else {
            assert_ne!(message["type"], "error", "{message}");
            return;
        };
        assert!(!self.has_ended(), "after the terminal event: {message}");
        assert_eq!(seq, self.last_seq() + 1, "a gap or a repeat: {message}");
        self.events.push(message);
    }

    /// Returns the `seq` of the last event.
    #[must_use]
    pub fn last_seq(&self) -> i64 {
        self.events.last().map_or(self.after_seq, |event| event["seq"].as_i64().unwrap_or(0))
    }

    /// Returns the type of the last event.
    #[must_use]
    pub fn last_type(&self) -> &str {
        self.events.last().and_then(|event| event["type"].as_str()).unwrap_or("")
    }

    /// Returns whether the last event is terminal.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        matches!(self.last_type(), "complete" | "error" | "cancelled")
    }

    /// Returns the number of events of the given type.
    #[must_use]
    pub fn count(&self, kind: &str) -> usize {
        self.events.iter().filter(|event| event["type"] == kind).count()
    }
}
