//! Makes every public call and sends every WebSocket message as every kind of caller, for objects of one user, to
//! one process and to separate services. A method or a message without a row fails the suite.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

#[path = "permissions/table.rs"]
mod table;

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt, path::Path};

use futures_util::{StreamExt, stream};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::json;
use streamer_client::ClientError;
use streamer_core::{Clock, SystemClock, Uid};
use streamer_proto::{
    common::v1::Action,
    connections::v1::{
        self as connections, connections_service_client::ConnectionsServiceClient as Connections,
    },
    processor::v1::{Attempt, Hello, WorkResponse, work_response::Message},
    public_methods,
    router::v1::{self as router, router_service_client::RouterServiceClient as Router},
};
use streamer_rpc::request_error;
use streamer_tests::{
    Client, Cluster, Server, Service, declare,
    dynamodb::{Implementation, endpoint},
    hello, resume_hello, wait_for_action, within_timeout,
};
use tempfile::TempDir;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};

use table::{
    ACTION, Call, Caller, HOUR_S, Hidden, OWNER, Object, READ, Row, Sees, WRITE, authorized,
    delayed, next, repeat, rows, work,
};

/// Maximum number of rows that run concurrently.
const CONCURRENT_ROWS: usize = 8;
const SECRET: &str = "a shared secret of more than 32 bytes";

fn channel(url: &str) -> Channel {
    Endpoint::from_shared(url.to_owned()).unwrap().connect_lazy()
}

fn new_uid() -> String {
    Uid::new(SystemClock.now()).to_string()
}

fn sign(tenant: &str, user: &str, permissions: &[&str], lasts_s: i64) -> String {
    let expires = SystemClock.now().as_millis() / 1000 + lasts_s;
    let claims = json!({"iss": "https://issuer.example", "aud": "streamer", "sub": user,
        "tenant_id": tenant, "permissions": permissions, "exp": expires});
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    encode(&Header::new(Algorithm::HS256), &claims, &key).unwrap()
}

/// Replaces the names of the object, and removes other IDs, times and numbers, which differ between replies.
fn normalized(reply: &str, object: &Object) -> String {
    let Object { uid, ended, request_id, user, connection, action, .. } = object;
    let names = [uid, ended, request_id, user, connection, action];
    let named = names.into_iter().fold(reply.to_owned(), |text, name| text.replace(name, "NAME"));
    let words = named.split(|c: char| !c.is_ascii_alphanumeric());
    words.filter(|word| !word.contains(|c: char| c.is_ascii_digit())).collect::<Vec<_>>().join(" ")
}

impl Row {
    /// Makes the call of the row; returns the text of the reply.
    async fn perform(&self, urls: &Urls, token: &str, object: &Object) -> String {
        let (object, gateway) = (object.clone(), &urls.gateway);
        match self.call {
            Call::Method(call) => {
                let reply = call(object, channel(urls.of(&self.name)), token.into());
                within_timeout(&self.name, reply).await.unwrap_or_else(|status| {
                    format!("{:?} {:?}", status.code(), request_error(&status))
                })
            }
            Call::Message(message) => {
                let reply = async {
                    let mut client = Client::try_connect(gateway, token).await?;
                    client.send(message(object)).await;
                    client.try_next().await
                };
                match reply.await {
                    Ok(reply) => reply.to_string(),
                    Err(ClientError::Closed { code, reason }) => format!("{code} {reason}"),
                    Err(error) => panic!("{}: {error}", self.name),
                }
            }
        }
    }
}

/// URLs of the services in a deployment.
#[derive(Clone)]
struct Urls {
    name: &'static str,
    /// URL of the gateway to which the owner is connected.
    home: String,
    gateway: String,
    router: String,
    progress: String,
    processor: String,
    all_routers: Vec<String>,
}

impl Urls {
    fn of(&self, method: &str) -> &str {
        match method.trim_start_matches("/streamer.").split('.').next().unwrap() {
            "progress" => &self.progress,
            "processor" => &self.processor,
            "connections" => &self.gateway,
            _ => &self.router,
        }
    }

    /// Returns the URLs of a deployment with all services behind one URL.
    fn one(name: &'static str, url: &str, all_routers: Vec<String>) -> Self {
        let url = || url.to_owned();
        let (home, gateway, router) = (url(), url(), url());
        Self { name, home, gateway, router, progress: url(), processor: url(), all_routers }
    }

    /// Runs all rows of the table; returns the replies that differ from it.
    async fn differences(&self) -> Vec<String> {
        let rows = stream::iter(rows().into_iter().enumerate());
        let checks = rows.map(|(number, row)| {
            let scene = Scene { urls: self, name: format!("{number}-{}", new_uid()), row };
            Box::pin(scene.differences())
        });
        checks.buffer_unordered(CONCURRENT_ROWS).concat().await
    }
}

/// Runs one row, with separate tenants.
struct Scene<'a> {
    urls: &'a Urls,
    name: String,
    row: Row,
}

