//! Messages from the server in subprotocol `streamer.v1.json`.
//!
//! [`ServerMessage`] has one variant per `type`. Unknown members are ignored, and a message of an unknown type is
//! [`ServerMessage::Unknown`], so that newer servers do not break older clients. JSON of callers and handlers stays
//! text: parsing could change its numbers, and the checksum of the output covers its bytes. Times are RFC 3339 in UTC,
//! with milliseconds.

use std::borrow::Cow;

use serde::{Deserialize, de::DeserializeOwned};

use crate::ClientError;

mod events;
mod replies;
#[cfg(test)]
mod tests;

use events::LogEvent;
pub use events::{
    Accepted, Cancelled, Complete, ErrorBody, ErrorMessage, EventHead, Output, OutputSummary,
    Progress, Retrying, Started,
};
pub use replies::{
    Acknowledgment, Connected, Draining, LatestProgress, Push, QueuePosition, RequestInfo,
    RequestPage, Response, Subscribed, TokenExpiry, Unknown, Unsubscribed,
};

/// A message from the server, and the text from which it was parsed.
#[derive(Clone, Debug)]
pub struct ReceivedMessage {
    /// The message.
    pub message: ServerMessage,
    /// Time of the event; for other messages, the time at which the server sent the message.
    pub timestamp: String,
    /// The message as received.
    pub text: String,
}

impl ReceivedMessage {
    /// Parses the text of a message.
    ///
    /// # Errors
    /// Returns an error that names the type, and the member that is missing or has the wrong type.
    pub fn parse(text: impl Into<String>) -> Result<Self, ClientError> {
        #[derive(Deserialize)]
        struct Head<'a> {
            #[serde(rename = "type", borrow)]
            kind: Cow<'a, str>,
            timestamp: String,
        }
        let text = text.into();
        let Head { kind, timestamp } = serde_json::from_str(&text)
            .map_err(|error| ClientError::Protocol(format!("{error} in {text}")))?;
        let message = ServerMessage::parse(&kind, &text)
            .map_err(|error| ClientError::Protocol(format!("{kind}: {error} in {text}")))?;
        Ok(Self { message, timestamp, text })
    }
}

/// A message from the server.
#[derive(Clone, Debug)]
pub enum ServerMessage {
    /// `connected`: the first message of every connection.
    Connected(Connected),
    /// `acknowledgment`: a request is durable, or a request is being cancelled.
    Acknowledgment(Acknowledgment),
    /// `response`: the result of a sync action, or of an async action that ended within the wait time.
    Response(Response),
    /// `subscribed`: snapshot of a request; its events follow.
    Subscribed(Subscribed),
    /// `unsubscribed`: a subscription has ended.
    Unsubscribed(Unsubscribed),
    /// `request`: reply to `get`.
    Request(Box<RequestInfo>),
    /// `requests`: reply to `list`.
    Requests(RequestPage),
    /// `accepted`: the first event of a log.
    Accepted(Accepted),
    /// `started`: event, an attempt started.
    Started(Started),
    /// `progress`: event, the handler reported progress.
    Progress(Progress),
    /// `output`: event, the handler wrote an output chunk.
    Output(Output),
    /// `retrying`: event, an attempt failed, and another attempt follows.
    Retrying(Retrying),
    /// `complete`: terminal event of a request that succeeded.
    Complete(Complete),
    /// `error`: terminal event of a request that failed, or error of a call.
    Error(ErrorMessage),
    /// `cancelled`: terminal event of a request that was cancelled.
    Cancelled(Cancelled),
    /// `message`: a service sent data to the connection.
    Push(Push),
    /// `authenticated`: the server accepted a new token.
    Authenticated(TokenExpiry),
    /// `auth_expiring`: the token expires soon.
    AuthExpiring(TokenExpiry),
    /// `draining`: the server is about to close the connection.
    Draining(Draining),
    /// `pong`: reply to `ping`.
    Pong,
    /// A type that this version does not know, or `unknown`: an event whose kind the gateway does not know.
    Unknown(Unknown),
}

