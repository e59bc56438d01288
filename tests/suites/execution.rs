//! Execution: start order, queue positions, timeouts, retries and redrives.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use serde_json::{Value, json};
use streamer_client::Api;
use streamer_proto::{
    common::v1::{Action, Error, ErrorCode, RequestState},
    processor::v1::{Capacity, Task, report::Kind, work_request},
    router::v1::{GetRequest, RedriveManyRequest, RedriveManyResponse},
};
use streamer_rpc::json_payload;
use streamer_tests::{
    Client, Log, ScriptedWorker, Server, declare, hello, metrics, sum, wait_for_workers,
    within_timeout,
};

struct Scene {
    server: Server,
    worker: ScriptedWorker,
    client: Client,
}

impl Scene {
    /// Starts a server, a worker with one action, and a client.
    async fn new(settings: &[&str], slots: i32, action: Action) -> Self {
        Self::with(settings, slots, vec![action]).await
    }

    async fn with(settings: &[&str], slots: i32, actions: Vec<Action>) -> Self {
        let server = Server::start(settings);
        let token = server.token("acme", "worker", &["worker:*@*"]);
        let name = actions[0].name.clone();
        let worker = ScriptedWorker::connect(&server, &token, hello("w", slots, actions)).await;
        wait_for_workers(&server, &token, &name, 1).await;
        let client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
        Self { server, worker, client }
    }

    async fn succeed(&mut self, task: &Task) {
        self.worker.report(task, 0, Kind::Result(json_payload("1"))).await;
        self.worker.wait_for_end(task).await;
    }

    async fn fail(&mut self, task: &Task, code: ErrorCode, retryable: bool) {
        let message = "no".into();
        let error = Error { code: code.into(), message, retryable, details: None };
        self.worker.report(task, 0, Kind::Error(error)).await;
        self.worker.wait_for_end(task).await;
    }

    /// Submits a request and returns its acknowledgment; skips other messages.
    async fn submit(&mut self, request: Value) -> Value {
        let id = request["id"].clone();
        self.client.send(request).await;
        loop {
            let acknowledgment = self.acknowledgment().await;
            if acknowledgment["request_id"] == id {
                return acknowledgment;
            }
        }
    }

    /// Returns the next acknowledgment; skips other messages.
    async fn acknowledgment(&mut self) -> Value {
        loop {
            let message = self.client.next().await;
            assert_ne!(message["type"], "error", "{message}");
            if message["type"] == "acknowledgment" {
                return message;
            }
        }
    }

    /// Returns the error with which the request ends.
    async fn error(&mut self) -> Value {
        let client = &mut self.client;
        let mut log = Log::after(1);
        while !log.has_ended() {
            log.push(client.next().await);
        }
        log.events.last().unwrap()["error"].clone()
    }
}

#[tokio::test]
async fn each_timeout_ends_a_request() {
    type Limit = fn(&mut Action);
    let limits: [(Limit, bool, &str); 3] = [
        (|action| action.schedule_to_start_ms = 150, true, "not started by its deadline"),
        (|action| action.start_to_close_ms = 150, false, "start-to-close timeout"),
        (|action| action.schedule_to_close_ms = 300, false, "schedule-to-close timeout"),
    ];
    for (limit, blocked, expected) in limits {
        let mut action = Action { max_attempts: 1, ..declare("work") };
        limit(&mut action);
        let settings = ["execution.poll_interval=50ms", "execution.max_tenant_share_percent=100"];
        let mut scene = Scene::with(&settings, 1, vec![action, declare("block")]).await;
        if blocked {
            // This request occupies the only slot.
            scene.submit(json!({"id": "b", "action": "block"})).await;
            scene.worker.next_task().await;
        }
        let bob = scene.server.token("acme", "bob", &[]);
        scene.client = Client::connect(&scene.server.url, &bob).await;
        scene.client.submit("r", "work", json!({})).await;
        let error = scene.error().await;
        assert_eq!(error["code"], "TIMEOUT", "{error}");
        assert!(error["message"].as_str().unwrap().contains(expected), "{error}");
    }
}

#[tokio::test]
async fn the_schedule_to_close_timeout_ends_a_request_between_attempts() {
    let action = Action { schedule_to_close_ms: 2_000, initial_backoff_ms: 1, ..declare("work") };
    let mut scene = Scene::new(&["execution.poll_interval=50ms"], 1, action).await;
    scene.client.submit("r", "work", json!({})).await;
    let task = scene.worker.next_task().await;
    assert!(task.deadline.is_some());
    // The next attempt is due immediately, but no slot is free.
    let none = work_request::Message::Capacity(Capacity { slots: 0 });
    scene.worker.send(none).await;
    scene.fail(&task, ErrorCode::ProcessingFailed, true).await;
    let error = scene.error().await;
    assert_eq!(error["code"], "TIMEOUT", "{error}");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("schedule-to-close"), "{error}");
}

