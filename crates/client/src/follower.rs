//! Follows one request to its end over WebSocket, with reconnects.

use std::{sync::Arc, time::Duration};

use serde_json::json;
use streamer_core::{Backoff, RequestState};
use streamer_rpc::TokenSource;
use tokio::time::sleep;

use crate::{ClientError, OutputVerifier, ReceivedMessage, ServerMessage, Session};

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

    /// Returns the ID with which the watch can be resumed.
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
    pub async fn next(&mut self) -> Result<Option<ReceivedMessage>, ClientError> {
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

    async fn try_next(&mut self) -> Result<Option<ReceivedMessage>, ClientError> {
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
        let received = session.next().await?;
        if let ServerMessage::Error(message) = &received.message
            && message.seq.is_none()
        {
            // Without a `seq`, the error concerns this call and not the request's outcome.
            return Err(ClientError::Rejected(message.error.clone().into()));
        }
        if let Some(seq) = received.message.seq()
            && !matches!(received.message, ServerMessage::Response(_))
            && seq > self.last_seq.max(1) + 1
        {
            let expected = self.last_seq.max(1) + 1;
            let text = format!("expected event {expected}, received event {seq}");
            return Err(ClientError::Protocol(text));
        }
        if !self.accept(&received.message) {
            return Ok(None);
        }
        if let Some(check) = &mut self.check {
            verify(check, &received.message)?;
        }
        Ok(Some(received))
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

    /// Records a message. Returns false for messages that do not concern the request, and for events that were already
    /// received.
    fn accept(&mut self, message: &ServerMessage) -> bool {
        match message {
            ServerMessage::Connected(_)
            | ServerMessage::Draining(_)
            | ServerMessage::AuthExpiring(_)
            | ServerMessage::Pong
            | ServerMessage::Push(_) => return false,
            // The acknowledgment replaces the first event.
            ServerMessage::Acknowledgment(_) if self.last_seq == 0 => self.last_seq = 1,
            ServerMessage::Acknowledgment(_) => return false,
            _ => {}
        }
        if let Some(seq) = message.seq() {
            if seq <= self.last_seq {
                return false;
            }
            self.last_seq = seq;
        }
        self.ended = match message {
            ServerMessage::Response(_)
            | ServerMessage::Complete(_)
            | ServerMessage::Cancelled(_)
            | ServerMessage::Error(_) => true,
            // The terminal event was already received, so no message follows.
            ServerMessage::Subscribed(snapshot) => {
                snapshot.state.is_some_and(RequestState::is_terminal)
                    && snapshot.last_seq <= self.last_seq
            }
            _ => false,
        };
        true
    }
}

/// Updates `check` with the event, and verifies the output if the event is terminal.
fn verify(check: &mut OutputVerifier, message: &ServerMessage) -> Result<(), ClientError> {
    let summary = match message {
        ServerMessage::Started(started) => {
            check.started(started.event.seq);
            None
        }
        ServerMessage::Output(output) => {
            check.chunk(&output.bytes()?);
            None
        }
        ServerMessage::Retrying(retrying) => {
            check.rewind(retrying.rewind_to_seq);
            None
        }
        ServerMessage::Complete(complete) => complete.output.as_ref(),
        ServerMessage::Error(failed) if failed.seq.is_some() => {
            check.rewind(failed.rewind_to_seq);
            failed.output.as_ref()
        }
        ServerMessage::Cancelled(cancelled) if cancelled.seq.is_some() => cancelled.output.as_ref(),
        _ => None,
    };
    if let Some(summary) = summary {
        check.verify(summary.chunks, &summary.sha256)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY_SHA256: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn parse(kind: &str, members: &str) -> ServerMessage {
        let text = format!("{{\"type\":\"{kind}\",\"timestamp\":\"\"{members}}}");
        ReceivedMessage::parse(text).unwrap().message
    }

    fn event(kind: &str, seq: i64, members: &str) -> ServerMessage {
        let head = format!(r#","request_id":"r","uid":"U","seq":{seq},"attempt":1{members}"#);
        parse(kind, &head)
    }

    fn subscribed(state: &str, last_seq: i64) -> ServerMessage {
        let members = format!(
            r#","request_id":"r","uid":"U","last_seq":{last_seq},"state":"{state}","action":"a",
               "attempt":1"#
        );
        parse("subscribed", &members)
    }

    fn acknowledgment() -> ServerMessage {
        let members = r#","request_id":"r","uid":"U","status":"queued","message":"",
            "duplicate":false,"last_seq":1"#;
        parse("acknowledgment", members)
    }

    fn follower(after_seq: i64) -> Follower {
        let target = Target::Watch { request_id: "r".into(), after_seq };
        Follower::new("http://127.0.0.1:1", String::new(), target)
    }

    #[test]
    fn each_event_is_returned_once() {
        let mut follower = follower(0);
        assert!(!follower.accept(&parse("pong", "")));
        assert!(follower.accept(&acknowledgment()));
        assert!(!follower.accept(&event("accepted", 1, r#","action":"a""#)));
        assert!(follower.accept(&event("started", 2, r#","worker":"w""#)));
        // After a reconnect, the submission is repeated.
        assert!(!follower.accept(&acknowledgment()));
        assert!(!follower.accept(&event("started", 2, r#","worker":"w""#)));
        // The sequence numbers of events that this version does not know count.
        assert!(follower.accept(&event("paused", 3, "")));
        assert_eq!((follower.last_seq(), follower.has_ended()), (3, false));
        assert!(follower.accept(&event("cancelled", 4, r#","reason":"enough""#)));
        assert!(follower.has_ended());
    }

    #[test]
    fn a_snapshot_is_the_last_message_if_no_event_follows() {
        for (state, last_seq, is_last) in
            [("SUCCEEDED", 5, true), ("SUCCEEDED", 6, false), ("RUNNING", 5, false)]
        {
            let mut follower = follower(5);
            assert!(follower.accept(&subscribed(state, last_seq)));
            assert_eq!(follower.has_ended(), is_last, "{state} {last_seq}");
        }
    }

    #[test]
    fn the_output_is_verified_at_the_terminal_event() {
        let mut check = OutputVerifier::default();
        let started = event("started", 2, r#","worker":"w""#);
        let chunk = event("output", 3, r#","chunk_index":0,"data":1"#);
        let summary = format!(r#","output":{{"chunks":0,"sha256":"{EMPTY_SHA256}"}}"#);
        let complete = event("complete", 4, &format!(r#","result":null{summary}"#));
        let error = r#""error":{"code":"TIMEOUT","message":"","retryable":true}"#;
        let failed = event("error", 4, &format!(r#","rewind_to_seq":2,{error}{summary}"#));
        verify(&mut check, &started).unwrap();
        verify(&mut check, &chunk).unwrap();
        let mismatch = verify(&mut check, &complete).unwrap_err();
        assert!(matches!(mismatch, ClientError::OutputMismatch(_)), "{mismatch}");
        // The output of the failed attempt is void.
        verify(&mut check, &failed).unwrap();
    }
}
