//! Commands for requests and connections that print one response.

use serde_json::{Value, json};
use streamer_client::{Api, ClientError, Message, Session, TokenSource};
use streamer_core::{Clock, SystemClock, Timestamp};
use streamer_proto::{
    common::v1::{Payload, payload::Body},
    connections::v1::{
        BroadcastRequest, DisconnectRequest, ListRequest, SendRequest, send_request::Target,
    },
    millis,
    router::{
        self,
        v1::{ListActionsRequest, RedriveManyRequest, RedriveRequest},
    },
    timestamp,
};
use streamer_rpc::{state_from_proto, state_to_proto};

use crate::{
    Exit,
    arguments::{
        CancelArguments, CommonArguments, ConnectionsArguments, ConnectionsCommand, GetArguments,
        ListArguments, RedriveArguments,
    },
    terminal::{print_error_line, print_line},
};

pub(crate) async fn get(arguments: GetArguments) -> anyhow::Result<Exit> {
    let message = json!({ "type": "get", "request_id": arguments.id });
    let response = exchange(&arguments.common, &message, "request").await?;
    print_response(&arguments.common, &response)
}

pub(crate) async fn list(arguments: ListArguments) -> anyhow::Result<Exit> {
    let states: Vec<&str> = arguments.states.iter().map(|state| state.as_str()).collect();
    let value: Value = if arguments.tenant.is_empty() {
        let message = json!({
            "type": "list", "states": states, "limit": arguments.limit,
            "page_token": arguments.page_token,
        });
        let response = exchange(&arguments.common, &message, "requests").await?;
        serde_json::from_str(&response.text)?
    } else {
        list_of_tenant(&arguments).await?
    };
    let requests = value["requests"].as_array().cloned().unwrap_or_default();
    if arguments.common.prints_json() {
        for request in &requests {
            print_line(request)?;
        }
    } else {
        print_line(format_args!(
            "{:<26}  {:<9}  {:<20}  {:<24}  ID",
            "UID", "STATE", "ACTION", "CREATED"
        ))?;
        for request in &requests {
            let text = |name: &str| request[name].as_str().unwrap_or("").to_owned();
            let (uid, state, action) = (text("uid"), text("state"), text("action"));
            let (created, id) = (text("create_time"), text("request_id"));
            print_line(format_args!("{uid:<26}  {state:<9}  {action:<20}  {created:<24}  {id}"))?;
        }
    }
    if let Some(next) = value["next_page_token"].as_str().filter(|next| !next.is_empty()) {
        print_error_line(&format!("More requests exist: --page-token {next}"));
    }
    Ok(Exit::Done)
}

/// Lists a tenant's requests for an operator, in the format of the response to `list`.
async fn list_of_tenant(arguments: &ListArguments) -> anyhow::Result<Value> {
    let api = arguments.common.api().await?;
    let call = api.call(router::v1::ListRequest {
        states: arguments.states.iter().map(|state| state_to_proto(*state).into()).collect(),
        page_size: arguments.limit,
        page_token: arguments.page_token.clone(),
        tenant_id: arguments.tenant.clone(),
        ..router::v1::ListRequest::default()
    });
    let page = api.router().list(call).await.map_err(|status| api.error(&status))?.into_inner();
    let requests = page.requests.iter().map(|request| {
        let state = state_from_proto(request.state).map(streamer_core::RequestState::as_str);
        json!({
            "request_id": request.request_id, "uid": request.uid, "user": request.user_id,
            "action": request.action, "state": state,
            "create_time": request.create_time.as_ref().map(|time| {
                Timestamp::from_millis(millis(time)).to_string()
            }),
        })
    });
    let requests: Vec<Value> = requests.collect();
    Ok(json!({ "requests": requests, "next_page_token": page.next_page_token }))
}

pub(crate) async fn cancel(arguments: CancelArguments) -> anyhow::Result<Exit> {
    let message =
        json!({ "type": "cancel", "request_id": arguments.id, "reason": arguments.reason });
    let response = exchange(&arguments.common, &message, "acknowledgment").await?;
    print_response(&arguments.common, &response)
}

pub(crate) async fn redrive(arguments: RedriveArguments) -> anyhow::Result<Exit> {
    let api = arguments.common.api().await?;
    let Some(request_id) = arguments.id.clone() else {
        return redrive_all(&api, &arguments).await;
    };
    let call = api.call(RedriveRequest { request_id, id: arguments.new_id });
    let response = api.router().redrive(call).await.map_err(|status| api.error(&status))?;
    let request = response.into_inner().request.unwrap_or_default();
    let line = json!({
        "request_id": request.request_id, "uid": request.uid, "redrive_of": request.redrive_of,
    });
    print_line(line)?;
    Ok(Exit::Done)
}

