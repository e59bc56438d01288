//! Table of the expected reply to each kind of caller, by method and by message.

use futures_util::{StreamExt, future::BoxFuture, stream};
use serde_json::{Value, json};
use streamer_proto::{
    admin::v1::{BackupRequest, admin_service_client::AdminServiceClient},
    common::v1::RequestState,
    connections::v1::{
        self as connections, connections_service_client::ConnectionsServiceClient as Connections,
        send_request::Target,
    },
    longrunning::{self as operations, operations_client::OperationsClient as Operations},
    processor::v1::{
        Attempt, Hello, Report, WorkRequest, WorkResponse, report::Kind, work_request,
        work_response::Message, worker_service_client::WorkerServiceClient,
    },
    progress::v1::{self as progress, progress_service_client::ProgressServiceClient as Progress},
    router::v1::{self as router, router_service_client::RouterServiceClient as Router},
};
use streamer_rpc::{json_payload, with_authorization};
use streamer_tests::within_timeout;
use tonic::{Code, Request, Status, Streaming, transport::Channel};

pub(crate) const HOUR_S: i64 = 3600;
pub(crate) const OWNER: &str = "ann@acme";
/// An action that a worker of the owner's tenant declares for that tenant.
pub(crate) const ACTION: &str = "private-report";
pub(crate) const READ: &[&str] = &["requests:read"];
pub(crate) const WRITE: &[&str] = &["requests:read", "requests:write"];

/// Expected reply, as a text that the reply must contain.
#[derive(Clone, Copy)]
pub(crate) enum Expected {
    Sees(&'static str),
    /// The reply must also be the same as for an object that does not exist.
    Hidden(&'static str),
}
pub(crate) use Expected::{Hidden, Sees};

const DENIED: Expected = Hidden("PermissionDenied");

/// Kind of caller: a column of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Caller {
    Owner,
    /// A different user of the tenant, with only the permissions of the row.
    Permitted,
    /// A different user of the tenant, without permissions.
    WithoutPermission,
    /// A user with the same name in a different tenant, with permission `*`.
    OtherTenant,
    /// A user of a third tenant, with permission `operator`.
    Operator,
}

pub(crate) struct Row {
    /// Path of a method, or type of a WebSocket message.
    pub(crate) name: String,
    pub(crate) permissions: &'static [&'static str],
    /// Expected replies, by caller.
    pub(crate) expected: [Expected; 5],
    pub(crate) call: Call,
}

