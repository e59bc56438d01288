//! A WebSocket client that checks what it is told.

use serde_json::{Value, json};
use streamer_client::{ClientError, Session};

use crate::patience::in_time;

/// The `connected` message, and then whatever the test asks for.
pub struct Client {
    session: Session,
    /// The first message.
    pub connected: Value,
}

impl Client {
    /// Connects; the connection must be let in.
    ///
    /// # Panics
    /// When it is not.
    pub async fn connect(url: &str, token: &str) -> Self {
        Self::try_connect(url, token).await.expect("the server lets us in")
    }

    /// Connects.
    ///
    /// # Errors
    /// When the server does not let it in.
    ///
    /// # Panics
    /// When the first message is not `connected`.
    pub async fn try_connect(url: &str, token: &str) -> Result<Self, ClientError> {
        let mut session = Session::connect(url, token).await?;
        let first = in_time("the first message", session.next()).await?;
        let connected: Value = serde_json::from_str(&first.text).expect("messages are JSON");
        assert_eq!(connected["type"], "connected", "{connected}");
        Ok(Self { session, connected })
    }

    /// Sends a message.
    ///
    /// # Panics
    /// When the connection is lost.
    pub async fn send(&mut self, message: Value) {
        self.send_text(message.to_string()).await;
    }

    /// Sends text as it is.
    ///
    /// # Panics
    /// When the connection is lost.
    pub async fn send_text(&mut self, text: impl Into<String>) {
        self.session.send(text).await.expect("the connection is open");
    }

    /// The next message.
    ///
    /// # Panics
    /// When the connection ends.
    pub async fn next(&mut self) -> Value {
        self.try_next().await.expect("the connection is open")
    }

    /// The next message, as it came.
    ///
    /// # Panics
    /// When the connection ends.
    pub async fn next_text(&mut self) -> String {
        let text = in_time("the next message", self.session.next_text()).await;
        text.expect("the connection is open").as_str().to_owned()
    }

    /// The next message, or how the connection ended.
    ///
    /// # Errors
    /// When the connection ends.
    ///
    /// # Panics
    /// When a message is not JSON, or has no type and timestamp.
    pub async fn try_next(&mut self) -> Result<Value, ClientError> {
        let text = in_time("the next message", self.session.next_text()).await?;
        let value: Value = serde_json::from_str(&text).expect("messages are JSON");
        assert!(value["type"].is_string() && value["timestamp"].is_string(), "{value}");
        Ok(value)
    }

    /// Sends a message and returns the next one.
    pub async fn ask(&mut self, message: Value) -> Value {
        self.send(message).await;
        self.next().await
    }

    /// Sends text as it is and returns the next message.
    pub async fn ask_text(&mut self, text: impl Into<String>) -> Value {
        self.send_text(text).await;
        self.next().await
    }

    /// Submits an async request and returns its acknowledgement.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn submit(&mut self, id: &str, action: &str, payload: Value) -> Value {
        let message = json!({ "id": id, "action": action, "payload": payload });
        let answer = self.ask(message).await;
        assert_eq!(answer["type"], "acknowledgment", "{answer}");
        answer
    }

    /// Follows a log to its terminal event.
    pub async fn follow(&mut self, mut log: Log) -> Log {
        while !log.ended() {
            log.push(self.next().await);
        }
        log
    }
}

/// The events of one request, checked as they come: contiguous, and nothing after the end.
#[derive(Debug, Default, PartialEq)]
pub struct Log {
    after_seq: i64,
    /// As they came.
    pub events: Vec<Value>,
}

impl Log {
    /// Will take what comes after this.
    #[must_use]
    pub fn after(after_seq: i64) -> Self {
        Self { after_seq, events: Vec::new() }
    }

    /// Takes an event; other messages are passed over.
    ///
    /// # Panics
    /// When it is not the next one.
    pub fn push(&mut self, message: Value) {
        let Some(seq) = message["seq"].as_i64() else {
            assert_ne!(message["type"], "error", "{message}");
            return;
        };
        assert!(!self.ended(), "after the end: {message}");
        assert_eq!(seq, self.last_seq() + 1, "a gap or a repeat: {message}");
        self.events.push(message);
    }

    /// The `seq` of the last event.
    #[must_use]
    pub fn last_seq(&self) -> i64 {
        self.events.last().map_or(self.after_seq, |event| event["seq"].as_i64().unwrap_or(0))
    }

    /// The type of the last event.
    #[must_use]
    pub fn last_type(&self) -> &str {
        self.events.last().and_then(|event| event["type"].as_str()).unwrap_or("")
    }

    /// Whether the terminal event is there.
    #[must_use]
    pub fn ended(&self) -> bool {
        matches!(self.last_type(), "complete" | "error" | "cancelled")
    }

    /// How many events are of this type.
    #[must_use]
    pub fn count(&self, kind: &str) -> usize {
        self.events.iter().filter(|event| event["type"] == kind).count()
    }
}