async fn redrive_all(api: &Api, arguments: &RedriveArguments) -> anyhow::Result<Exit> {
    let from = arguments.since.map(|since| SystemClock.now().minus(since).as_millis());
    let mut request = RedriveManyRequest {
        states: arguments.states.iter().map(|state| state_to_proto(*state).into()).collect(),
        action: arguments.action.clone(),
        create_time_from: from.map(timestamp),
        dry_run: arguments.dry_run,
        ..RedriveManyRequest::default()
    };
    let (mut count, mut failed) = (0, 0);
    let outcome = if arguments.dry_run { "would be redriven" } else { "redriven" };
    loop {
        let call = api.call(request.clone());
        let page = match api.router().redrive_many(call).await {
            Ok(response) => response.into_inner(),
            Err(status) => {
                eprintln!("{count} {outcome} so far; run the same command again to continue");
                return Err(api.error(&status).into());
            }
        };
        for redriven in page.redriven {
            if redriven.error.is_some() {
                failed += 1;
            } else {
                count += 1;
            }
            let mut line = json!({ "redrive_of": redriven.uid });
            if let Some(error) = redriven.error {
                line["error"] = error.message.into();
            }
            if let Some(request) = redriven.request {
                line["request_id"] = request.request_id.into();
                line["uid"] = request.uid.into();
            }
            print_line(line)?;
        }
        if page.next_page_token.is_empty() {
            eprintln!("{count} {outcome}");
            if failed > 0 {
                eprintln!("{failed} could not be redriven");
                return Ok(Exit::Failed);
            }
            return Ok(Exit::Done);
        }
        request.page_token = page.next_page_token;
    }
}

pub(crate) async fn actions(common: CommonArguments) -> anyhow::Result<Exit> {
    let api = common.api().await?;
    let call = api.call(ListActionsRequest {});
    let response = api.router().list_actions(call).await.map_err(|status| api.error(&status))?;
    for action in response.into_inner().actions {
        if common.prints_json() {
            let schema: Value = serde_json::from_str(&action.payload_schema).unwrap_or(Value::Null);
            let line = json!({
                "name": action.name, "description": action.description, "sync": action.sync,
                "estimated_duration_ms": action.estimated_duration_ms,
                "max_attempts": action.max_attempts, "permission": action.permission,
                "workers": action.workers, "available": action.available,
                "payload_schema": schema,
            });
            print_line(line)?;
        } else {
            let kind = if action.sync { "sync" } else { "async" };
            let runs_on = match (action.available, action.workers) {
                (false, _) => "unavailable".to_owned(),
                (true, 0) => "server".to_owned(),
                (true, workers) => format!("{workers} worker(s)"),
            };
            print_line(format_args!(
                "{:<20}  {kind:<5}  {runs_on:<12}  {}",
                action.name, action.description
            ))?;
        }
    }
    Ok(Exit::Done)
}

pub(crate) async fn connections(arguments: ConnectionsArguments) -> anyhow::Result<Exit> {
    match arguments.command {
        ConnectionsCommand::List { user, common } => list_connections(&common, user).await,
        ConnectionsCommand::Send { topic, data, user, connection, common } => {
            let target = user.map(Target::UserId).or(connection.map(Target::ConnectionId));
            let api = common.api().await?;
            let call = api.call(SendRequest { target, topic, data: Some(payload(data)) });
            let sent = api.connections().send(call).await.map_err(|status| api.error(&status))?;
            print_line(json!({ "recipients": sent.into_inner().recipients }))?;
            Ok(Exit::Done)
        }
        ConnectionsCommand::Broadcast { topic, data, common } => {
            let api = common.api().await?;
            let call = api.call(BroadcastRequest { topic, data: Some(payload(data)) });
            let sent =
                api.connections().broadcast(call).await.map_err(|status| api.error(&status))?;
            print_line(json!({ "recipients": sent.into_inner().recipients }))?;
            Ok(Exit::Done)
        }
        ConnectionsCommand::Disconnect { connection, reason, common } => {
            let api = common.api().await?;
            let call = api.call(DisconnectRequest { connection_id: connection, reason });
            api.connections().disconnect(call).await.map_err(|status| api.error(&status))?;
            Ok(Exit::Done)
        }
    }
}

async fn list_connections(common: &CommonArguments, user_id: String) -> anyhow::Result<Exit> {
    let api = common.api().await?;
    let mut page_token = String::new();
    loop {
        let call = api.call(ListRequest { user_id: user_id.clone(), page_size: 1000, page_token });
        let listed = api.connections().list(call).await.map_err(|status| api.error(&status))?;
        let page = listed.into_inner();
        for connection in page.connections {
            let since = connection.connect_time.as_ref().map_or(0, millis);
            let line = json!({
                "connection_id": connection.connection_id, "user_id": connection.user_id,
                "tenant_id": connection.tenant_id, "gateway": connection.gateway,
                "remote_address": connection.remote_address, "user_agent": connection.user_agent,
                "connect_time": Timestamp::from_millis(since).to_string(),
            });
            print_line(line)?;
        }
        if page.next_page_token.is_empty() {
            return Ok(Exit::Done);
        }
        page_token = page.next_page_token;
    }
}

fn payload(json: String) -> Payload {
    Payload { content_type: String::new(), body: Some(Body::Data(json.into())) }
}

/// Sends a message over a WebSocket and returns the response, which has the type `expected`.
async fn exchange(
    common: &CommonArguments,
    message: &Value,
    expected: &str,
) -> anyhow::Result<Message> {
    let token = common.tokens().token().await.map_err(ClientError::from)?;
    let mut session = Session::connect(&common.server, &token).await?;
    session.send(message.to_string()).await?;
    loop {
        let response = session.next().await?;
        if response.kind == expected {
            session.close().await?;
            return Ok(response);
        }
        if response.kind == "error" {
            return Err(ClientError::Rejected(response.error()).into());
        }
    }
}

fn print_response(common: &CommonArguments, response: &Message) -> anyhow::Result<Exit> {
    if common.prints_json() {
        print_line(&response.text)?;
    } else {
        let value: Value = serde_json::from_str(&response.text)?;
        print_line(serde_json::to_string_pretty(&value)?)?;
    }
    Ok(Exit::Done)
}
