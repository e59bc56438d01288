//! Implementation of `streamer.connections.v1.ConnectionsService`.

use std::sync::Arc;

use streamer_auth::{Caller, Subject, permissions};
use streamer_core::{CloseCode, ErrorCode, Timestamp, Uid, Violations, limits, saturate, validate};
use streamer_proto::{
    common::v1::Payload,
    connections::v1::{
        BroadcastRequest, BroadcastResponse, Connection, DisconnectRequest, DisconnectResponse,
        ListRequest, ListResponse, SendRequest, SendResponse,
        connections_service_server::ConnectionsService, send_request::Target,
    },
    timestamp,
};
use streamer_rpc::{
    JSON, ensure_valid, error_status, payload_bytes, read_page_size, read_page_token, store_status,
    validation_status,
};
use streamer_store::{ConnectionRecord, Store};
use tonic::{Request, Response, Status};

use crate::{
    connections::peer_gateways::{
        PeerGateways, PeerRequest, PeerResponses, is_forwarded, response_or_error,
    },
    gateway::Gateway,
    protocol::server_message,
};

const MAX_PAGE_SIZE: i32 = 1000;
const DEFAULT_PAGE_SIZE: usize = 100;
/// Maximum size of the reason in a close frame, in bytes.
const MAX_REASON_BYTES: usize = 123;

/// Implements the API for sending messages to connected users.
pub struct ConnectionsApi {
    gateway: Arc<Gateway>,
    store: Arc<dyn Store>,
    peers: Option<PeerGateways>,
}

impl ConnectionsApi {
    pub(crate) fn new(
        gateway: Arc<Gateway>,
        store: Arc<dyn Store>,
        peers: Option<PeerGateways>,
    ) -> Self {
        Self { gateway, store, peers }
    }

    /// Returns the gateways to which to forward a call; `None` if a gateway forwarded it.
    fn peers<T>(&self, request: &Request<T>) -> Option<PeerGateways> {
        self.peers.clone().filter(|_| !is_forwarded(request))
    }

    fn now(&self) -> Timestamp {
        self.gateway.clock.now()
    }
}

