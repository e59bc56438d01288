//! Whose a stream, an attempt and a token are, and that nobody else can use them.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use serde_json::{Value, json};
use streamer_proto::processor::v1::{
    Hello, RefreshToken, Task, report::Kind, work_request, work_response::Message,
};
use streamer_rpc::json_payload;
use streamer_tests::{Client, Log, ScriptedWorker, Server, declare, hello, hello_again, offered};
use tonic::Code;

fn result(json: &'static str) -> Kind {
    Kind::Result(json_payload(json))
}

/// A worker of the provider, which runs action `work` of tenant `acme`, with a request in it.
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
        // Nobody is taken for silent while another worker tries.
        let server = Server::start(&["execution.lease_ms=120000"]);
        let token = server.token("provider", "worker", &["worker:work@acme"]);
        let first = Hello { display_name: "shown".into(), ..hello("w", 4, vec![declare("work")]) };
        let mut worker = ScriptedWorker::come(&server, &token, first.clone()).await;
        let user = server.token("acme", "ann", &[]);
        offered(&server, &user, "work", 1).await;
        let mut client = Client::connect(&server.url, &user).await;
        client.submit("r", "work", json!({})).await;
        let task = worker.task().await;
        Self { server, token, first, worker, client, task }
    }

    /// The request ends with what its own worker says, after one attempt.
    async fn succeeds(mut self) {
        self.worker.report(&self.task, 0, result(r#""ours""#)).await;
        self.worker.ended(&self.task).await;
        let log = self.client.follow(Log::after(1)).await;
        let types: Vec<_> = log.events.iter().map(|event| event["type"].clone()).collect();
        assert_eq!(types, ["started", "complete"]);
        assert_eq!(log.events[1]["result"], json!("ours"));
    }
}

/// Tries to go on with the task, and to report for it; says what the server answers.
async fn intrude(server: &Server, token: &str, again: Hello, task: &Task) {
    let mut intruder = ScriptedWorker::come(server, token, again).await;
    assert_eq!(intruder.welcome.resumed, [], "{token}");
    intruder.report(task, 0, result(r#""theirs""#)).await;
    let Message::Revoke(revoked) = intruder.next().await.unwrap() else { panic!() };
    assert_eq!((&revoked.uid, revoked.attempt), (&task.uid, task.attempt));
}

#[tokio::test]
async fn nobody_else_goes_on_with_a_workers_attempt() {
    let scene = Scene::new().await;
    let (server, welcome, task) = (&scene.server, &scene.worker.welcome, &scene.task);
    assert_eq!(welcome.session_secret.len(), 32);
    let with_secret = hello_again(&scene.first, welcome, &[task]);
    let without = Hello { session_secret: Vec::new().into(), ..with_secret.clone() };
    let guessed = Hello { session_secret: vec![0; 32].into(), ..with_secret.clone() };
    let everything = ["worker:*@*", "*"];
    for (tenant, user, hellos) in [
        // Of another tenant, which may run the action of all tenants; also with a stolen secret.
        ("evil", "worker", vec![&without, &guessed, &with_secret]),
        // Of another user of the same tenant.
        ("provider", "mallory", vec![&without, &guessed, &with_secret]),
        // Of the tenant whose request it is.
        ("acme", "worker", vec![&without, &guessed, &with_secret]),
        // With the very same token, and a secret of its own.
        ("provider", "worker", vec![&guessed]),
    ] {
        let token = server.token(tenant, user, &everything);
        for again in hellos {
            intrude(server, &token, again.clone(), task).await;
        }
    }
    scene.succeeds().await;
}

#[tokio::test]
async fn a_worker_of_the_same_name_takes_over_and_its_attempts_run_again() {
    let mut scene = Scene::new().await;
    let mut newer = ScriptedWorker::come(&scene.server, &scene.token, scene.first.clone()).await;
    let ended = loop {
        if let Err(status) = scene.worker.next().await {
            break status;
        }
    };
    assert_eq!(ended.code(), Code::AlreadyExists, "{ended:?}");
    let task = newer.task().await;
    assert_eq!((&task.uid, task.attempt), (&scene.task.uid, 2));
    newer.report(&task, 0, result("1")).await;
    newer.ended(&task).await;
}

#[tokio::test]
async fn the_secret_has_one_length() {
    let server = Server::start(&[]);
    let token = server.token("acme", "worker", &["worker:*"]);
    for length in [1, 31, 33] {
        let session_secret = vec![1; length].into();
        let hello = Hello { session_secret, ..hello("w", 1, vec![declare("work")]) };
        let first = work_request::Message::Hello(hello);
        let refused = ScriptedWorker::open(&server, &token, first).await.err().unwrap();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().starts_with("hello.session_secret"), "{refused}");
    }
}

#[tokio::test]
async fn owners_see_the_name_that_a_worker_shows_and_not_its_id() {
    let mut scene = Scene::new().await;
    let started = scene.client.next().await;
    assert_eq!((&started["type"], &started["worker"]), (&json!("started"), &json!("shown")));
    scene.worker.report(&scene.task, 0, result("1")).await;
    scene.worker.ended(&scene.task).await;
}

#[tokio::test]
async fn a_fresh_token_that_allows_less_takes_the_attempts_away() {
    let mut scene = Scene::new().await;
    let less = scene.server.token("provider", "worker", &["worker:work"]);
    let refresh = RefreshToken { token: less };
    scene.worker.say(work_request::Message::RefreshToken(refresh)).await;
    let Message::Revoke(revoked) = scene.worker.next().await.unwrap() else { panic!() };
    assert_eq!((&revoked.uid, revoked.attempt), (&scene.task.uid, 1));
    scene.worker.report(&scene.task, 0, result(r#""late""#)).await;
    // The next attempt goes to a worker that may have it.
    let mut other = ScriptedWorker::come(
        &scene.server,
        &scene.token,
        Hello { worker_id: "other".into(), ..scene.first.clone() },
    )
    .await;
    let task = other.task().await;
    assert_eq!(task.attempt, 2);
    other.report(&task, 0, result(r#""ours""#)).await;
    let log = scene.client.follow(Log::after(1)).await;
    assert_eq!(log.events.last().unwrap()["result"], json!("ours"));
}

#[tokio::test]
async fn a_stream_that_comes_back_with_a_token_that_allows_less_has_no_attempts() {
    let mut scene = Scene::new().await;
    let less = scene.server.token("provider", "worker", &["worker:work"]);
    let again = hello_again(&scene.first, &scene.worker.welcome, &[&scene.task]);
    intrude(&scene.server, &less, again, &scene.task).await;
    let log: Value = scene.client.next().await;
    assert_eq!(log["type"], "started");
}
