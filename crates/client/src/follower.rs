//! Follows one request to its end over WebSocket, with reconnects.

use std::{sync::Arc, time::Duration};

use serde_json::json;
use streamer_core::retry::Backoff;
use streamer_rpc::TokenSource;
use tokio::time::sleep;

use crate::{ClientError, Message, OutputVerifier, Session};

const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// Maximum number of consecutive retries without a message.
const MAX_RETRIES: u32 = 8;

/// Request to follow.
#[derive(Clone, Debug)]
pub enum Target {
    /// A request to submit.
    Submit {
        /// `id` of the request, which makes repeated submissions idempotent.
        id: String,
        /// Complete `request` message, with the same `id`.
        message: String,
    },
    /// An existing request.
    Watch {
        /// `request_id` or `uid` of the request.
        request_id: String,
        /// `seq` of the event after which to start; 0 for all events.
        after_seq: i64,
    },
}

/// Follows one request to its end.
pub struct Follower {
    server: String,
    tokens: Arc<dyn TokenSource>,
    /// Token of the latest connection.
    token: String,
    target: Target,
    session: Option<Session>,
    last_seq: i64,
    backoff: Backoff,
    ended: bool,
    /// Verifier of the output; `None` if the log is not read from its beginning.
    check: Option<OutputVerifier>,
}

impl Follower {
    /// Creates a follower of `target`. The follower connects on the first call of [`Self::next`] and requests a
    /// token for each connection.
    pub fn new(server: impl Into<String>, tokens: impl TokenSource, target: Target) -> Self {
        let last_seq = match &target {
            Target::Submit { .. } => 0,
            Target::Watch { after_seq, .. } => *after_seq,
        };
        Self {
            server: server.into(),
            tokens: Arc::new(tokens),
            token: String::new(),
            target,
            session: None,
            last_seq,
            backoff: Backoff::new(FIRST_BACKOFF, MAX_BACKOFF),
            ended: false,
            check: (last_seq == 0).then(OutputVerifier::default),
        }
    }

    /// Returns the ID with which the request can be watched again.
    #[must_use]
    pub fn request_id(&self) -> &str {
        match &self.target {
            Target::Submit { id, .. } => id,
            Target::Watch { request_id, .. } => request_id,
        }
    }

    /// Returns whether [`Self::next`] has returned the last message.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Returns the `seq` of the last message that [`Self::next`] returned.
    #[must_use]
    pub fn last_seq(&self) -> i64 {
        self.last_seq
    }

    /// Returns the next message about the request, with each event exactly once; `None` after the last message.
    ///
    /// # Errors
    /// Returns an error if the server rejects the call, stays unreachable after all retries, or skips events,
    /// or if the output does not match its checksum.
    pub async fn next(&mut self) -> Result<Option<Message>, ClientError> {
        while !self.ended {
            match self.try_next().await {
                Ok(Some(message)) => {
                    self.backoff.reset();
                    return Ok(Some(message));
                }
                Ok(None) => {}
                Err(error) if error.is_transient() && self.backoff.failures() < MAX_RETRIES => {
                    self.session = None;
                    sleep(self.backoff.wait()).await;
                }
                // The token may have expired during the connection.
                Err(error) if error.is_unauthenticated() && self.session.take().is_some() => {
                    if self.tokens.token().await? == self.token {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    async fn try_next(&mut self) -> Result<Option<Message>, ClientError> {
        let session = match &mut self.session {
            Some(session) => session,
            None => {
                let first_message = self.first_message();
                self.token = self.tokens.token().await?;
                let mut session = Session::connect(&self.server, &self.token).await?;
                session.send(first_message).await?;
                self.session.insert(session)
            }
        };
        let message = session.next().await?;
        if message.kind == "error" && message.seq.is_none() {
            // Without a `seq`, the error concerns this call and not the request's outcome.
            return Err(ClientError::Rejected(message.error()));
        }
        if let Some(seq) = message.seq
            && message.kind != "response"
            && seq > self.last_seq.max(1) + 1
        {
            let last_seq = self.last_seq;
            return Err(ClientError::Protocol(format!("event {seq} follows event {last_seq}")));
        }
        let message = self.accept(message);
        if let (Some(check), Some(message)) = (&mut self.check, &message) {
            message.check_output(check)?;
        }
        Ok(message)
    }

    /// Returns whether the server has accepted the request.
    #[must_use]
    pub fn is_accepted(&self) -> bool {
        self.last_seq > 0 || matches!(self.target, Target::Watch { .. })
    }

    /// Returns the first message of a new connection.
    fn first_message(&self) -> String {
        match &self.target {
            // Until the first event is received, the submission may have been lost.
            Target::Submit { message, .. } if self.last_seq == 0 => message.clone(),
            _ => json!({
                "type": "subscribe", "request_id": self.request_id(), "after_seq": self.last_seq,
            })
            .to_string(),
        }
    }

    /// Skips messages that do not concern the request, and events that were already received.
    fn accept(&mut self, message: Message) -> Option<Message> {
        match message.kind.as_str() {
            "connected" | "draining" | "auth_expiring" | "pong" | "message" => return None,
            "acknowledgment" if self.last_seq == 0 => self.last_seq = 1,
            "acknowledgment" => return None,
            _ => {}
        }
        if let Some(seq) = message.seq {
            if seq <= self.last_seq {
                return None;
            }
            self.last_seq = seq;
        }
        self.ended = match message.kind.as_str() {
            "response" | "complete" | "cancelled" | "error" => true,
            // The terminal event was already received, so no message follows.
            "subscribed" => message.is_terminal() && message.last_seq <= Some(self.last_seq),
            _ => false,
        };
        Some(message)
    }
}
