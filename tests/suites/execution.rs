//! When requests start, in which order, how long they may take, and how failed ones run again.
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
    Client, Log, ScriptedWorker, Server, declare, hello, in_time, metrics, offered,
};

struct Scene {
    server: Server,
    worker: ScriptedWorker,
    client: Client,
}

impl Scene {
    /// A server with one worker of one action, and a client.
    async fn new(settings: &[&str], slots: i32, action: Action) -> Self {
        Self::with(settings, slots, vec![action]).await
    }

    async fn with(settings: &[&str], slots: i32, actions: Vec<Action>) -> Self {
        let server = Server::start(settings);
        let token = server.token("acme", "worker", &["worker:*@*"]);
        let name = actions[0].name.clone();
        let worker = ScriptedWorker::come(&server, &token, hello("w", slots, actions)).await;
        offered(&server, &token, &name, 1).await;
        let client = Client::connect(&server.url, &server.token("acme", "ann", &[])).await;
        Self { server, worker, client }
    }

    async fn succeed(&mut self, task: &Task) {
        self.worker.report(task, 0, Kind::Result(json_payload("1"))).await;
        self.worker.ended(task).await;
    }

    async fn fail(&mut self, task: &Task, code: ErrorCode, retryable: bool) {
        let message = "no".into();
        let error = Error { code: code.into(), message, retryable, details: None };
        self.worker.report(task, 0, Kind::Error(error)).await;
        self.worker.ended(task).await;
    }

    /// Submits, and waits for the acknowledgement among whatever else comes.
    async fn submit(&mut self, request: Value) -> Value {
        let id = request["id"].clone();
        self.client.send(request).await;
        loop {
            let said = self.acknowledgment().await;
            if said["request_id"] == id {
                return said;
            }
        }
    }

    /// The next acknowledgement among whatever else comes.
    async fn acknowledgment(&mut self) -> Value {
        loop {
            let said = self.client.next().await;
            assert_ne!(said["type"], "error", "{said}");
            if said["type"] == "acknowledgment" {
                return said;
            }
        }
    }

    /// The error that the request ends with.
    async fn error(&mut self) -> Value {
        let client = &mut self.client;
        let mut log = Log::after(1);
        while !log.ended() {
            log.push(client.next().await);
        }
        log.events.last().unwrap()["error"].clone()
    }
}

