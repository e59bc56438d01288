//! `streamer get`, `list`, `cancel` and `redrive`.

use std::time::Duration;

use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};
use streamer_client::{Api, ClientError, ReceivedMessage, ServerMessage, Session, TokenSource};
use streamer_core::{Clock, SystemClock, Timestamp, saturate};
use streamer_proto::{
    millis,
    router::{
        self,
        v1::{RedriveManyRequest, RedriveRequest},
    },
    timestamp,
};
use streamer_rpc::{state_from_proto, state_to_proto};

use crate::{
    Exit,
    arguments::{CommonArguments, parse_duration},
    terminal::{print_error_line, print_line},
};

/// Arguments of `streamer get`.
#[derive(Args, Clone, Debug)]
pub(crate) struct GetArguments {
    /// ID or UID of the request.
    pub(crate) id: String,
    #[command(flatten)]
    pub(crate) common: CommonArguments,
}

/// Arguments of `streamer list`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ListArguments {
    /// List only requests in this state: QUEUED, RUNNING, SUCCEEDED, FAILED or CANCELLED; may be repeated.
    #[arg(long = "state", value_name = "STATE")]
    pub(crate) states: Vec<streamer_core::RequestState>,
    /// Maximum number of requests to list.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i32).range(1..=500))]
    pub(crate) limit: i32,
    /// Page token that a previous `streamer list` printed.
    #[arg(long, default_value = "", value_name = "PAGE_TOKEN")]
    pub(crate) page_token: String,
    /// List the requests of all users of the given tenant; requires permission `operator`.
    #[arg(long, default_value = "", value_name = "TENANT", hide_default_value = true)]
    pub(crate) tenant: String,
    #[command(flatten)]
    pub(crate) common: CommonArguments,
}

/// Arguments of `streamer cancel`.
#[derive(Args, Clone, Debug)]
pub(crate) struct CancelArguments {
    /// ID or UID of the request.
    pub(crate) id: String,
    /// Reason for the cancellation, which is stored in the event log.
    #[arg(long, default_value = "")]
    pub(crate) reason: String,
    #[command(flatten)]
    pub(crate) common: CommonArguments,
}

/// Arguments of `streamer redrive`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  streamer redrive nightly-1
  streamer redrive --all --action generate_report --since 24h --dry-run
  streamer redrive --all --state FAILED --state CANCELLED

With --all, requests that were already redriven with --all are skipped.")]
pub(crate) struct RedriveArguments {
    /// ID or UID of the failed or cancelled request.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) id: Option<String>,
    /// ID of the new request.
    #[arg(long, default_value = "", conflicts_with = "all")]
    pub(crate) new_id: String,
    /// Redrive all failed requests that match the other options.
    #[arg(long)]
    pub(crate) all: bool,
    /// With --all: redrive only requests in this state, FAILED or CANCELLED; may be repeated [default:
    /// FAILED].
    #[arg(long = "state", value_name = "STATE", requires = "all")]
    pub(crate) states: Vec<streamer_core::RequestState>,
    /// With --all: redrive only requests for this action.
    #[arg(long, default_value = "", requires = "all")]
    pub(crate) action: String,
    /// With --all: redrive only requests accepted within this period before now: a number followed by s, m, h
    /// or d.
    #[arg(long, requires = "all", value_parser = parse_duration)]
    pub(crate) since: Option<Duration>,
    /// With --all: print the requests that would be redriven, without redriving them.
    #[arg(long, requires = "all")]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) common: CommonArguments,
}

pub(crate) async fn get(arguments: GetArguments) -> anyhow::Result<Exit> {
    let message = json!({ "type": "get", "request_id": arguments.id });
    let response = exchange(&arguments.common, &message, "request").await?;
    print_response(&arguments.common, &response)
}

pub(crate) async fn list(arguments: ListArguments) -> anyhow::Result<Exit> {
    let page = list_up_to(arguments.clone()).await?;
    if arguments.common.prints_json() {
        for request in &page.requests {
            print_line(request)?;
        }
    } else {
        print_line(format_args!(
            "{:<26}  {:<9}  {:<20}  {:<24}  ID",
            "UID", "STATE", "ACTION", "CREATED"
        ))?;
        for request in &page.requests {
            let Row { uid, state, action, create_time, request_id } = Row::deserialize(request)?;
            let (state, created) = (state.unwrap_or_default(), create_time.unwrap_or_default());
            print_line(format_args!(
                "{uid:<26}  {state:<9}  {action:<20}  {created:<24}  {request_id}"
            ))?;
        }
    }
    if !page.next_page_token.is_empty() {
        print_error_line(&format!("More requests exist: --page-token {}", page.next_page_token));
    }
    Ok(Exit::Done)
}

/// Page of requests, in the format of message `requests`. The requests are printed with all their members, including
/// those that this version does not know.
#[derive(Deserialize)]
struct Page {
    requests: Vec<Value>,
    next_page_token: String,
}

/// Members of a request that are printed on a terminal.
#[derive(Deserialize)]
struct Row {
    uid: String,
    state: Option<String>,
    action: String,
    create_time: Option<String>,
    request_id: String,
}

/// Lists requests up to the limit of the arguments. A page of the server may be short, or empty, although further pages
/// follow.
async fn list_up_to(mut arguments: ListArguments) -> anyhow::Result<Page> {
    let mut requests = Vec::new();
    loop {
        let page = if arguments.tenant.is_empty() {
            list_own(&arguments).await?
        } else {
            list_of_tenant(&arguments).await?
        };
        arguments.limit -= saturate::to_i32(page.requests.len());
        requests.extend(page.requests);
        if arguments.limit <= 0 || page.next_page_token.is_empty() {
            return Ok(Page { requests, next_page_token: page.next_page_token });
        }
        arguments.page_token = page.next_page_token;
    }
}

/// Lists the caller's requests.
async fn list_own(arguments: &ListArguments) -> anyhow::Result<Page> {
    let states: Vec<&str> = arguments.states.iter().map(|state| state.as_str()).collect();
    let message = json!({
        "type": "list", "states": states, "limit": arguments.limit,
        "page_token": arguments.page_token,
    });
    let response = exchange(&arguments.common, &message, "requests").await?;
    Ok(serde_json::from_str(&response.text)?)
}

/// Lists a tenant's requests for an operator.
async fn list_of_tenant(arguments: &ListArguments) -> anyhow::Result<Page> {
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
    Ok(Page { requests: requests.collect(), next_page_token: page.next_page_token })
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

/// Sends a message over a WebSocket and returns the response, which has the type `expected`.
async fn exchange(
    common: &CommonArguments,
    message: &Value,
    expected: &str,
) -> anyhow::Result<ReceivedMessage> {
    let token = common.tokens().token().await.map_err(ClientError::from)?;
    let mut session = Session::connect(&common.server, &token).await?;
    session.send(message.to_string()).await?;
    loop {
        let response = session.next().await?;
        if response.message.kind() == expected {
            session.close().await?;
            return Ok(response);
        }
        if let ServerMessage::Error(message) = response.message {
            return Err(ClientError::Rejected(message.error.into()).into());
        }
    }
}

fn print_response(common: &CommonArguments, response: &ReceivedMessage) -> anyhow::Result<Exit> {
    if common.prints_json() {
        print_line(&response.text)?;
    } else {
        let value: Value = serde_json::from_str(&response.text)?;
        print_line(serde_json::to_string_pretty(&value)?)?;
    }
    Ok(Exit::Done)
}
