//! Streams, attempts and tokens are bound to their owner; other callers cannot use them.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use serde_json::json;
use streamer_client::{Api, Follower, Target, TokenError, TokenSource};
use streamer_proto::{
    common::v1::Action,
    processor::v1::{
        Capacity, Hello, RefreshToken, Task, report::Kind, work_request, work_response::Message,
    },
    progress::v1::WatchRequest,
    router::v1::{SubmitAndWatchRequest, SubmitRequest},
};
use streamer_rpc::json_payload;
use streamer_tests::{
    Client, Log, ScriptedWorker, Server, WorkerProcess, declare, hello, resume_hello,
    wait_for_workers, within_timeout,
};
use tonic::{Code, Streaming};

fn result(json: &'static str) -> Kind {
    Kind::Result(json_payload(json))
}

/// Lifetime of tokens that expire during a test.
const SHORT_LIFETIME: Duration = Duration::from_secs(2);

/// A worker of tenant `provider` that runs a request of tenant `acme` for action `work`.
struct Scene {
    server: Server,
    token: String,
    first: Hello,
    worker: ScriptedWorker,
    client: Client,
    task: Task,
}

impl Scene {
    async fn new() -> Self {
        // The worker, which sends no heartbeats, keeps its lease during the test.
        let server = Server::start(&["execution.lease_duration=120000ms", "auth.leeway=0ms"]);
        let token = server.token("provider", "worker", &["worker:work@acme"]);
        let first =
            Hello { display_name: "displayed".into(), ..hello("w", 4, vec![declare("work")]) };
        let mut worker = ScriptedWorker::connect(&server, &token, first.clone()).await;
        let user = server.token("acme", "ann", &[]);
        wait_for_workers(&server, &user, "work", 1).await;
        let mut client = Client::connect(&server.url, &user).await;
        client.submit("r", "work", json!({})).await;
        let task = worker.next_task().await;
        Self { server, token, first, worker, client, task }
    }