impl Scene<'_> {
    fn token(&self, caller: Caller) -> String {
        let permissions = self.row.permissions;
        match caller {
            // The owner requires no permissions for its own requests.
            Caller::Owner if permissions.iter().any(|name| name.starts_with("requests:")) => {
                self.sign("acme", OWNER, &[])
            }
            Caller::Owner => self.sign("acme", OWNER, permissions),
            Caller::Permitted => self.sign("acme", "boss", permissions),
            Caller::WithoutPermission => self.sign("acme", "bob", &[]),
            Caller::OtherTenant => self.sign("globex", OWNER, &["*"]),
            Caller::Operator => self.sign("ops", "olga", &["operator"]),
        }
    }

    fn sign(&self, tenant: &str, user: &str, permissions: &[&str]) -> String {
        sign(&format!("{tenant}-{}", self.name), user, permissions, HOUR_S)
    }

    /// Creates an object, which exists until its worker or its connection is dropped.
    async fn object(&self) -> (Object, Streaming<WorkResponse>, Client) {
        let url = &self.urls.home;
        let permissions = ["reports:run", "worker:private-report", "connections:read"];
        let token = self.sign("acme", OWNER, &permissions);
        let declared = Action { permission: "reports:run".into(), ..declare(ACTION) };
        let first = hello(&new_uid(), 1, vec![declared]);
        let mut worker = work(channel(url), &token, first.clone(), None).await.unwrap();
        let Message::Welcome(welcome) = next(&mut worker).await.unwrap() else { panic!() };
        for router in &self.urls.all_routers {
            wait_for_action(router, &token, ACTION).await;
        }
        let client = Client::connect(url, &token).await;
        let mut object = Object {
            user: OWNER.into(),
            connection: client.connected["connection_id"].as_str().unwrap().to_owned(),
            action: ACTION.into(),
            token: self.token(Caller::Owner),
            ..absent()
        };
        let mut router = Router::new(channel(url));
        let submit = router::SubmitRequest { delay: None, ..delayed(&object) };
        object.uid = router.submit(authorized(submit, &token)).await.unwrap().into_inner().uid;
        object.resume_hello = loop {
            if let Message::Task(task) = next(&mut worker).await.unwrap() {
                break resume_hello(&first, &welcome, &[&task]);
            }
        };
        let submit = repeat(&object);
        object.ended = router.submit(authorized(submit, &token)).await.unwrap().into_inner().uid;
        let request_id = object.ended.clone();
        let cancel = router::CancelRequest { request_id, ..Default::default() };
        router.cancel(authorized(cancel, &token)).await.unwrap();
        if self.row.permissions == ["connections:read"] {
            within_timeout("the connection in the list", self.until_listed(&token)).await;
        }
        (object, worker, client)
    }

    /// Waits until the list of connections, which is eventually consistent, is not empty.
    async fn until_listed(&self, token: &str) {
        let mut connections = Connections::new(channel(&self.urls.home));
        loop {
            let list = authorized(connections::ListRequest::default(), token);
            if !connections.list(list).await.unwrap().into_inner().connections.is_empty() {
                return;
            }
            tokio::task::yield_now().await;
        }
    }

    /// Returns the state of the owner's requests.
    async fn state(&self) -> String {
        let list = authorized(router::ListRequest::default(), &self.token(Caller::Owner));
        let listed = Router::new(channel(&self.urls.home)).list(list).await.unwrap();
        format!("{:?}", listed.into_inner().requests)
    }

    /// Returns the difference between the reply to `caller` and the row, if any.
    async fn difference(&self, caller: Caller, object: &Object) -> Option<String> {
        let token = self.token(caller);
        let reply = self.row.perform(self.urls, &token, object).await;
        let (Sees(text) | Hidden(text)) = self.row.expected[caller as usize];
        if !reply.contains(text) {
            return Some(format!("{caller:?}: {reply}, expected {text}"));
        }
        if let Hidden(_) = self.row.expected[caller as usize] {
            let absent = absent();
            let other = self.row.perform(self.urls, &token, &absent).await;
            if normalized(&reply, object) != normalized(&other, &absent) {
                return Some(format!("{caller:?}: {reply}, but {other} for a missing object"));
            }
        }
        None
    }

    /// Returns the replies that differ from the row.
    async fn differences(self) -> Vec<String> {
        let row = &self.row;
        let (object, _worker, mut client) = self.object().await;
        let before = self.state().await;
        assert!(before.contains(&object.uid) && before.contains(&object.ended), "{before}");
        let mut differences = Vec::new();
        for caller in [Caller::WithoutPermission, Caller::OtherTenant, Caller::Operator] {
            differences.extend(self.difference(caller, &object).await);
        }
        let expired = sign(&format!("acme-{}", self.name), OWNER, row.permissions, -60);
        let wildcard = sign("*", OWNER, &["*", "operator"], HOUR_S);
        let mut invalid = vec![
            ("expired token", expired, ["Unauthenticated", "4401"]),
            ("tenant *", wildcard, ["Unauthenticated", "4401"]),
        ];
        if row.permissions == WRITE {
            let reader = self.sign("acme", "reader", READ);
            invalid.push(("reader", reader, ["PermissionDenied", "FORBIDDEN"]));
        }
        for (name, token, codes) in invalid {
            let reply = row.perform(self.urls, &token, &object).await;
            if !codes.iter().any(|code| reply.contains(code)) {
                differences.push(format!("{name}: {reply}"));
            }
        }
        let after = self.state().await;
        if before != after {
            differences.push(format!("the state changed from {before} to {after}"));
        }
        client.send(json!({"type": "ping"})).await;
        let reply = client.try_next().await;
        if !reply.as_ref().is_ok_and(|reply| reply["type"] == "pong") {
            differences.push(format!("the owner's connection received {reply:?}"));
        }
        differences.extend(self.difference(Caller::Owner, &object).await);
        let is_changed = row.permissions.iter().any(|name| name.ends_with("write"))
            || row.permissions == ["connections:disconnect"];
        let second = if is_changed { Some(self.object().await) } else { None };
        let object = second.as_ref().map_or(&object, |(second, ..)| second);
        differences.extend(self.difference(Caller::Permitted, object).await);
        let describe = |text| format!("{}, {}, {text}", self.urls.name, row.name);
        differences.into_iter().map(describe).collect()
    }
}

