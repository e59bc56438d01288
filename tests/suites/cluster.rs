//! Two instances of every service in separate processes with DynamoDB Local, which are killed, partitioned and
//! configured with different peer sets under load. `check-history` checks the messages that clients receive.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use futures_util::future::join_all;
use serde_json::json;
use streamer_client::Api;
use streamer_proto::{
    connections::v1::{BroadcastRequest, ListRequest, SendRequest, send_request::Target},
    internal::v1::{PublishRequest, event_log_service_client::EventLogServiceClient},
    processor::v1::work_request,
    progress::v1::{WatchRequest, WatchResponse},
    router::v1::SubmitRequest,
};
use streamer_rpc::json_payload;
use streamer_tests::{
    Client, Cluster, Load, Log, LoopbackAddress, Process, Proxy, ScriptedWorker, Service,
    WorkerProcess, declare,
    dynamodb::{Implementation, endpoint},
    hello, tool, wait_for_action, within_timeout,
};
use tokio::sync::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Streaming, metadata::MetadataValue, transport::Endpoint};

/// Lock that limits the tests to one cluster at a time: two cores are sufficient for only one cluster.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

const SETTINGS: [&str; 4] = [
    "execution.lease_duration=1000ms",
    "execution.poll_interval=100ms",
    "execution.max_tenant_share_percent=100",
    "peers.dns_refresh_interval=500ms",
];