    /// Checks that the request ends with the result of its own worker, after one attempt.
    async fn check_success(mut self) {
        self.worker.report(&self.task, 0, result(r#""ours""#)).await;
        self.worker.wait_for_end(&self.task).await;
        let log = self.client.follow(Log::after(1)).await;
        let types: Vec<_> = log.events.iter().map(|event| event["type"].clone()).collect();
        assert_eq!(types, ["started", "complete"]);
        assert_eq!(log.events[1]["result"], json!("ours"));
    }
}

/// Checks that a worker with the given token and `hello` can neither resume the task nor report on it.
async fn check_intrusion(server: &Server, token: &str, hello: Hello, task: &Task) {
    let mut intruder = ScriptedWorker::connect(server, token, hello).await;
    assert_eq!(intruder.welcome.resumed, [], "{token}");
    intruder.report(task, 0, result(r#""theirs""#)).await;
    let Message::Revoke(revoked) = intruder.next().await.unwrap() else { panic!() };
    assert_eq!((&revoked.uid, revoked.attempt), (&task.uid, task.attempt));
}

#[tokio::test]
async fn no_other_caller_can_resume_a_workers_attempt() {
    let scene = Scene::new().await;
    let (server, welcome, task) = (&scene.server, &scene.worker.welcome, &scene.task);
    assert_eq!(welcome.session_secret.len(), 32);
    let with_secret = resume_hello(&scene.first, welcome, &[task]);
    let without = Hello { session_secret: Vec::new().into(), ..with_secret.clone() };
    let guessed = Hello { session_secret: vec![0; 32].into(), ..with_secret.clone() };
    let everything = ["worker:*@*", "*"];
    for (tenant, user, hellos) in [
        // A different tenant, which may run the action for all tenants, even with a stolen secret.
        ("evil", "worker", vec![&without, &guessed, &with_secret]),
        // A different user of the same tenant.
        ("provider", "mallory", vec![&without, &guessed, &with_secret]),
        // The tenant that owns the request.
        ("acme", "worker", vec![&without, &guessed, &with_secret]),
        // The same token, with a wrong secret.
        ("provider", "worker", vec![&guessed]),
    ] {
        let token = server.token(tenant, user, &everything);
        for hello in hellos {
            check_intrusion(server, &token, hello.clone(), task).await;
        }
    }
    scene.check_success().await;
}

#[tokio::test]
async fn workers_that_name_a_foreign_attempt_do_not_block_its_worker_from_resuming() {
    let Scene { mut server, token, first, mut worker, task, .. } = Scene::new().await;
    let again = resume_hello(&first, &worker.welcome, &[&task]);
    for _ in 0..3 {
        server.kill_and_restart();
        // The same token, with wrong secrets.
        let others = (0..16).map(|number| Hello {
            worker_id: format!("other-{number}"),
            session_secret: vec![number; 32].into(),
            ..again.clone()
        });
        let others = join_all(others.map(|other| ScriptedWorker::connect(&server, &token, other)));
        let own = ScriptedWorker::connect(&server, &token, again.clone());
        let (others, own) = tokio::join!(others, own);
        worker = own;
        assert!(others.iter().all(|other| other.welcome.resumed.is_empty()));
        assert_eq!(worker.welcome.resumed.len(), 1);
    }
    worker.report(&task, 0, result(r#""ours""#)).await;
    worker.wait_for_end(&task).await;
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    client.send(json!({"type": "subscribe", "request_id": "r", "after_seq": 1})).await;
    let log = client.follow(Log::after(1)).await;
    let types: Vec<_> = log.events.iter().map(|event| event["type"].clone()).collect();
    assert_eq!(types, ["started", "complete"]);
}

#[tokio::test]
async fn a_worker_with_the_same_id_replaces_the_first_and_its_attempts_are_retried() {
    let mut scene = Scene::new().await;
    let mut newer = ScriptedWorker::connect(&scene.server, &scene.token, scene.first.clone()).await;
    let ended = loop {
        if let Err(status) = scene.worker.next().await {
            break status;
        }
    };
    assert_eq!(ended.code(), Code::AlreadyExists, "{ended:?}");
    let task = newer.next_task().await;
    assert_eq!((&task.uid, task.attempt), (&scene.task.uid, 2));
    newer.report(&task, 0, result("1")).await;
    newer.wait_for_end(&task).await;
}

#[tokio::test]
async fn session_secrets_of_wrong_length_are_rejected() {
    let server = Server::start(&[]);
    let token = server.token("acme", "worker", &["worker:*"]);
    for length in [1, 31, 33] {
        let session_secret = vec![1; length].into();
        let hello = Hello { session_secret, ..hello("w", 1, vec![declare("work")]) };
        let first = work_request::Message::Hello(hello);
        let rejected = ScriptedWorker::try_connect(&server, &token, first).await.err().unwrap();
        assert_eq!(rejected.code(), Code::InvalidArgument);
        assert!(rejected.message().starts_with("hello.session_secret"), "{rejected}");
    }
}

#[tokio::test]
async fn owners_see_the_display_name_of_a_worker_and_not_its_id() {
    let mut scene = Scene::new().await;
    let started = scene.client.next().await;
    assert_eq!((&started["type"], &started["worker"]), (&json!("started"), &json!("displayed")));
    scene.worker.report(&scene.task, 0, result("1")).await;
    scene.worker.wait_for_end(&scene.task).await;
}

#[tokio::test]
async fn a_fresh_token_with_fewer_permissions_revokes_attempts() {
    let mut scene = Scene::new().await;
    let restricted = scene.server.token("provider", "worker", &["worker:work"]);
    let refresh = RefreshToken { token: restricted };
    scene.worker.send(work_request::Message::RefreshToken(refresh)).await;
    let Message::Revoke(revoked) = scene.worker.next().await.unwrap() else { panic!() };
    assert_eq!((&revoked.uid, revoked.attempt), (&scene.task.uid, 1));
    scene.worker.report(&scene.task, 0, result(r#""late""#)).await;
    // The next attempt goes to a permitted worker.
    let mut other = ScriptedWorker::connect(
        &scene.server,
        &scene.token,
        Hello { worker_id: "other".into(), ..scene.first.clone() },
    )
    .await;
    let task = other.next_task().await;
    assert_eq!(task.attempt, 2);
    other.report(&task, 0, result(r#""ours""#)).await;
    let log = scene.client.follow(Log::after(1)).await;
    assert_eq!(log.events.last().unwrap()["result"], json!("ours"));
}

#[tokio::test]
async fn a_reconnect_with_fewer_permissions_resumes_no_attempts() {
    let mut scene = Scene::new().await;
    let restricted = scene.server.token("provider", "worker", &["worker:work"]);
    let again = resume_hello(&scene.first, &scene.worker.welcome, &[&scene.task]);
    check_intrusion(&scene.server, &restricted, again, &scene.task).await;
    let types =
        [scene.client.next().await, scene.client.next().await].map(|event| event["type"].clone());
    assert_eq!(types, ["started", "retrying"]);
}

/// Reads a stream to its end; returns its status code.
async fn end_of<T>(mut stream: Streaming<T>) -> Code {
    loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without an error"),
            Err(status) => return status.code(),
        }
    }
}

#[tokio::test]
async fn a_stream_ends_when_its_token_expires() {
    let scene = Scene::new().await;
    let short = scene.server.token_for("acme", "ann", &[], SHORT_LIFETIME);
    let api = Api::new(&scene.server.url, &short).unwrap();
    let watch = WatchRequest { request_id: "r".into(), ..WatchRequest::default() };
    let watch = api.progress().watch(api.call(watch)).await.unwrap().into_inner();
    let submit = SubmitRequest { action: "work".into(), ..SubmitRequest::default() };
    let submit = SubmitAndWatchRequest { request: Some(submit) };
    let submitted = api.router().submit_and_watch(api.call(submit)).await.unwrap().into_inner();
    let mut socket = Client::connect(&scene.server.url, &short).await;
    socket.send(json!({"type": "subscribe", "request_id": "r"})).await;
    assert_eq!(end_of(watch).await, Code::Unauthenticated);
    assert_eq!(end_of(submitted).await, Code::Unauthenticated);
    let closed = loop {
        if let Err(error) = socket.try_next().await {
            break error;
        }
    };
    assert!(closed.is_unauthenticated(), "{closed}");
    scene.check_success().await;
}

/// Source of tokens with a short lifetime.
struct ShortLivedTokens {
    server: Arc<Server>,
    issued: Arc<AtomicUsize>,
}

#[async_trait::async_trait]
impl TokenSource for ShortLivedTokens {
    async fn token(&self) -> Result<String, TokenError> {
        let number = self.issued.fetch_add(1, Ordering::SeqCst);
        // Without this permission, two tokens for the same caller within a second would be identical.
        let permission = format!("token:{number}");
        Ok(self.server.token_for("acme", "ann", &[&permission], SHORT_LIFETIME))
    }
}

#[tokio::test]
async fn watches_continue_with_fresh_tokens() {
    let Scene { server, mut worker, client, task, .. } = Scene::new().await;
    drop(client);
    let server = Arc::new(server);
    let counts: [Arc<AtomicUsize>; 2] = Default::default();
    let tokens = |issued: &Arc<AtomicUsize>| ShortLivedTokens {
        server: server.clone(),
        issued: issued.clone(),
    };
    let api = Api::with_tokens(&server.url, Arc::new(tokens(&counts[0]))).await.unwrap();
    let mut watch = api.watch("r", 0);
    let target = Target::Watch { request_id: "r".into(), after_seq: 0 };
    let mut follower = Follower::new(&server.url, tokens(&counts[1]), target);
    let report = async {
        // Waits until both watches have used several tokens.
        while counts.iter().any(|issued| issued.load(Ordering::SeqCst) < 3) {
            tokio::task::yield_now().await;
        }
        worker.report(&task, 0, result("1")).await;
        worker.wait_for_end(&task).await;
    };
    let over_grpc = async {
        let mut count = 0;
        while watch.next().await.unwrap().is_some() {
            count += 1;
        }
        count
    };
    let over_websocket = async {
        let mut types = Vec::new();
        while let Some(received) = follower.next().await.unwrap() {
            types.push(received.message.kind().to_owned());
        }
        types
    };
    let ((), count, types) = tokio::join!(report, over_grpc, over_websocket);
    assert_eq!(count, 3);
    assert_eq!(types.last().unwrap(), "complete");
    // A watch with a fixed token ends when the token expires.
    let short = server.token_for("acme", "ann", &[], SHORT_LIFETIME);
    let mut expiring = Api::new(&server.url, &short).unwrap().watch("absent", 0);
    assert!(expiring.next().await.is_err());
}

#[tokio::test]
async fn requests_admitted_by_a_tenants_own_declaration_run_only_on_its_workers() {
    let server = Server::start(&["execution.lease_duration=120000ms"]);
    let render = Action { permission: "render:run".into(), ..declare("render") };
    let provider = server.token("provider", "worker", &["worker:render@*"]);
    let mut provider =
        ScriptedWorker::connect(&server, &provider, hello("p", 4, vec![render])).await;
    let user = server.token("evil", "joe", &[]);
    wait_for_workers(&server, &user, "render", 1).await;
    let mut joe = Client::connect(&server.url, &user).await;
    let rejected = joe.request(json!({"action": "render"})).await;
    assert_eq!(rejected["error"]["code"], "FORBIDDEN", "{rejected}");
    // This declaration requires no permission, and its worker has no slot.
    let own = hello("e", 0, vec![declare("render")]);
    let token = server.token("evil", "worker", &["worker:render"]);
    let mut own = ScriptedWorker::connect(&server, &token, own).await;
    let accepted = async {
        loop {
            let reply = joe.request(json!({"id": "joes", "action": "render"})).await;
            if reply["type"] == "acknowledgment" {
                return;
            }
        }
    };
    within_timeout("the acknowledgment", accepted).await;
    let permitted = server.token("acme", "ann", &["render:run"]);
    let mut ann = Client::connect(&server.url, &permitted).await;
    ann.submit("anns", "render", json!({})).await;
    let task = provider.next_task().await;
    assert_eq!((&*task.tenant_id, &*task.request_id), ("acme", "anns"));
    own.send(work_request::Message::Capacity(Capacity { slots: 1 })).await;
    let task = own.next_task().await;
    assert_eq!((&*task.tenant_id, &*task.request_id), ("evil", "joes"));
}

#[tokio::test]
async fn a_worker_whose_token_cannot_be_renewed_releases_its_attempts_and_reports_the_cause() {
    let server =
        Server::start(&["execution.builtin_actions=echo", "execution.lease_duration=120000ms"]);
    let short = server.token_for("acme", "worker", &["worker:*"], Duration::from_secs(3));
    let mut worker = WorkerProcess::start(&server, &short, "echo_async", &[]);
    let user = server.token("acme", "ann", &[]);
    wait_for_workers(&server, &user, "echo_async", 1).await;
    let mut client = Client::connect(&server.url, &user).await;
    client.submit("r", "echo_async", json!({"steps": 1, "delay_ms": 600_000})).await;
    worker.wait_for_log("error: the token has expired and cannot be refreshed");
    assert_eq!(worker.wait(), Some(4));
    // The next attempt starts before the lease expires, which takes longer than the timeout of the test.
    let lasting = server.token("acme", "worker", &["worker:*"]);
    let _other = WorkerProcess::start(&server, &lasting, "echo_async", &[]);
    let mut log = Log::after(1);
    while log.count("started") < 2 {
        log.push(client.next().await);
    }
}