#[tokio::test]
async fn each_of_the_time_limits_ends_a_request() {
    type Limit = fn(&mut Action);
    let limits: [(Limit, bool, &str); 3] = [
        (|action| action.schedule_to_start_ms = 150, true, "not started by its deadline"),
        (|action| action.start_to_close_ms = 150, false, "start-to-close timeout"),
        (|action| action.schedule_to_close_ms = 300, false, "schedule-to-close timeout"),
    ];
    for (limit, blocked, expected) in limits {
        let mut action = Action { max_attempts: 1, ..declare("work") };
        limit(&mut action);
        let settings = ["execution.poll_interval_ms=50", "execution.tenant_share_percent=100"];
        let mut scene = Scene::with(&settings, 1, vec![action, declare("block")]).await;
        if blocked {
            // The only slot is taken.
            scene.submit(json!({"id": "b", "action": "block"})).await;
            scene.worker.task().await;
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
async fn the_time_for_all_attempts_ends_a_request_between_two_of_them() {
    let action = Action { schedule_to_close_ms: 2_000, initial_backoff_ms: 1, ..declare("work") };
    let mut scene = Scene::new(&["execution.poll_interval_ms=50"], 1, action).await;
    scene.client.submit("r", "work", json!({})).await;
    let task = scene.worker.task().await;
    assert!(task.deadline.is_some());
    // The next attempt is due at once and finds no slot.
    let none = work_request::Message::Capacity(Capacity { slots: 0 });
    scene.worker.say(none).await;
    scene.fail(&task, ErrorCode::ProcessingFailed, true).await;
    let error = scene.error().await;
    assert_eq!(error["code"], "TIMEOUT", "{error}");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("schedule-to-close"), "{error}");
}

#[tokio::test]
async fn what_the_action_calls_final_is_not_tried_again() {
    let final_errors = vec![ErrorCode::Unavailable.into()];
    let action = Action { final_errors, max_attempts: 5, ..declare("work") };
    let mut scene = Scene::new(&[], 1, action).await;
    scene.client.submit("r", "work", json!({})).await;
    let task = scene.worker.task().await;
    scene.fail(&task, ErrorCode::Unavailable, true).await;
    assert_eq!(scene.error().await["code"], "UNAVAILABLE");
}

#[tokio::test]
async fn higher_priority_starts_first_and_tenants_take_turns() {
    let settings = ["execution.tenant_share_percent=100"];
    let mut scene = Scene::new(&settings, 1, declare("work")).await;
    scene.client.submit("first", "work", json!({})).await;
    let first = scene.worker.task().await;
    let other = scene.server.token("other", "oli", &[]);
    let mut other = Client::connect(&scene.server.url, &other).await;
    for id in ["a1", "a2", "a3"] {
        scene.submit(json!({"id": id, "action": "work"})).await;
    }
    other.submit("o1", "work", json!({})).await;
    scene.submit(json!({"id": "urgent", "action": "work", "priority": 9})).await;
    // Indexes of DynamoDB show it late: until then, the queue is in another order.
    let api = Api::new(&scene.server.url, &scene.server.token("acme", "ann", &[])).unwrap();
    let shown = async {
        loop {
            let call = api.call(GetRequest { request_id: "a1".into(), ..GetRequest::default() });
            let request = api.router().get(call).await.unwrap().into_inner().request.unwrap();
            if request.queue_position.is_some_and(|place| place.earliest >= 2) {
                return;
            }
        }
    };
    in_time("the queue position behind the urgent request", shown).await;
    let mut order = Vec::new();
    let mut task = first;
    for _ in 0..5 {
        scene.succeed(&task).await;
        task = scene.worker.task().await;
        order.push(task.request_id.clone());
    }
    assert_eq!(order[0], "urgent");
    let place = |id: &str| order.iter().position(|known| known == id).unwrap();
    assert!(place("o1") <= 2, "the other tenant does not wait behind a queue: {order:?}");
    assert!(place("a1") < place("a2") && place("a2") < place("a3"), "{order:?}");
}

#[tokio::test]
async fn a_flooding_tenant_leaves_slots_to_the_others() {
    let settings = ["execution.tenant_share_percent=75"];
    let mut scene = Scene::new(&settings, 4, declare("work")).await;
    for number in 0..20 {
        scene.client.send(json!({"id": format!("f{number}"), "action": "work"})).await;
    }
    for _ in 0..3 {
        assert_eq!(scene.worker.task().await.tenant_id, "acme");
    }
    let other = scene.server.token("other", "oli", &[]);
    let mut other = Client::connect(&scene.server.url, &other).await;
    other.submit("o", "work", json!({})).await;
    let fourth = scene.worker.task().await;
    assert_eq!(fourth.tenant_id, "other", "three of four slots are one tenant's share");
}

#[tokio::test]
async fn a_queued_request_knows_its_place() {
    let settings = ["execution.tenant_share_percent=100"];
    let mut scene = Scene::new(&settings, 1, declare("work")).await;
    let said = scene.client.submit("first", "work", json!({})).await;
    assert_eq!(said["queue_position"]["latest"], 1, "{said}");
    let first = scene.worker.task().await;
    let said = scene.submit(json!({"id": "a", "action": "work"})).await;
    assert_eq!(
        (&said["queue_position"]["earliest"], &said["queue_position"]["latest"]),
        (&json!(1), &json!(1))
    );
    let other = scene.server.token("other", "oli", &[]);
    let mut other = Client::connect(&scene.server.url, &other).await;
    let said = other.submit("o", "work", json!({})).await;
    assert_eq!(
        (&said["queue_position"]["earliest"], &said["queue_position"]["latest"]),
        (&json!(1), &json!(2))
    );
    assert_eq!(said["queue_position"]["estimated_start_time"], Value::Null, "nothing was measured");
    scene.succeed(&first).await;
    scene.worker.task().await;
    let api = Api::new(&scene.server.url, &scene.server.token("acme", "ann", &[])).unwrap();
    let mut api_other =
        Api::new(&scene.server.url, &scene.server.token("other", "oli", &[])).unwrap();
    for (api, id) in [(&api, "a"), (&mut api_other, "o")] {
        let call = api.call(GetRequest { request_id: id.into(), ..GetRequest::default() });
        let request = api.router().get(call).await.unwrap().into_inner().request.unwrap();
        let queued = request.state() == RequestState::Queued;
        let place = request.queue_position;
        assert_eq!(place.is_some(), queued, "{id}");
        assert!(place.is_none_or(|place| place.estimated_start_time.is_some()), "{place:?}");
    }
}

async fn redrive(api: &Api, request: RedriveManyRequest) -> RedriveManyResponse {
    api.router().redrive_many(api.call(request)).await.unwrap().into_inner()
}

#[tokio::test]
async fn failed_requests_run_again_by_filter_and_only_once() {
    let action = Action { max_attempts: 1, ..declare("work") };
    let mut scene = Scene::new(&[], 1, action).await;
    for id in ["a", "b", "c"] {
        scene.client.submit(id, "work", json!({"id": id})).await;
        let task = scene.worker.task().await;
        scene.fail(&task, ErrorCode::ProcessingFailed, true).await;
        let mut log = Log::after(1);
        while !log.ended() {
            log.push(scene.client.next().await);
        }
    }
    let api = Api::new(&scene.server.url, &scene.server.token("acme", "ann", &[])).unwrap();
    let wanted = RedriveManyRequest { action: "work".into(), page_size: 2, ..Default::default() };
    let tried = redrive(&api, RedriveManyRequest { dry_run: true, ..wanted.clone() }).await;
    assert_eq!(tried.redriven.len(), 2);
    assert!(tried.redriven.iter().all(|redriven| redriven.request.is_none()));
    let mut names = Vec::new();
    let mut request = wanted.clone();
    loop {
        let page = redrive(&api, request.clone()).await;
        names.extend(page.redriven.into_iter().map(|r| r.request.unwrap().redrive_of));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(names.len(), 3);
    let again = redrive(&api, wanted).await;
    assert!(again.redriven.is_empty(), "{again:?}");
    let mut payloads = Vec::new();
    for _ in 0..3 {
        let task = scene.worker.task().await;
        payloads.push(streamer_rpc::payload_bytes(task.payload.as_ref()));
        scene.succeed(&task).await;
    }
    payloads.sort();
    assert_eq!(payloads, ["{\"id\":\"a\"}", "{\"id\":\"b\"}", "{\"id\":\"c\"}"]);
    let other = Api::new(&scene.server.url, &scene.server.token("acme", "bob", &[])).unwrap();
    let theirs = redrive(&other, RedriveManyRequest::default()).await;
    assert!(theirs.redriven.is_empty(), "another user's are not his to redrive");
}

#[tokio::test]
async fn what_has_no_room_does_not_hold_up_what_is_queued_behind_it() {
    let one = Action { max_concurrency: 1, ..declare("one") };
    // The worker says nothing while the requests are stored, which takes some engines long.
    let settings = ["execution.tenant_share_percent=100", "execution.lease_ms=120000"];
    let mut scene = Scene::with(&settings, 10, vec![one, declare("other")]).await;
    // A few at a time: a slow store refuses what waits for long.
    for batch in 0..10 {
        for number in 0..30 {
            let id = format!("one-{batch}-{number}");
            scene.client.send(json!({"id": id, "action": "one"})).await;
        }
        for _ in 0..30 {
            scene.acknowledgment().await;
        }
    }
    let first = scene.worker.task().await;
    assert_eq!(first.action, "one");
    scene.submit(json!({"id": "other", "action": "other"})).await;
    let second = scene.worker.task().await;
    assert_eq!(second.action, "other", "299 of the first action wait for its only place");
    scene.succeed(&first).await;
    assert_eq!(scene.worker.task().await.action, "one");
}

#[tokio::test]
async fn a_place_that_a_sync_action_gives_back_is_taken_at_once() {
    // No poll helps.
    let settings = ["execution.poll_interval_ms=60000", "execution.tenant_share_percent=100"];
    let quick = Action { sync: true, ..declare("quick") };
    let mut scene = Scene::with(&settings, 1, vec![declare("work"), quick]).await;
    scene.client.send(json!({"id": "q", "action": "quick"})).await;
    let quick = scene.worker.task().await;
    scene.submit(json!({"id": "w", "action": "work"})).await;
    scene.succeed(&quick).await;
    assert_eq!(scene.worker.task().await.action, "work");
}

#[tokio::test]
async fn a_retry_that_is_due_at_once_does_not_wait_for_the_poll() {
    let action =
        Action { initial_backoff_ms: 1, max_backoff_ms: 3, max_attempts: 50, ..declare("work") };
    let mut scene = Scene::new(&["execution.poll_interval_ms=60000"], 1, action).await;
    scene.client.submit("r", "work", json!({})).await;
    for attempt in 1..=20 {
        let task = scene.worker.task().await;
        assert_eq!(task.attempt, attempt);
        scene.fail(&task, ErrorCode::ProcessingFailed, true).await;
    }
    let task = scene.worker.task().await;
    scene.succeed(&task).await;
}

#[tokio::test]
async fn one_more_sync_call_than_may_run_is_refused_with_its_limit() {
    let quick = Action { sync: true, max_concurrency: 1, ..declare("quick") };
    let settings = ["execution.tenant_share_percent=100"];
    let mut scene = Scene::with(&settings, 4, vec![quick]).await;
    scene.client.send(json!({"id": "a", "action": "quick"})).await;
    let first = scene.worker.task().await;
    let refused = scene.client.ask(json!({"id": "b", "action": "quick"})).await;
    assert_eq!(refused["error"]["code"], "RATE_LIMITED", "{refused}");
    assert!(refused["error"]["message"].as_str().unwrap().contains("max_concurrency"), "{refused}");
    scene.succeed(&first).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_end_while_leases_are_renewed_are_neither_lost_nor_late() {
    // Renewed every 100 ms. Without polls no lease is taken for expired, however slow the machine is; over
    // DynamoDB, polls are needed for what its indexes show late, and fewer at once are refused by none
    // of its engines.
    let (requests, in_flight, settings): (usize, usize, &[&str]) =
        match std::env::var("STREAMER_TESTS_ENGINE").as_deref() {
            Err(_) | Ok("embedded") => {
                (2000, 256, &["execution.lease_ms=300", "execution.poll_interval_ms=600000"])
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
        let said = client.next().await;
        assert_ne!(said["type"], "error", "{said}");
        completed += usize::from(said["type"] == "complete");
    }
    // A client sees the last event a little before the attempt that appended it is counted.
    let ended = |metrics: &str| {
        let names = ["streamer_processor_succeeded_total ", "streamer_processor_lost_total "];
        let counts = names.map(|name| {
            let count = metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            count.parse::<usize>().unwrap()
        });
        (counts[0] + counts[1] == requests).then_some(counts)
    };
    let (metrics, [succeeded, lost]) = loop {
        let metrics = metrics(&server.url).await;
        if let Some(counts) = ended(&metrics) {
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