impl ServerMessage {
    /// Parses the members of a message. The type is read in a separate pass, because serde's tagged enums buffer the
    /// members, from which a `RawValue` cannot be read.
    fn parse(kind: &str, text: &str) -> serde_json::Result<Self> {
        fn members<T: DeserializeOwned>(text: &str) -> serde_json::Result<T> {
            serde_json::from_str(text)
        }
        Ok(match kind {
            "connected" => Self::Connected(members(text)?),
            "acknowledgment" => Self::Acknowledgment(members(text)?),
            "response" => Self::Response(members(text)?),
            "subscribed" => Self::Subscribed(members(text)?),
            "unsubscribed" => Self::Unsubscribed(members(text)?),
            "request" => Self::Request(members(text)?),
            "requests" => Self::Requests(members(text)?),
            "accepted" => Self::Accepted(LogEvent::parse(text)?),
            "started" => Self::Started(LogEvent::parse(text)?),
            "progress" => Self::Progress(LogEvent::parse(text)?),
            "output" => Self::Output(LogEvent::parse(text)?),
            "retrying" => Self::Retrying(LogEvent::parse(text)?),
            "complete" => Self::Complete(LogEvent::parse(text)?),
            "error" => Self::Error(members(text)?),
            "cancelled" => Self::Cancelled(members(text)?),
            "message" => Self::Push(members(text)?),
            "authenticated" => Self::Authenticated(members(text)?),
            "auth_expiring" => Self::AuthExpiring(members(text)?),
            "draining" => Self::Draining(members(text)?),
            "pong" => Self::Pong,
            _ => Self::Unknown(members(text)?),
        })
    }

    /// Returns the `type` of the message.
    #[must_use]
    pub fn kind(&self) -> &str {
        match self {
            Self::Connected(_) => "connected",
            Self::Acknowledgment(_) => "acknowledgment",
            Self::Response(_) => "response",
            Self::Subscribed(_) => "subscribed",
            Self::Unsubscribed(_) => "unsubscribed",
            Self::Request(_) => "request",
            Self::Requests(_) => "requests",
            Self::Accepted(_) => "accepted",
            Self::Started(_) => "started",
            Self::Progress(_) => "progress",
            Self::Output(_) => "output",
            Self::Retrying(_) => "retrying",
            Self::Complete(_) => "complete",
            Self::Error(_) => "error",
            Self::Cancelled(_) => "cancelled",
            Self::Push(_) => "message",
            Self::Authenticated(_) => "authenticated",
            Self::AuthExpiring(_) => "auth_expiring",
            Self::Draining(_) => "draining",
            Self::Pong => "pong",
            Self::Unknown(unknown) => &unknown.kind,
        }
    }

    /// Returns the `request_id` of a message about one request.
    #[must_use]
    pub fn request_id(&self) -> Option<&str> {
        match self {
            Self::Acknowledgment(message) => Some(&message.request_id),
            Self::Response(message) => Some(&message.request_id),
            Self::Subscribed(message) => Some(&message.request_id),
            Self::Unsubscribed(message) => Some(&message.request_id),
            Self::Request(message) => Some(&message.request_id),
            Self::Cancelled(message) => Some(&message.request_id),
            Self::Error(message) => message.request_id.as_deref(),
            Self::Unknown(message) => message.request_id.as_deref(),
            _ => self.event().map(|event| event.request_id.as_str()),
        }
    }

    /// Returns the sequence number of an event; also that of the terminal event in a `response`.
    #[must_use]
    pub fn seq(&self) -> Option<i64> {
        match self {
            Self::Response(message) => message.seq,
            Self::Error(message) => message.seq,
            Self::Cancelled(message) => message.seq,
            Self::Unknown(message) => message.seq,
            _ => self.event().map(|event| event.seq),
        }
    }

    fn event(&self) -> Option<&EventHead> {
        match self {
            Self::Accepted(message) => Some(&message.event),
            Self::Started(message) => Some(&message.event),
            Self::Progress(message) => Some(&message.event),
            Self::Output(message) => Some(&message.event),
            Self::Retrying(message) => Some(&message.event),
            Self::Complete(message) => Some(&message.event),
            _ => None,
        }
    }
}