/// Returns an object that does not exist.
fn absent() -> Object {
    Object {
        uid: new_uid(),
        resume_hello: Hello {
            attempts: vec![Attempt { uid: new_uid(), attempt: 1 }],
            session_secret: vec![1; 32].into(),
            ..hello("absent", 1, vec![declare("absent-report")])
        },
        ended: new_uid(),
        request_id: format!("id-{}", new_uid()),
        user: "absent@acme".into(),
        connection: new_uid(),
        action: "absent-report".into(),
        token: sign("absent", "absent", &[], HOUR_S),
    }
}

/// Returns the types of the messages that a client can send.
fn message_types() -> BTreeSet<String> {
    let source =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../gateway/src/protocol/client_message.rs");
    let text = fs::read_to_string(source).unwrap();
    let (_, rest) = text.split_once("enum ClientMessage<'a> {\n").unwrap();
    let lines =
        rest.split("\n}").next().unwrap().lines().filter_map(|line| line.strip_prefix("    "));
    let variants = lines.filter(|line| line.starts_with(|c: char| c.is_ascii_uppercase()));
    let names = variants.map(|line| line.split(|c: char| !c.is_alphanumeric()).next().unwrap());
    names.map(str::to_lowercase).collect()
}

#[test]
fn every_public_method_and_every_client_message_has_a_row() {
    let methods: BTreeSet<_> = public_methods().into_iter().map(|method| method.path).collect();
    let messages = message_types();
    assert!(!methods.is_empty() && !messages.is_empty());
    let expected: BTreeSet<_> = methods.union(&messages).cloned().collect();
    let rows: BTreeSet<_> = rows().into_iter().map(|row| row.name).collect();
    let missing: Vec<_> = expected.difference(&rows).collect();
    let unknown: Vec<_> = rows.difference(&expected).collect();
    assert!(missing.is_empty(), "without a row: {missing:?}");
    assert!(unknown.is_empty(), "unknown rows: {unknown:?}");
}

/// Returns settings with which a server accepts the tokens of this suite.
fn settings(folder: &TempDir) -> Vec<String> {
    let secret = folder.path().join("secret");
    fs::write(&secret, SECRET).unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    vec![
        format!("auth.keys=HS256:{}", secret.display()),
        "auth.issuers=https://issuer.example".into(),
        "auth.audiences=streamer".into(),
        "execution.max_tenant_share_percent=100".into(),
        // The workers of the suite send no heartbeats.
        "execution.lease_duration=600000ms".into(),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_of_one_process_match_the_table() {
    let folder = TempDir::with_prefix("streamer-permissions-").unwrap();
    let settings = settings(&folder);
    let server = Server::start(&settings.iter().map(|setting| &**setting).collect::<Vec<_>>());
    let urls = Urls::one("one process", &server.url, vec![server.url.clone()]);
    let differences = urls.differences().await;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_of_separate_services_match_the_table() {
    let folder = TempDir::with_prefix("streamer-permissions-").unwrap();
    let settings = settings(&folder);
    let settings: Vec<_> = settings.iter().map(|setting| &**setting).collect();
    let dynamodb = endpoint(Implementation::DynamoDbLocal);
    let cluster = Cluster::start(dynamodb, &settings, |_, _, _| Vec::new()).await;
    let all_routers = (0..2).map(|number| cluster.url(Service::Router, number)).collect();
    let through = Urls::one("through the owner's gateway", &cluster.urls[0], all_routers);
    let directly = Urls {
        name: "directly, and through a different gateway than the owner's",
        gateway: cluster.urls[1].clone(),
        router: cluster.url(Service::Router, 0),
        progress: cluster.url(Service::Progress, 0),
        processor: cluster.url(Service::Processor, 0),
        ..through.clone()
    };
    let differences = [through.differences().await, directly.differences().await].concat();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}
