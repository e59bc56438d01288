//! Sees one request to its end, over as many connections as it takes.

use std::{sync::Arc, time::Duration};

use serde_json::json;
use streamer_core::retry::Backoff;
use streamer_rpc::TokenSource;
use tokio::time::sleep;

use crate::{ClientError, Message, OutputCheck, Session};

const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// Connections in a row that brought nothing, after which it gives up.
const MAX_FAILURES: u32 = 8;

/// What to follow.
#[derive(Clone, Debug)]
pub enum Target {
    /// A request to be submitted: a whole `request` message with an `id`, which makes sending it
    /// again safe.
    Submit {
        /// Its `id`.
        id: String,
        /// The message.
        message: String,
    },
    /// A request that is there, from after this `seq` on.
    Watch {
        /// Its `request_id` or `uid`.
        request_id: String,
        /// The last `seq` that was seen; 0 for all.
        after_seq: i64,
    },
}

/// Follows one request.
pub struct Follower {
    server: String,
    tokens: Arc<dyn TokenSource>,
    /// With which it connected last.
    token: String,
    target: Target,
    session: Option<Session>,
    last_seq: i64,
    backoff: Backoff,
    ended: bool,
    /// Only who reads from the beginning can tell.
    check: Option<OutputCheck>,
}

impl Follower {
    /// Will follow `target`; connects when first asked. A token is asked for at each connection.
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
            check: (last_seq == 0).then(OutputCheck::default),
        }
    }

    /// The name to come back with.
    #[must_use]
    pub fn request_id(&self) -> &str {
        match &self.target {
            Target::Submit { id, .. } => id,
            Target::Watch { request_id, .. } => request_id,
        }
    }

    /// Whether nothing will follow what was handed out.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// The last `seq` that was handed out.
    #[must_use]
    pub fn last_seq(&self) -> i64 {
        self.last_seq
    }

    /// The next message about the request, each event once; `None` after the last.
    ///
    /// # Errors
    /// When the server refuses, or cannot be reached for long.
    pub async fn next(&mut self) -> Result<Option<Message>, ClientError> {
        while !self.ended {
            match self.try_next().await {
                Ok(Some(message)) => {
                    self.backoff.reset();
                    return Ok(Some(message));
                }
                Ok(None) => {}
                Err(error) if error.is_transient() && self.backoff.failures() < MAX_FAILURES => {
                    self.session = None;
                    sleep(self.backoff.wait()).await;
                }
                // The connection may have lasted longer than its token.
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
                let opening = self.opening();
                self.token = self.tokens.token().await?;
                let mut session = Session::connect(&self.server, &self.token).await?;
                session.send(opening).await?;
                self.session.insert(session)
            }
        };
        let message = session.next().await?;
        if message.kind == "error" && message.seq.is_none() {
            // Not the request's end: this call was refused, and may be made again if that helps.
            return Err(ClientError::Refused(message.error()));
        }
        if let Some(seq) = message.seq
            && message.kind != "response"
            && seq > self.last_seq.max(1) + 1
        {
            let last_seq = self.last_seq;
            return Err(ClientError::Unexpected(format!("event {seq} follows event {last_seq}")));
        }
        let message = self.take(message);
        if let (Some(check), Some(message)) = (&mut self.check, &message) {
            message.check_output(check)?;
        }
        Ok(message)
    }

    /// Whether the server is known to have the request.
    #[must_use]
    pub fn is_accepted(&self) -> bool {
        self.last_seq > 0 || matches!(self.target, Target::Watch { .. })
    }

    /// What to say on a new connection.
    fn opening(&self) -> String {
        match &self.target {
            // Until the first event is seen, the submission may not have arrived.
            Target::Submit { message, .. } if self.last_seq == 0 => message.clone(),
            _ => json!({
                "type": "subscribe", "request_id": self.request_id(), "after_seq": self.last_seq,
            })
            .to_string(),
        }
    }

    /// Passes over what is of no concern or was seen before.
    fn take(&mut self, message: Message) -> Option<Message> {
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
            // Its end was seen before: nothing will follow.
            "subscribed" => message.is_terminal() && message.last_seq <= Some(self.last_seq),
            _ => false,
        };
        Some(message)
    }
}
