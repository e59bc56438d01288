//! Calls about connections that other gateways hold.

use std::time::Duration;

use futures_util::future::join_all;
use http::HeaderValue;
use streamer_auth::Caller;
use streamer_proto::connections::v1::{
    BroadcastRequest, DisconnectRequest, SendRequest,
    connections_service_client::ConnectionsServiceClient,
};
use streamer_rpc::{Channel, FORWARDED, with_authorization};
use tokio::time::timeout;
use tonic::{Code, Request, Response, Status, metadata::MetadataValue};

use crate::OtherGateways;

/// A gateway that does not answer within this is passed over.
const PATIENCE: Duration = Duration::from_secs(3);
/// As much for one that could not be reached last time.
const SHORT_PATIENCE: Duration = Duration::from_millis(500);

/// What the other gateways made of a call.
#[derive(Default)]
pub(crate) struct Elsewhere {
    /// Connections that were reached.
    pub(crate) recipients: usize,
    /// Gateways that could not be asked.
    pub(crate) unreachable: usize,
}

/// What the other gateways are asked.
#[derive(Clone)]
pub(crate) enum Question {
    Send(SendRequest),
    Broadcast(BroadcastRequest),
    Disconnect(DisconnectRequest),
}

impl Question {
    /// Asks one of them; says how many connections it reached.
    async fn ask(self, channel: Channel, authorization: HeaderValue) -> Result<usize, Status> {
        let mut client = ConnectionsServiceClient::new(channel);
        count(match self {
            Self::Send(request) => {
                let answer = client.send(passed_on(request, authorization)).await;
                answer.map(|answer| answer.into_inner().recipients)
            }
            Self::Broadcast(request) => {
                let answer = client.broadcast(passed_on(request, authorization)).await;
                answer.map(|answer| answer.into_inner().recipients)
            }
            Self::Disconnect(request) => {
                let answer = client.disconnect(passed_on(request, authorization)).await;
                answer.map(|_| 1)
            }
        })
    }
}

impl OtherGateways {
    /// Asks all of them at once.
    pub(crate) async fn ask(&self, caller: &Caller, question: Question) -> Elsewhere {
        let mut asked = Vec::new();
        let mut elsewhere = Elsewhere::default();
        for member in self.members.all().iter().filter(|member| *member.name != *self.own) {
            // It may hold connections all the same; others should not wait long for that.
            let patience = if member.seems_up() { PATIENCE } else { SHORT_PATIENCE };
            let asking = question.clone().ask(member.channel.clone(), caller.authorization.clone());
            let gateway = member.name.clone();
            asked.push(async move {
                let answer = timeout(patience, asking).await;
                let answer = answer.unwrap_or_else(|_| Err(Status::unavailable("no answer")));
                if let Err(status) = &answer {
                    tracing::warn!(%gateway, %status, "could not reach another gateway");
                }
                answer
            });
        }
        for answer in join_all(asked).await {
            match answer {
                Ok(recipients) => elsewhere.recipients += recipients,
                Err(_) => elsewhere.unreachable += 1,
            }
        }
        elsewhere
    }
}

fn passed_on<T>(message: T, authorization: HeaderValue) -> Request<T> {
    let mut request = with_authorization(message, authorization);
    request.metadata_mut().insert(FORWARDED, MetadataValue::from_static("1"));
    request
}

fn count(answer: Result<i32, Status>) -> Result<usize, Status> {
    match answer {
        Ok(recipients) => Ok(usize::try_from(recipients).unwrap_or(0)),
        Err(status) if status.code() == Code::NotFound => Ok(0),
        Err(status) => Err(status),
    }
}

/// Whether another gateway has passed this call on.
pub(crate) fn is_passed_on<T>(request: &Request<T>) -> bool {
    request.metadata().contains_key(FORWARDED)
}

/// The answer when nobody was reached.
pub(crate) fn reached<T>(
    elsewhere: &Elsewhere,
    nobody: impl FnOnce() -> Status,
    answer: T,
    recipients: usize,
) -> Result<Response<T>, Status> {
    if recipients > 0 {
        return Ok(Response::new(answer));
    }
    if elsewhere.unreachable > 0 {
        return Err(Status::unavailable("a gateway that may hold it cannot be reached; try again"));
    }
    Err(nobody())
}
