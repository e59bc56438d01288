//! Calls to other gateways about their connections.

use std::time::Duration;

use futures_util::future::join_all;
use http::HeaderValue;
use streamer_auth::Caller;
use streamer_cluster::Instances;
use streamer_proto::{
    connections::v1::{BroadcastRequest, DisconnectRequest, SendRequest},
    stubs::ConnectionsServiceStub,
};
use streamer_rpc::{Channel, FORWARDED, with_authorization};
use tokio::time::timeout;
use tonic::{Code, Request, Response, Status, metadata::MetadataValue};

/// Timeout of a call to a gateway.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// Timeout of a call to a gateway that was unreachable at the last attempt.
const UNREACHABLE_CALL_TIMEOUT: Duration = Duration::from_millis(500);

/// This gateway and its peers.
#[derive(Clone)]
pub struct PeerGateways {
    /// Name of this gateway among the instances.
    pub own: String,
    /// All gateways, including this one.
    pub instances: Instances,
}

/// Combined responses of the other gateways.
#[derive(Default)]
pub(crate) struct PeerResponses {
    /// Number of connections that received the request.
    pub(crate) recipients: usize,
    /// Number of unreachable gateways.
    pub(crate) unreachable: usize,
}

/// Request that is sent to the other gateways.
#[derive(Clone)]
pub(crate) enum PeerRequest {
    Send(SendRequest),
    Broadcast(BroadcastRequest),
    Disconnect(DisconnectRequest),
}

impl PeerRequest {
    /// Calls a gateway. Returns the number of connections that received the request.
    async fn send(self, channel: Channel, authorization: HeaderValue) -> Result<usize, Status> {
        let mut client = ConnectionsServiceStub::new(channel);
        recipient_count(match self {
            Self::Send(request) => {
                let response = client.send(forwarded(request, authorization)).await;
                response.map(|response| response.into_inner().recipients)
            }
            Self::Broadcast(request) => {
                let response = client.broadcast(forwarded(request, authorization)).await;
                response.map(|response| response.into_inner().recipients)
            }
            Self::Disconnect(request) => {
                let response = client.disconnect(forwarded(request, authorization)).await;
                response.map(|_| 1)
            }
        })
    }
}

impl PeerGateways {
    /// Calls all other gateways concurrently.
    pub(crate) async fn call_all(&self, caller: &Caller, request: PeerRequest) -> PeerResponses {
        let mut calls = Vec::new();
        let mut responses = PeerResponses::default();
        for instance in self.instances.all().iter().filter(|instance| *instance.name != *self.own) {
            // An unhealthy gateway may still have connections, but callers should not wait long for it.
            let limit =
                if instance.is_reachable() { CALL_TIMEOUT } else { UNREACHABLE_CALL_TIMEOUT };
            let call = request.clone().send(instance.channel.clone(), caller.authorization.clone());
            let gateway = instance.name.clone();
            calls.push(async move {
                let response = timeout(limit, call).await;
                let response = response.unwrap_or_else(|_| Err(Status::unavailable("no response")));
                if let Err(status) = &response {
                    tracing::warn!(%gateway, %status, "gateway unreachable");
                }
                response
            });
        }
        for response in join_all(calls).await {
            match response {
                Ok(recipients) => responses.recipients += recipients,
                Err(_) => responses.unreachable += 1,
            }
        }
        responses
    }
}

fn forwarded<T>(message: T, authorization: HeaderValue) -> Request<T> {
    let mut request = with_authorization(message, authorization);
    request.metadata_mut().insert(FORWARDED, MetadataValue::from_static("1"));
    request
}

fn recipient_count(response: Result<i32, Status>) -> Result<usize, Status> {
    match response {
        Ok(recipients) => Ok(usize::try_from(recipients).unwrap_or(0)),
        Err(status) if status.code() == Code::NotFound => Ok(0),
        Err(status) => Err(status),
    }
}

/// Returns whether a gateway forwarded the call.
pub(crate) fn is_forwarded<T>(request: &Request<T>) -> bool {
    request.metadata().contains_key(FORWARDED)
}

/// Returns the response if a connection received the request, otherwise an error.
pub(crate) fn response_or_error<T>(
    responses: &PeerResponses,
    not_connected: impl FnOnce() -> Status,
    response: T,
    recipients: usize,
) -> Result<Response<T>, Status> {
    if recipients > 0 {
        return Ok(Response::new(response));
    }
    if responses.unreachable > 0 {
        return Err(Status::unavailable(
            "a gateway that may hold the connection is unreachable; try again",
        ));
    }
    Err(not_connected())
}
