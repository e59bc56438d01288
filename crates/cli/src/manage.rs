//! Commands about requests and connections that answer once.

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
        CancelArguments, Common, ConnectionsArguments, ConnectionsCommand, ListArguments,
        OneArguments, RedriveArguments,
    },
    terminal::{print_error_line, print_line},
};

pub(crate) async fn get(arguments: OneArguments) -> anyhow::Result<Exit> {
    let message = json!({ "type": "get", "request_id": arguments.id });
    let answer = ask(&arguments.common, &message, "request").await?;
    print_answer(&arguments.common, &answer)
}

pub(crate) async fn list(arguments: ListArguments) -> anyhow::Result<Exit> {
    let states: Vec<&str> = arguments.states.iter().map(|state| state.as_str()).collect();
    let value: Value = if arguments.tenant.is_empty() {
        let message = json!({
            "type": "list", "states": states, "limit": arguments.limit,
            "page_token": arguments.page_token,
        });
        let answer = ask(&arguments.common, &message, "requests").await?;
        serde_json::from_str(&answer.text)?
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
            "{:<26}  {:<9}  {:<20}  {:<24}  NAME",
            "UID", "STATE", "ACTION", "CREATED"
        ))?;
        for request in &requests {
            let text = |name: &str| request[name].as_str().unwrap_or("").to_owned();
            let (uid, state, action) = (text("uid"), text("state"), text("action"));
            let (created, name) = (text("create_time"), text("request_id"));
            print_line(format_args!("{uid:<26}  {state:<9}  {action:<20}  {created:<24}  {name}"))?;
        }
    }
    if let Some(next) = value["next_page_token"].as_str().filter(|next| !next.is_empty()) {
        print_error_line(&format!("There are more: --page-token {next}"));
    }
    Ok(Exit::Done)
}

/// What an operator sees of a tenant, in the shape of the answer to `list`.
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
    let answer = ask(&arguments.common, &message, "acknowledgment").await?;
    print_answer(&arguments.common, &answer)
}

pub(crate) async fn redrive(arguments: RedriveArguments) -> anyhow::Result<Exit> {
    let api = arguments.common.api().await?;
    let Some(request_id) = arguments.id.clone() else {
        return redrive_all(&api, &arguments).await;
    };
    let call = api.call(RedriveRequest { request_id, id: arguments.new_id });
    let response = api.router().redrive(call).await.map_err(|status| api.error(&status))?;
    let request = response.into_inner().request.unwrap_or_default();
    let told = json!({
        "request_id": request.request_id, "uid": request.uid, "redrive_of": request.redrive_of,
    });
    print_line(told)?;
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
    let done = if arguments.dry_run { "would be redriven" } else { "redriven" };
    loop {
        let call = api.call(request.clone());
        let page = match api.router().redrive_many(call).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                eprintln!("{count} {done} so far; the same command continues");
                return Err(api.error(&status).into());
            }
        };
        for redriven in page.redriven {
            if redriven.error.is_some() {
                failed += 1;
            } else {
                count += 1;
            }
            let mut told = json!({ "redrive_of": redriven.uid });
            if let Some(error) = redriven.error {
                told["error"] = error.message.into();
            }
            if let Some(request) = redriven.request {
                told["request_id"] = request.request_id.into();
                told["uid"] = request.uid.into();
            }
            print_line(told)?;
        }
        if page.next_page_token.is_empty() {
            eprintln!("{count} {done}");
            if failed > 0 {
                eprintln!("{failed} could not be redriven");
                return Ok(Exit::Failed);
            }
            return Ok(Exit::Done);
        }
        request.page_token = page.next_page_token;
    }
}

pub(crate) async fn actions(common: Common) -> anyhow::Result<Exit> {
    let api = common.api().await?;
    let call = api.call(ListActionsRequest {});
    let response = api.router().list_actions(call).await.map_err(|status| api.error(&status))?;
    for action in response.into_inner().actions {
        if common.prints_json() {
            let schema: Value = serde_json::from_str(&action.payload_schema).unwrap_or(Value::Null);
            let told = json!({
                "name": action.name, "description": action.description, "sync": action.sync,
                "estimated_duration_ms": action.estimated_duration_ms,
                "max_attempts": action.max_attempts, "permission": action.permission,
                "workers": action.workers, "available": action.available,
                "payload_schema": schema,
            });
            print_line(told)?;
        } else {
            let kind = if action.sync { "sync" } else { "async" };
            let who = match (action.available, action.workers) {
                (false, _) => "nobody now".to_owned(),
                (true, 0) => "server".to_owned(),
                (true, workers) => format!("{workers} worker(s)"),
            };
            print_line(format_args!(
                "{:<20}  {kind:<5}  {who:<12}  {}",
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

async fn list_connections(common: &Common, user_id: String) -> anyhow::Result<Exit> {
    let api = common.api().await?;
    let mut page_token = String::new();
    loop {
        let call = api.call(ListRequest { user_id: user_id.clone(), page_size: 1000, page_token });
        let listed = api.connections().list(call).await.map_err(|status| api.error(&status))?;
        let page = listed.into_inner();
        for connection in page.connections {
            let since = connection.connect_time.as_ref().map_or(0, millis);
            let told = json!({
                "connection_id": connection.connection_id, "user_id": connection.user_id,
                "tenant_id": connection.tenant_id, "gateway": connection.gateway,
                "remote_address": connection.remote_address, "user_agent": connection.user_agent,
                "connect_time": Timestamp::from_millis(since).to_string(),
            });
            print_line(told)?;
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

/// One question over a WebSocket, and its answer.
async fn ask(common: &Common, message: &Value, expected: &str) -> anyhow::Result<Message> {
    let token = common.tokens().token().await.map_err(ClientError::from)?;
    let mut session = Session::connect(&common.server, &token).await?;
    session.send(message.to_string()).await?;
    loop {
        let answer = session.next().await?;
        if answer.kind == expected {
            session.close().await?;
            return Ok(answer);
        }
        if answer.kind == "error" {
            return Err(ClientError::Refused(answer.error()).into());
        }
    }
}

fn print_answer(common: &Common, answer: &Message) -> anyhow::Result<Exit> {
    if common.prints_json() {
        print_line(&answer.text)?;
    } else {
        let value: Value = serde_json::from_str(&answer.text)?;
        print_line(serde_json::to_string_pretty(&value)?)?;
    }
    Ok(Exit::Done)
}