async fn cluster(
    overrides: impl Fn(Service, usize, &[Proxy]) -> Vec<String>,
) -> (Cluster, MutexGuard<'static, ()>) {
    let guard = ONE_AT_A_TIME.lock().await;
    let dynamodb = endpoint(Implementation::DynamoDbLocal);
    let cluster = Cluster::start(dynamodb, &SETTINGS, overrides).await;
    let token = cluster.token("acme", "ann", &["worker:*"]);
    for url in &cluster.urls {
        wait_for_action(url, &token, "echo_async").await;
    }
    (cluster, guard)
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_resume_when_one_of_each_service_is_killed_in_turn() {
    let (mut cluster, _guard) = cluster(|_, _, _| Vec::new()).await;
    let token = cluster.token("acme", "ann", &[]);
    let load = Load::start(&cluster.urls, &token, 1, true);
    for number in 0..2 {
        for service in Service::ALL {
            load.wait_for_messages(200).await;
            cluster.kill(service, number);
            load.wait_for_messages(100).await;
            cluster.restart(service, number).await;
        }
    }
    load.wait_for_messages(200).await;
    load.verify("cluster-kills").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_resume_when_one_of_each_service_is_stopped_in_turn() {
    let (mut cluster, _guard) = cluster(|_, _, _| Vec::new()).await;
    let token = cluster.token("acme", "ann", &[]);
    let load = Load::start(&cluster.urls, &token, 4, true);
    // Sync calls are not affected.
    let mut client = Client::connect(&cluster.urls[1], &token).await;
    let done = CancellationToken::new();
    let calls = tokio::spawn({
        let done = done.clone();
        async move {
            while !done.is_cancelled() {
                let reply = client.request(json!({"action": "echo", "payload": 1})).await;
                assert_eq!(reply["data"]["echo"], 1, "{reply}");
            }
        }
    });
    let mut client = Client::connect(&cluster.urls[1], &token).await;
    let later = json!({"id": "later", "action": "echo_async", "delay_ms": 3_600_000});
    let later = client.request(later).await["uid"].as_str().unwrap().to_owned();
    for service in Service::ALL {
        load.wait_for_messages(200).await;
        // A watch of the stopped service ends and does not delay the shutdown.
        let mut watching = None;
        if matches!(service, Service::Progress | Service::Gateway) {
            let api = Api::new(&cluster.url(service, 0), &token).unwrap();
            let mut watch = watch(&api, &later).await;
            assert_eq!(watch.message().await.unwrap().unwrap().events[0].seq, 1);
            watching = Some(watch);
        }
        assert_eq!(cluster.stop(service, 0), Some(0), "{service:?}");
        if let Some(mut watch) = watching {
            let status = watch.message().await.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable, "{service:?}: {status}");
        }
        load.wait_for_messages(100).await;
        cluster.restart(service, 0).await;
    }
    load.wait_for_messages(200).await;
    done.cancel();
    calls.await.unwrap();
    load.verify("cluster-stops").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_watchers_do_not_delay_others_when_one_peer_serves_many_watches() {
    // More watches than a server allows one client to open.
    const WATCHES: usize = 1_100;
    const WATCHES_PER_CLIENT: usize = 100;
    // All services know only one progress service.
    let (cluster, _guard) =
        cluster(|_, _, proxies| vec![format!("peers.progress=http://{}", proxies[0].address)])
            .await;
    let token = cluster.token("acme", "ann", &[]);
    let url = &cluster.urls[0];
    let mut client = Client::connect(url, &token).await;
    let later = json!({"id": "later", "action": "echo_async", "delay_ms": 3_600_000});
    let later = client.request(later).await["uid"].as_str().unwrap().to_owned();
    let chunks = json!({"steps": 1, "output_chunks": 32, "chunk_bytes": 60_000});
    client.submit("large", "echo_async", chunks).await;
    let log = client.follow(Log::after(1)).await;

    let mut idle = Vec::new();
    for _ in 0..WATCHES / WATCHES_PER_CLIENT {
        let api = Api::new(url, &token).unwrap();
        for _ in 0..WATCHES_PER_CLIENT {
            let mut watch = watch(&api, &later).await;
            assert_eq!(watch.message().await.unwrap().unwrap().events[0].seq, 1);
            idle.push(watch);
        }
    }
    let mut slow = Vec::new();
    for _ in 0..16 {
        slow.push(watch(&Api::new(url, &token).unwrap(), "large").await);
    }

    client.submit("small", "echo_async", json!({"steps": 3})).await;
    assert_eq!(client.follow(Log::after(1)).await.last_type(), "complete");
    let small = watch(&Api::new(url, &token).unwrap(), "small").await;
    assert_eq!(last_seq(small).await, 6);
    // A slow watcher receives all events once it starts reading.
    assert_eq!(last_seq(slow.remove(0)).await, log.last_seq());
}

/// Watches a log from its first event.
async fn watch(api: &Api, request_id: &str) -> Streaming<WatchResponse> {
    let request_id = request_id.to_owned();
    let watch = WatchRequest { request_id, after_seq: Some(0), ..WatchRequest::default() };
    api.progress().watch(api.call(watch)).await.unwrap().into_inner()
}

/// Reads a watch to its end; returns the `seq` of the last event.
async fn last_seq(mut watch: Streaming<WatchResponse>) -> i64 {
    let mut last_seq = 0;
    while let Some(reply) = watch.message().await.unwrap() {
        for event in reply.events {
            assert_eq!(event.seq, last_seq + 1);
            last_seq = event.seq;
        }
    }
    last_seq
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_resume_when_a_progress_service_is_partitioned() {
    let (cluster, _guard) = cluster(|_, _, _| Vec::new()).await;
    let token = cluster.token("acme", "ann", &[]);
    let load = Load::start(&cluster.urls, &token, 2, true);
    for number in 0..2 {
        load.wait_for_messages(200).await;
        cluster.partition(number);
        // More messages than can be in transit at the start of the partition.
        load.wait_for_messages(1000).await;
        cluster.heal(number);
    }
    load.wait_for_messages(200).await;
    load.verify("cluster-partition").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_move_to_a_different_progress_service_when_the_store_is_unreachable() {
    const WATCHED: usize = 60;
    let dynamodb = endpoint(Implementation::DynamoDbLocal).trim_start_matches("http://");
    let loopback = LoopbackAddress::claim();
    let store = Proxy::start(loopback.next(), dynamodb.parse().unwrap()).await;
    let through_proxy = format!("dynamodb.endpoint=http://{}", store.address);
    let (cluster, _guard) = cluster(|service, number, _| match (service, number) {
        (Service::Progress, 0) => vec![through_proxy.clone()],
        _ => Vec::new(),
    })
    .await;
    let token = cluster.token("acme", "ann", &[]);
    let watchers = (0..WATCHED).map(|number| {
        let (url, token) = (&cluster.urls[number % cluster.urls.len()], &token);
        async move {
            let mut client = Client::connect(url, token).await;
            let payload = json!({"steps": 40, "delay_ms": 250});
            client.submit(&format!("w{number}"), "echo_async", payload).await;
            let mut log = Log::after(1);
            log.push(client.next().await);
            (client, log)
        }
    });
    let watchers = join_all(watchers).await;
    store.pause();
    // The store remains unreachable until every watcher has received the terminal event.
    for (mut client, log) in watchers {
        assert_eq!(client.follow(log).await.last_type(), "complete");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_consistent_when_instances_have_different_peer_sets() {
    // Each instance knows only one progress service, which differs between instances; each progress service
    // knows only itself.
    let (cluster, _guard) = cluster(|service, number, proxies| {
        let known = match service {
            Service::Gateway | Service::Progress => number,
            Service::Processor | Service::Router => 1 - number,
        };
        vec![format!("peers.progress=http://{}", proxies[known].address)]
    })
    .await;
    let token = cluster.token("acme", "ann", &[]);
    let load = Load::start(&cluster.urls, &token, 3, true);
    load.wait_for_messages(400).await;
    load.verify("cluster-peers").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_reach_users_on_every_gateway() {
    let (mut cluster, _guard) = cluster(|_, _, _| Vec::new()).await;
    let token = cluster.token("acme", "ann", &["*"]);
    let mut clients = Vec::new();
    for url in &cluster.urls {
        clients.push(Client::connect(url, &token).await);
    }
    let api = Api::new(&cluster.urls[0], &token).unwrap();
    let data = Some(json_payload("{\"n\":1}"));
    let send = |target: Target| SendRequest {
        target: Some(target),
        topic: "news".into(),
        data: data.clone(),
    };
    let id = clients[1].connected["connection_id"].as_str().unwrap().to_owned();
    let to_one = api.connections().send(api.call(send(Target::ConnectionId(id)))).await;
    assert_eq!(to_one.unwrap().into_inner().recipients, 1);
    assert_eq!(clients[1].next().await["data"], json!({"n": 1}));
    let to_user = api.connections().send(api.call(send(Target::UserId("ann".into())))).await;
    assert_eq!(to_user.unwrap().into_inner().recipients, 2);
    let broadcast = BroadcastRequest { topic: "all".into(), data: data.clone() };
    let to_all = api.connections().broadcast(api.call(broadcast)).await;
    assert_eq!(to_all.unwrap().into_inner().recipients, 2);
    for client in &mut clients {
        for topic in ["news", "all"] {
            assert_eq!(client.next().await["topic"], topic);
        }
    }
    let offline = send(Target::UserId("bob".into()));
    let status = api.connections().send(api.call(offline)).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let listed = api.connections().list(api.call(ListRequest::default())).await;
    let gateways: Vec<_> = listed
        .unwrap()
        .into_inner()
        .connections
        .into_iter()
        .map(|connection| connection.gateway)
        .collect();
    assert_eq!(gateways.len(), 2);
    assert_ne!(gateways[0], gateways[1]);

    // A client whose gateway fails continues on the other gateway.
    let running = json!({"steps": 50, "delay_ms": 20});
    clients[0].submit("long", "echo_async", running).await;
    let mut log = Log::after(1);
    log.push(clients[0].next().await);
    cluster.kill(Service::Gateway, 0);
    let mut second = Client::connect(&cluster.urls[1], &token).await;
    let subscribe = json!({"type": "subscribe", "request_id": "long", "after_seq": log.last_seq()});
    assert_eq!(second.request(subscribe).await["type"], "subscribed");
    assert_eq!(second.follow(log).await.last_seq(), 53);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_and_sync_calls_use_a_gateway_and_internal_calls_require_the_service_token() {
    let (mut cluster, _guard) = cluster(|service, _, _| match service {
        Service::Processor => vec!["execution.builtin_actions=echo,echo_async".into()],
        _ => Vec::new(),
    })
    .await;
    let token = cluster.token("acme", "ann", &["*"]);
    let _worker =
        WorkerProcess::spawn_at(&cluster.urls[0], &token, "generate_report", &["--slots", "2"]);
    wait_for_action(&cluster.urls[1], &token, "generate_report").await;
    cluster.kill(Service::Processor, 0);
    let mut client = Client::connect(&cluster.urls[1], &token).await;
    for number in 0..20 {
        let echo = json!({"id": format!("e{number}"), "action": "echo", "payload": {"n": number}});
        let reply = client.request(echo).await;
        assert_eq!(reply["data"]["echo"], json!({"n": number}), "{reply}");
    }

    let progress = cluster.url(Service::Progress, 0);
    let channel = Endpoint::from_shared(progress).unwrap().connect_lazy();
    let publish = |secret: Option<&str>| {
        let mut request = tonic::Request::new(PublishRequest::default());
        if let Some(secret) = secret {
            let secret = secret.parse().unwrap();
            request.metadata_mut().insert("streamer-service-token", secret);
        }
        let mut client = EventLogServiceClient::new(channel.clone());
        async move { client.publish(request).await.unwrap_err().code() }
    };
    assert_eq!(publish(None).await, Code::Unauthenticated);
    let wrong = Some("0123456789abcdef0123456789abcdeX");
    assert_eq!(publish(wrong).await, Code::Unauthenticated);
    let right = cluster.service_token();
    assert_eq!(publish(Some(&right)).await, Code::InvalidArgument);

    // Clients that do not use tonic also receive the status of a rejected watch.
    let authorization = format!("authorization: Bearer {token}");
    let gateway = cluster.urls[1].trim_start_matches("http://").to_owned();
    let rejected = tokio::task::spawn_blocking(move || {
        let mut grpcurl = Process::command(tool("STREAMER_TESTS_GRPCURL"));
        grpcurl.args(["-plaintext", "-H", &authorization, "-d", r#"{"request_id":"unknown"}"#]);
        Process::output(grpcurl.args([&gateway, "streamer.progress.v1.ProgressService/Watch"]))
    });
    let rejected = rejected.await.unwrap();
    let text = String::from_utf8_lossy(&rejected.stderr);
    assert!(text.contains("Code: NotFound"), "{text}");

    // Other callers cannot choose the uid of a request.
    let api = Api::new(&cluster.url(Service::Router, 0), &token).unwrap();
    let chosen = "01ARZ3NDEKTSV4RRFFQ69G5FAV";
    let submit = SubmitRequest { action: "echo_async".into(), ..SubmitRequest::default() };
    let mut call = api.call(submit);
    call.metadata_mut().insert("streamer-request-uid", MetadataValue::from_static(chosen));
    let reply = api.router().submit(call).await.unwrap().into_inner();
    assert_ne!(reply.uid, chosen);
}

#[tokio::test(flavor = "multi_thread")]
async fn routers_share_the_submission_rate_of_a_tenant() {
    let (cluster, _guard) = cluster(|service, _, _| match service {
        Service::Router => vec!["limits.submissions_per_second_per_tenant=20".into()],
        _ => Vec::new(),
    })
    .await;
    let api = Api::new(&cluster.urls[0], &cluster.token("globex", "ann", &[])).unwrap();
    let submit = SubmitRequest {
        action: "echo".into(),
        payload: Some(json_payload("1")),
        ..SubmitRequest::default()
    };
    // The gateway distributes calls over the routers in round-robin order.
    let share = "more than 20 submissions a second, 10 at this router";
    within_timeout("a rejection that reports the share", async {
        loop {
            match api.router().submit(api.call(submit.clone())).await {
                Err(rejected) if rejected.message().contains(share) => return,
                Err(rejected) => assert_eq!(rejected.code(), Code::ResourceExhausted, "{rejected}"),
                Ok(_) => {}
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_router_knows_declared_actions_once_the_worker_is_welcomed() {
    let (cluster, _guard) = cluster(|_, _, _| Vec::new()).await;
    let token = cluster.token("acme", "ann", &["worker:*"]);
    let mut workers = Vec::new();
    for number in 0..10 {
        let action = format!("new-{number}");
        let hello = hello(&action, 1, vec![declare(&action)]);
        let url = &cluster.urls[number % 2];
        let first = work_request::Message::Hello(hello);
        workers.push(ScriptedWorker::try_connect_at(url, &token, first).await.unwrap());
        for router in 0..2 {
            let api = Api::new(&cluster.url(Service::Router, router), &token).unwrap();
            let submit = SubmitRequest { action: action.clone(), ..SubmitRequest::default() };
            api.router().submit(api.call(submit)).await.unwrap();
        }
    }
}
