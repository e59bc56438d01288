//! Every service twice, as processes of their own over DynamoDB Local: killed, cut off and of
//! different opinions, under load. What clients were told is judged by `check-history`.
#![allow(clippy::unwrap_used, reason = "in tests, a panic is the report")]

use streamer_tests::{
    Cluster, Load, Proxy, Service,
    dynamodb::{Implementation, endpoint},
    offered_at,
};

const SETTINGS: [&str; 4] = [
    "execution.lease_ms=1000",
    "execution.poll_interval_ms=100",
    "execution.tenant_share_percent=100",
    "peers.resolve_interval_ms=500",
];

async fn cluster(views: impl Fn(Service, usize, &[Proxy]) -> Vec<String>) -> Cluster {
    let cluster = Cluster::start(endpoint(Implementation::DynamoDbLocal), &SETTINGS, views).await;
    let token = cluster.token("acme", "ann", &["worker:*"]);
    for url in &cluster.urls {
        offered_at(url, &token, "echo_async").await;
    }
    cluster
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_resume_when_one_of_each_service_is_killed_in_turn() {
    let mut cluster = cluster(|_, _, _| Vec::new()).await;
    let token = cluster.token("acme", "ann", &[]);
    let load = Load::start(&cluster.urls, &token, 1, true);
    for number in 0..2 {
        for service in Service::ALL {
            load.more(200).await;
            cluster.kill(service, number);
            load.more(100).await;
            cluster.restart(service, number).await;
        }
    }
    load.more(200).await;
    load.judge("cluster-kills").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_resume_when_a_progress_service_is_cut_off() {
    let cluster = cluster(|_, _, _| Vec::new()).await;
    let token = cluster.token("acme", "ann", &[]);
    let load = Load::start(&cluster.urls, &token, 2, true);
    for number in 0..2 {
        load.more(200).await;
        cluster.cut_off(number);
        load.more(300).await;
        cluster.join(number);
    }
    load.more(200).await;
    load.judge("cluster-cut").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_log_also_when_members_are_of_different_opinions() {
    // Each process knows only one progress service, and not the same one; each of those thinks that
    // it is alone.
    let cluster = cluster(|service, number, proxies| {
        let known = match service {
            Service::Gateway | Service::Progress => number,
            Service::Processor | Service::Router => 1 - number,
        };
        vec![format!("peers.progress=http://{}", proxies[known].address)]
    })
    .await;
    let token = cluster.token("acme", "ann", &[]);
    let load = Load::start(&cluster.urls, &token, 3, true);
    load.more(800).await;
    load.judge("cluster-opinions").await;
}