#[tokio::test]
async fn final_errors_of_an_action_are_not_retried() {
    let final_errors = vec![ErrorCode::Unavailable.into()];
    let action = Action { final_errors, max_attempts: 5, ..declare("work") };
    let mut scene = Scene::new(&[], 1, action).await;
    scene.client.submit("r", "work", json!({})).await;
    let task = scene.worker.next_task().await;
    scene.fail(&task, ErrorCode::Unavailable, true).await;
    assert_eq!(scene.error().await["code"], "UNAVAILABLE");
}

#[tokio::test]
async fn higher_priority_starts_first_and_tenants_alternate() {
    let settings = ["execution.max_tenant_share_percent=100"];
    let mut scene = Scene::new(&settings, 1, declare("work")).await;
    scene.client.submit("first", "work", json!({})).await;
    let first = scene.worker.next_task().await;
    let other = scene.server.token("other", "oli", &[]);
    let mut other = Client::connect(&scene.server.url, &other).await;
    for id in ["a1", "a2", "a3"] {
        scene.submit(json!({"id": id, "action": "work"})).await;
    }
    other.submit("o1", "work", json!({})).await;
    scene.submit(json!({"id": "urgent", "action": "work", "priority": 9})).await;
    // DynamoDB indexes are eventually consistent: until they are updated, the order differs.
    let api = Api::new(&scene.server.url, &scene.server.token("acme", "ann", &[])).unwrap();
    let updated = async {
        loop {
            let call = api.call(GetRequest { request_id: "a1".into(), ..GetRequest::default() });
            let request = api.router().get(call).await.unwrap().into_inner().request.unwrap();
            if request.queue_position.is_some_and(|position| position.earliest >= 2) {
                return;
            }
        }
    };
    within_timeout("the queue position behind the urgent request", updated).await;
    let mut order = Vec::new();
    let mut task = first;
    for _ in 0..5 {
        scene.succeed(&task).await;
        task = scene.worker.next_task().await;
        order.push(task.request_id.clone());
    }
    assert_eq!(order[0], "urgent");
    let index = |id: &str| order.iter().position(|started| started == id).unwrap();
    assert!(index("o1") <= 2, "the other tenant does not wait for a whole queue: {order:?}");
    assert!(index("a1") < index("a2") && index("a2") < index("a3"), "{order:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_requests_start_in_the_order_of_their_messages() {
    let settings = ["execution.max_tenant_share_percent=100"];
    let mut scene = Scene::new(&settings, 1, declare("work")).await;
    for round in 0..8 {
        let ids: Vec<String> = (0..16).map(|number| format!("{round}-{number}")).collect();
        for id in &ids {
            scene.client.send(json!({"id": id, "action": "work"})).await;
        }
        for id in &ids {
            let task = scene.worker.next_task().await;
            assert_eq!(task.request_id, *id);
            scene.succeed(&task).await;
        }
    }
}

#[tokio::test]
async fn a_user_does_not_wait_behind_the_queue_of_another_user() {
    let settings = ["execution.max_tenant_share_percent=100"];
    let mut scene = Scene::new(&settings, 1, declare("work")).await;
    scene.client.submit("first", "work", json!({})).await;
    let mut task = scene.worker.next_task().await;
    for number in 0..20 {
        scene.submit(json!({"id": format!("a{number}"), "action": "work"})).await;
    }
    let bob = scene.server.token("acme", "bob", &[]);
    let mut bob = Client::connect(&scene.server.url, &bob).await;
    bob.submit("b", "work", json!({})).await;
    let mut order = Vec::new();
    while task.request_id != "b" {
        scene.succeed(&task).await;
        task = scene.worker.next_task().await;
        order.push(task.request_id.clone());
    }
    assert!(order.len() <= 2, "{order:?}");
}

#[tokio::test]
async fn a_flooding_tenant_leaves_slots_to_other_tenants() {
    let settings = ["execution.max_tenant_share_percent=75"];
    let mut scene = Scene::new(&settings, 4, declare("work")).await;
    for number in 0..20 {
        scene.client.send(json!({"id": format!("f{number}"), "action": "work"})).await;
    }
    for _ in 0..3 {
        assert_eq!(scene.worker.next_task().await.tenant_id, "acme");
    }
    let other = scene.server.token("other", "oli", &[]);
    let mut other = Client::connect(&scene.server.url, &other).await;
    other.submit("o", "work", json!({})).await;
    let fourth = scene.worker.next_task().await;
    assert_eq!(fourth.tenant_id, "other", "a tenant gets three of four slots");
}

#[tokio::test]
async fn a_queued_request_has_a_queue_position() {
    let settings = ["execution.max_tenant_share_percent=100"];
    let mut scene = Scene::new(&settings, 1, declare("work")).await;
    let acknowledgment = scene.client.submit("first", "work", json!({})).await;
    assert_eq!(acknowledgment["queue_position"]["latest"], 1, "{acknowledgment}");
    let first = scene.worker.next_task().await;
    let acknowledgment = scene.submit(json!({"id": "a", "action": "work"})).await;
    assert_eq!(
        (
            &acknowledgment["queue_position"]["earliest"],
            &acknowledgment["queue_position"]["latest"]
        ),
        (&json!(1), &json!(1))
    );
    let other = scene.server.token("other", "oli", &[]);
    let mut other = Client::connect(&scene.server.url, &other).await;
    let acknowledgment = other.submit("o", "work", json!({})).await;
    assert_eq!(
        (
            &acknowledgment["queue_position"]["earliest"],
            &acknowledgment["queue_position"]["latest"]
        ),
        (&json!(1), &json!(2))
    );
    assert_eq!(
        acknowledgment["queue_position"]["estimated_start_time"],
        Value::Null,
        "no attempt was measured"
    );
    scene.succeed(&first).await;
    scene.worker.next_task().await;
    let api = Api::new(&scene.server.url, &scene.server.token("acme", "ann", &[])).unwrap();
    let mut api_other =
        Api::new(&scene.server.url, &scene.server.token("other", "oli", &[])).unwrap();
    for (api, id) in [(&api, "a"), (&mut api_other, "o")] {
        let call = api.call(GetRequest { request_id: id.into(), ..GetRequest::default() });
        let request = api.router().get(call).await.unwrap().into_inner().request.unwrap();
        let queued = request.state() == RequestState::Queued;
        let position = request.queue_position;
        assert_eq!(position.is_some(), queued, "{id}");
        assert!(
            position.is_none_or(|position| position.estimated_start_time.is_some()),
            "{position:?}"
        );
    }
}

async fn redrive(api: &Api, request: RedriveManyRequest) -> RedriveManyResponse {
    api.router().redrive_many(api.call(request)).await.unwrap().into_inner()
}

#[tokio::test]
async fn failed_requests_are_redriven_by_filter_and_only_once() {
    let action = Action { max_attempts: 1, ..declare("work") };
    let mut scene = Scene::new(&[], 1, action).await;
    for id in ["a", "b", "c"] {
        scene.client.submit(id, "work", json!({"id": id})).await;
        let task = scene.worker.next_task().await;
        scene.fail(&task, ErrorCode::ProcessingFailed, true).await;
        let mut log = Log::after(1);
        while !log.has_ended() {
            log.push(scene.client.next().await);
        }
    }
    let api = Api::new(&scene.server.url, &scene.server.token("acme", "ann", &[])).unwrap();
    let filter = RedriveManyRequest { action: "work".into(), page_size: 2, ..Default::default() };
    let dry_run = redrive(&api, RedriveManyRequest { dry_run: true, ..filter.clone() }).await;
    assert_eq!(dry_run.redriven.len(), 2);
    assert!(dry_run.redriven.iter().all(|redriven| redriven.request.is_none()));
    let mut names = Vec::new();
    let mut request = filter.clone();
    loop {
        let page = redrive(&api, request.clone()).await;
        names.extend(page.redriven.into_iter().map(|r| r.request.unwrap().redrive_of));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(names.len(), 3);
    let again = redrive(&api, filter).await;
    assert!(again.redriven.is_empty(), "{again:?}");
    let mut payloads = Vec::new();
    for _ in 0..3 {
        let task = scene.worker.next_task().await;
        payloads.push(streamer_rpc::payload_bytes(task.payload.as_ref()));
        scene.succeed(&task).await;
    }
    payloads.sort();
    assert_eq!(payloads, ["{\"id\":\"a\"}", "{\"id\":\"b\"}", "{\"id\":\"c\"}"]);
    let other = Api::new(&scene.server.url, &scene.server.token("acme", "bob", &[])).unwrap();
    let page = redrive(&other, RedriveManyRequest::default()).await;
    assert!(page.redriven.is_empty(), "other users cannot redrive them");
}

#[tokio::test]
async fn an_action_at_its_limit_does_not_block_requests_queued_behind_it() {
    let one = Action { max_concurrency: 1, ..declare("one") };
    // The worker sends nothing while the requests are stored, which is slow with some engines.
    let settings = ["execution.max_tenant_share_percent=100", "execution.lease_duration=120000ms"];
    let mut scene = Scene::with(&settings, 10, vec![one, declare("other")]).await;
    // Requests are submitted in batches: with a slow store, requests that wait too long are rejected.
    for batch in 0..10 {
        for number in 0..30 {
            let id = format!("one-{batch}-{number}");
            scene.client.send(json!({"id": id, "action": "one"})).await;
        }
        for _ in 0..30 {
            scene.acknowledgment().await;
        }
    }
    let first = scene.worker.next_task().await;
    assert_eq!(first.action, "one");
    scene.submit(json!({"id": "other", "action": "other"})).await;
    let second = scene.worker.next_task().await;
    assert_eq!(second.action, "other", "299 requests wait for the only slot of the first action");
    scene.succeed(&first).await;
    assert_eq!(scene.worker.next_task().await.action, "one");
}

#[tokio::test]
async fn a_slot_released_by_a_sync_action_is_reused_immediately() {
    // No poll occurs during the test.
    let settings = ["execution.poll_interval=60000ms", "execution.max_tenant_share_percent=100"];
    let quick = Action { sync: true, ..declare("quick") };
    let mut scene = Scene::with(&settings, 1, vec![declare("work"), quick]).await;
    scene.client.send(json!({"id": "q", "action": "quick"})).await;
    let quick = scene.worker.next_task().await;
    scene.submit(json!({"id": "w", "action": "work"})).await;
    scene.succeed(&quick).await;
    assert_eq!(scene.worker.next_task().await.action, "work");
}

#[tokio::test]
async fn an_immediate_retry_does_not_wait_for_the_poll() {
    let action =
        Action { initial_backoff_ms: 1, max_backoff_ms: 3, max_attempts: 50, ..declare("work") };
    let mut scene = Scene::new(&["execution.poll_interval=60000ms"], 1, action).await;
    scene.client.submit("r", "work", json!({})).await;
    for attempt in 1..=20 {
        let task = scene.worker.next_task().await;
        assert_eq!(task.attempt, attempt);
        scene.fail(&task, ErrorCode::ProcessingFailed, true).await;
    }
    let task = scene.worker.next_task().await;
    scene.succeed(&task).await;
}

#[tokio::test]
async fn sync_calls_beyond_max_concurrency_are_rejected() {
    let quick = Action { sync: true, max_concurrency: 1, ..declare("quick") };
    let settings = ["execution.max_tenant_share_percent=100"];
    let mut scene = Scene::with(&settings, 4, vec![quick]).await;
    scene.client.send(json!({"id": "a", "action": "quick"})).await;
    let first = scene.worker.next_task().await;
    let rejected = scene.client.request(json!({"id": "b", "action": "quick"})).await;
    assert_eq!(rejected["error"]["code"], "RATE_LIMITED", "{rejected}");
    assert!(
        rejected["error"]["message"].as_str().unwrap().contains("max_concurrency"),
        "{rejected}"
    );
    scene.succeed(&first).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_end_during_lease_renewal_are_neither_lost_nor_delayed() {
    // Leases are renewed every 100 ms. Without polling, no lease expires, even on a slow machine. DynamoDB requires
    // polling, because its indexes are eventually consistent, and its engines reject more concurrent requests.
    let (requests, in_flight, settings): (usize, usize, &[&str]) =
        match std::env::var("STREAMER_TESTS_ENGINE").as_deref() {
            Err(_) | Ok("sqlite") => {
                (2000, 256, &["execution.lease_duration=300ms", "execution.poll_interval=600000ms"])
            }
            Ok(_) => (300, 32, &[]),
        };
    let server = Server::start(settings);
    let mut client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
    let mut submitted = 0;
    let mut completed = 0;
    while completed < requests {
        while submitted < requests && submitted - completed < in_flight {
            client.send(json!({"action": "echo_async", "payload": {"steps": 2}})).await;
            submitted += 1;
        }
        let message = client.next().await;
        assert_ne!(message["type"], "error", "{message}");
        completed += usize::from(message["type"] == "complete");
    }
    // A client can receive the last event before the attempt that appended it is counted.
    let counts = |metrics: &str| {
        let counts = ["succeeded", "fenced"].map(|outcome| {
            sum(metrics, &format!("streamer_processor_attempts_total{{outcome=\"{outcome}\"}}"))
        });
        (counts[0] + counts[1] == requests).then_some(counts)
    };
    let (metrics, [succeeded, lost]) = loop {
        let metrics = metrics(&server.url).await;
        if let Some(counts) = counts(&metrics) {
            break (metrics, counts);
        }
    };
    assert_eq!((succeeded, lost), (requests, 0));
    for counted in
        ["streamer_processor_lease_expiries_total 0", "streamer_progress_missed_events_total 0"]
    {
        assert!(metrics.lines().any(|line| line == counted), "{counted}:\n{metrics}");
    }
}