#[tonic::async_trait]
impl ConnectionsService for ConnectionsApi {
    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let caller = authorized_caller(&request, permissions::CONNECTIONS_READ)?;
        let request = request.into_inner();
        let mut violations = Violations::default();
        let limit =
            read_page_size(request.page_size, MAX_PAGE_SIZE, DEFAULT_PAGE_SIZE, &mut violations);
        let after = read_page_token(&request.page_token, &mut violations);
        ensure_valid(&violations)?;
        let user = (!request.user_id.is_empty()).then_some(request.user_id);
        let tenant = caller.principal.tenant.clone();
        let page = self.store.list_connections(tenant, user, after, limit, self.now()).await;
        let page = page.map_err(|error| store_status(&error))?;
        Ok(Response::new(ListResponse {
            connections: page.connections.into_iter().map(to_proto).collect(),
            next_page_token: page.next.map(|id| id.to_string()).unwrap_or_default(),
        }))
    }

    async fn send(&self, request: Request<SendRequest>) -> Result<Response<SendResponse>, Status> {
        let caller = authorized_caller(&request, permissions::CONNECTIONS_SEND)?;
        let (principal, peers) = (caller.principal.clone(), self.peers(&request));
        let is_one = matches!(request.get_ref().target, Some(Target::ConnectionId(_)));
        let peer_request = PeerRequest::Send(request.get_ref().clone());
        let SendRequest { target, topic, data } = request.into_inner();
        let mut violations = Violations::default();
        check_message(&topic, data.as_ref(), &mut violations);
        caller.set_audit_subject(|| match &target {
            Some(Target::UserId(name) | Target::ConnectionId(name)) => Subject::named(name),
            None => Subject::default(),
        });
        let Some(target) = target else {
            violations.push("target", "is required: connection_id or user_id");
            return Err(validation_status(&violations));
        };
        ensure_valid(&violations)?;
        let frame = server_message::push(&topic, data.as_ref(), self.now());
        let (recipients, description) = match target {
            Target::UserId(user) => {
                let pushed = self.gateway.registry.push(&principal.tenant, Some(&user), &frame);
                (pushed, format!("user {user:?}"))
            }
            Target::ConnectionId(id) => {
                let handle = id.parse().ok().and_then(|id: Uid| self.gateway.registry.get(id));
                let handle = handle.filter(|handle| handle.principal().tenant == principal.tenant);
                if let Some(handle) = &handle {
                    handle.push(frame);
                }
                (usize::from(handle.is_some()), format!("connection {id:?}"))
            }
        };
        let responses = match &peers {
            Some(peers) if !(is_one && recipients > 0) => {
                peers.call_all(&caller, peer_request).await
            }
            _ => PeerResponses::default(),
        };
        let all = recipients + responses.recipients;
        let response = SendResponse { recipients: saturate::to_i32(all) };
        response_or_error(&responses, || not_connected(&description), response, all)
    }

    async fn broadcast(
        &self,
        request: Request<BroadcastRequest>,
    ) -> Result<Response<BroadcastResponse>, Status> {
        let caller = authorized_caller(&request, permissions::CONNECTIONS_SEND)?;
        let (principal, peers) = (caller.principal.clone(), self.peers(&request));
        let peer_request = PeerRequest::Broadcast(request.get_ref().clone());
        let BroadcastRequest { topic, data } = request.into_inner();
        let mut violations = Violations::default();
        check_message(&topic, data.as_ref(), &mut violations);
        ensure_valid(&violations)?;
        let frame = server_message::push(&topic, data.as_ref(), self.now());
        let mut recipients = self.gateway.registry.push(&principal.tenant, None, &frame);
        if let Some(peers) = peers {
            let responses = peers.call_all(&caller, peer_request).await;
            recipients += responses.recipients;
            if recipients == 0 && responses.unreachable > 0 {
                let reason = "a gateway is unreachable, and no client is connected to the others";
                return Err(Status::unavailable(reason));
            }
        }
        let recipients = saturate::to_i32(recipients);
        Ok(Response::new(BroadcastResponse { recipients }))
    }

    async fn disconnect(
        &self,
        request: Request<DisconnectRequest>,
    ) -> Result<Response<DisconnectResponse>, Status> {
        let caller = authorized_caller(&request, permissions::CONNECTIONS_DISCONNECT)?;
        let (principal, peers) = (caller.principal.clone(), self.peers(&request));
        let peer_request = PeerRequest::Disconnect(request.get_ref().clone());
        let DisconnectRequest { connection_id, reason } = request.into_inner();
        let mut violations = Violations::default();
        caller.set_audit_subject(|| Subject::named(&connection_id));
        violations.check("reason", validate::at_most(reason.len(), MAX_REASON_BYTES, "reason"));
        ensure_valid(&violations)?;
        let handle = connection_id.parse().ok().and_then(|id| self.gateway.registry.get(id));
        match handle.filter(|handle| handle.principal().tenant == principal.tenant) {
            Some(handle) => {
                handle.close(CloseCode::PolicyViolation, &reason);
                Ok(Response::new(DisconnectResponse {}))
            }
            None => {
                let responses = match peers {
                    Some(peers) => peers.call_all(&caller, peer_request).await,
                    None => PeerResponses::default(),
                };
                let not_connected = || not_connected(&format!("connection {connection_id:?}"));
                response_or_error(
                    &responses,
                    not_connected,
                    DisconnectResponse {},
                    responses.recipients,
                )
            }
        }
    }
}

fn authorized_caller<T>(request: &Request<T>, permission: &str) -> Result<Caller, Status> {
    let caller = Caller::of(request)?;
    caller.require(permission)?;
    Ok(caller)
}

fn check_message(topic: &str, data: Option<&Payload>, violations: &mut Violations) {
    if topic.is_empty() {
        violations.push("topic", "is required");
    }
    violations.check("topic", validate::at_most(topic.len(), limits::MAX_TOPIC_BYTES, "topic"));
    let Some(data) = data else { return };
    let bytes = payload_bytes(Some(data));
    violations.check("data", validate::at_most(bytes.len(), limits::MAX_PUSH_BYTES, "data"));
    if !(data.content_type.is_empty() || data.content_type == JSON) {
        violations.push("data.content_type", "must be application/json");
    }
    if let Err(error) = serde_json::from_slice::<&serde_json::value::RawValue>(&bytes) {
        violations.push("data", format!("is not JSON: {error}"));
    }
}

fn not_connected(description: &str) -> Status {
    let truncated: String = description.chars().take(160).collect();
    error_status(ErrorCode::NotFound, format!("{truncated} is not connected"))
}

fn to_proto(record: ConnectionRecord) -> Connection {
    Connection {
        connection_id: record.id.to_string(),
        tenant_id: record.owner.tenant,
        user_id: record.owner.user,
        gateway: record.gateway,
        remote_address: record.remote_address,
        user_agent: record.user_agent,
        connect_time: Some(timestamp(record.connect_time.as_millis())),
    }
}