pub(crate) enum Call {
    Method(fn(Object, Channel, String) -> BoxFuture<'static, Result<String, Status>>),
    Message(fn(Object) -> Value),
}

/// Object of the owner, or an object that does not exist.
#[derive(Clone)]
pub(crate) struct Object {
    /// `uid` of a running request.
    pub(crate) uid: String,
    /// First message with which the worker resumes the running request.
    pub(crate) resume_hello: Hello,
    /// `uid` of a cancelled request.
    pub(crate) ended: String,
    /// The owner's ID of the cancelled request.
    pub(crate) request_id: String,
    pub(crate) user: String,
    pub(crate) connection: String,
    pub(crate) action: String,
    pub(crate) token: String,
}

/// Expects that only the owner and permitted users of the tenant see an object.
const fn hidden(seen: &'static str, hidden: &'static str) -> [Expected; 5] {
    [Sees(seen), Sees(seen), Hidden(hidden), Hidden(hidden), Hidden(hidden)]
}

/// Expects that a call requires a permission in every tenant.
const fn denied(seen: &'static str, other_tenant: &'static str) -> [Expected; 5] {
    [Sees(seen), Sees(seen), DENIED, Hidden(other_tenant), DENIED]
}

/// Expects that all users of the tenant see that an object exists.
const fn shared(seen: &'static str, denied: &'static str, hidden: &'static str) -> [Expected; 5] {
    [Sees(seen), Sees(seen), Sees(denied), Hidden(hidden), Hidden(hidden)]
}

/// Expects that only the owner sees an object.
const fn own(seen: &'static str, hidden: &'static str) -> [Expected; 5] {
    [Sees(seen), Hidden(hidden), Hidden(hidden), Hidden(hidden), Hidden(hidden)]
}

/// Creates the rows of methods: name, permissions, expected replies, and the message about an object. `first`
/// selects the first message of a stream.
macro_rules! methods {
    ($service:literal, $client:ident: $($name:ident.$method:ident $(.$first:ident)?,
        $permissions:expr, $expected:expr, |$it:pat_param| $message:expr;)*) => {
        vec![$(Row {
            name: format!("/{}/{}", $service, stringify!($name)),
            permissions: $permissions,
            expected: $expected,
            call: Call::Method(|$it, channel, token| Box::pin(async move {
                let reply = $client::new(channel).$method(authorized($message, &token)).await?;
                let reply = reply.into_inner();
                $(let reply = $first(reply).await?;)?
                Ok(format!("{reply:?}"))
            })),
        }),*]
    };
}

/// Creates the rows of WebSocket messages.
macro_rules! messages {
    ($($name:literal, $permissions:expr, $expected:expr, |$it:pat_param| {$($message:tt)*};)*) => {
        vec![$(Row {
            name: $name.into(),
            permissions: $permissions,
            expected: $expected,
            call: Call::Message(|$it| json!({"type": $name, $($message)*})),
        }),*]
    };
}

pub(crate) fn rows() -> Vec<Row> {
    let router = methods! { "streamer.router.v1.RouterService", Router:
        Submit.submit, &[], own("duplicate: true", "duplicate: false"), |it| repeat(&it);
        Submit.submit, &["reports:run"], shared("duplicate: false", "PermissionDenied", "NotFound"),
            |it| delayed(&it);
        SubmitAndWatch.submit_and_watch.first, &[], own("duplicate: true", "duplicate: false"),
            |it| router::SubmitAndWatchRequest { request: Some(repeat(&it)) };
        SubmitAndWatch.submit_and_watch.first, &["reports:run"],
            shared("duplicate: false", "PermissionDenied", "NotFound"),
            |it| router::SubmitAndWatchRequest { request: Some(delayed(&it)) };
        Get.get, READ, hidden(OWNER, "NotFound"),
            |it| router::GetRequest { request_id: it.uid, ..Default::default() };
        List.list, READ, hidden(OWNER, "requests: []"), |_| router::ListRequest::default();
        Cancel.cancel, WRITE, hidden(OWNER, "NotFound"),
            |it| router::CancelRequest { request_id: it.uid, ..Default::default() };
        Redrive.redrive, WRITE, hidden(OWNER, "NotFound"),
            |it| router::RedriveRequest { request_id: it.ended, ..Default::default() };
        RedriveMany.redrive_many, &["requests:write"], hidden(OWNER, "redriven: []"),
            |_| router::RedriveManyRequest {
                states: vec![RequestState::Cancelled.into()], ..Default::default()
            };
        ListActions.list_actions, &[], shared(ACTION, ACTION, "actions: ["),
            |_| router::ListActionsRequest::default();
    };
    let progress = methods! { "streamer.progress.v1.ProgressService", Progress:
        Watch.watch.first, READ, hidden(OWNER, "NotFound"),
            |it| progress::WatchRequest { request_id: it.uid, ..Default::default() };
        ListEvents.list_events, READ, hidden("Started", "NotFound"),
            |it| progress::ListEventsRequest { request_id: it.uid, ..Default::default() };
    };
    let connections = methods! { "streamer.connections.v1.ConnectionsService", Connections:
        List.list, &["connections:read"], denied(OWNER, "connections: []"),
            |_| connections::ListRequest::default();
        Send.send, &["connections:send"], denied("recipients: 1", "NotFound"),
            |it| news(Target::ConnectionId(it.connection));
        Send.send, &["connections:send"], denied("recipients: 1", "NotFound"),
            |it| news(Target::UserId(it.user));
        Broadcast.broadcast, &["connections:send"], denied("recipients: 1", "recipients: 0"),
            |_| connections::BroadcastRequest { topic: "news".into(), ..Default::default() };
        Disconnect.disconnect, &["connections:disconnect"], denied("DisconnectResponse", "NotFound"),
            |it| connections::DisconnectRequest { connection_id: it.connection, ..Default::default() };
    };
    let operations = methods! { "google.longrunning.Operations", Operations:
        ListOperations.list_operations, READ, hidden("OperationMetadata", "operations: []"),
            |_| operations::ListOperationsRequest::default();
        GetOperation.get_operation, READ, hidden("OperationMetadata", "NotFound"),
            |it| operations::GetOperationRequest { name: format!("operations/{}", it.uid) };
        WaitOperation.wait_operation, READ, hidden("OperationMetadata", "NotFound"),
            |it| operations::WaitOperationRequest {
                name: format!("operations/{}", it.ended), ..Default::default()
            };
        CancelOperation.cancel_operation, WRITE, hidden("()", "NotFound"),
            |it| operations::CancelOperationRequest { name: format!("operations/{}", it.uid) };
        DeleteOperation.delete_operation, WRITE, hidden("()", "NotFound"),
            |it| operations::DeleteOperationRequest { name: format!("operations/{}", it.ended) };
    };
    let messages = messages! {
        "request", &[], own(r#""duplicate":true"#, r#""duplicate":false"#), |it| {
            "id": it.request_id, "action": "echo_async", "payload": {"steps":1}, "delay_ms": HOUR_S * 1000
        };
        "request", &["reports:run"], shared(r#""duplicate":false"#, "FORBIDDEN", "INVALID_ACTION"),
            |it| {"action": it.action, "delay_ms": HOUR_S * 1000};
        "subscribe", READ, hidden("subscribed", "NOT_FOUND"), |it| {"request_id": it.uid};
        "unsubscribe", &[], hidden("unsubscribed", "unsubscribed"), |it| {"request_id": it.uid};
        "cancel", WRITE, hidden("acknowledgment", "NOT_FOUND"), |it| {"request_id": it.uid};
        "get", READ, hidden(OWNER, "NOT_FOUND"), |it| {"request_id": it.uid};
        "list", READ, hidden(OWNER, r#""requests":[]"#), |_| {};
        "auth", &[], own("authenticated", "4403"), |it| {"token": it.token};
        "ping", &[], hidden("pong", "pong"), |_| {};
    };
    let work = Row {
        name: "/streamer.processor.v1.WorkerService/Work".into(),
        permissions: &["worker:*"],
        expected: [Sees("resumed"), Hidden("revoked"), DENIED, Hidden("revoked"), DENIED],
        call: Call::Method(|it, channel, token| Box::pin(resume(it, channel, token))),
    };
    let backup = Row {
        name: "/streamer.admin.v1.AdminService/Backup".into(),
        permissions: &["*"],
        expected: [DENIED, DENIED, DENIED, DENIED, Sees("permitted")],
        call: Call::Method(|_, channel, token| Box::pin(backup(channel, token))),
    };
    let all = [router, progress, connections, operations, messages, vec![work, backup]];
    all.into_iter().flatten().collect()
}

/// Returns a submission that repeats a submission of the owner.
pub(crate) fn repeat(object: &Object) -> router::SubmitRequest {
    let (id, action) = (object.request_id.clone(), "echo_async".into());
    let payload = Some(json_payload(r#"{"steps":1}"#));
    router::SubmitRequest { id, action, payload, ..delayed(object) }
}

/// Returns a submission of the object's action that does not start within an hour.
pub(crate) fn delayed(object: &Object) -> router::SubmitRequest {
    let action = object.action.clone();
    let mut submission = router::SubmitRequest { action, ..Default::default() };
    submission.delay.get_or_insert_default().seconds = HOUR_S;
    submission
}

fn news(target: Target) -> connections::SendRequest {
    connections::SendRequest { target: Some(target), topic: "news".into(), data: None }
}

async fn first<T>(mut stream: Streaming<T>) -> Result<Option<T>, Status> {
    stream.message().await
}

/// Begins a backup, which only one engine makes.
async fn backup(channel: Channel, token: String) -> Result<String, Status> {
    let call = authorized(BackupRequest {}, &token);
    match AdminServiceClient::new(channel).backup(call).await {
        Err(status) if status.code() != Code::FailedPrecondition => Err(status),
        Err(status) if !status.message().contains("point-in-time recovery") => Err(status),
        Ok(_) | Err(_) => Ok("permitted".into()),
    }
}

/// Resumes the attempt like its worker, and reports its result.
async fn resume(object: Object, channel: Channel, token: String) -> Result<String, Status> {
    let Attempt { uid, attempt } = object.resume_hello.attempts[0].clone();
    let kind = Some(Kind::Result(json_payload("0")));
    let report = Report { uid, attempt, number: 0, kind, resends: 0 };
    let mut stream = work(channel, &token, object.resume_hello, Some(report)).await?;
    let Message::Welcome(welcome) = next(&mut stream).await? else { panic!("no welcome") };
    if !welcome.resumed.is_empty() {
        return Ok("resumed".into());
    }
    while !matches!(next(&mut stream).await?, Message::Revoke(_)) {}
    Ok("revoked".into())
}

/// Opens the stream of a worker and sends the given messages.
pub(crate) async fn work(
    channel: Channel,
    token: &str,
    hello: Hello,
    report: Option<Report>,
) -> Result<Streaming<WorkResponse>, Status> {
    let report = report.map(work_request::Message::Report);
    let messages = [Some(work_request::Message::Hello(hello)), report].into_iter().flatten();
    let requests = messages.map(|message| WorkRequest { message: Some(message) });
    // The stream remains open.
    let requests = stream::iter(requests.collect::<Vec<_>>()).chain(stream::pending());
    let response = WorkerServiceClient::new(channel).work(authorized(requests, token)).await?;
    Ok(response.into_inner())
}

pub(crate) async fn next(stream: &mut Streaming<WorkResponse>) -> Result<Message, Status> {
    let response = within_timeout("a message to the worker", stream.message()).await?;
    Ok(response.and_then(|response| response.message).expect("the stream is open"))
}

pub(crate) fn authorized<T>(message: T, token: &str) -> Request<T> {
    with_authorization(message, format!("Bearer {token}").parse().unwrap())
}
