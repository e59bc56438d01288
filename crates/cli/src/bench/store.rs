//! Start-up and claims over a store that holds much: filled directly, then served.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use bytes::Bytes;
use streamer_core::{Clock, OutputDigest, SystemClock, Timestamp, Uid};
use streamer_proto::{
    common::v1::{Event, OutputSummary, Succeeded, event::Kind},
    timestamp,
};
use streamer_store::{
    Append, Claim, ClaimOutcome, Engine, NewRequest, Owner, Quota, Store, StoredPayload, Writer,
};
use tempfile::TempDir;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{Report, report::SUCCEEDED};
use crate::server_process::ServerProcess;

/// Operations on the store that are underway at once while it is filled.
const WRITERS: usize = 256;
/// Claims are counted for so long.
const COUNTED: Duration = Duration::from_secs(3);
/// Starts of the server, of which the median counts.
const STARTS: usize = 5;

pub(super) async fn run(
    finished: usize,
    queued: usize,
    settings: &[String],
) -> anyhow::Result<Report> {
    let data = TempDir::with_prefix("streamer-bench-").context("making a data folder")?;
    let filling = Instant::now();
    fill(data.path(), finished, queued).await?;
    let filling = filling.elapsed();
    let size = data.path().join("streamer.db").metadata()?.len();

    let nothing_runs = [settings, &["execution.local_actions=echo".to_owned()]].concat();
    let mut starts = Vec::with_capacity(STARTS);
    let mut folder = data;
    for _ in 0..STARTS {
        let began = Instant::now();
        let server = ServerProcess::start_in(folder, &nothing_runs)?;
        starts.push(began.elapsed());
        folder = server.stop()?;
    }
    starts.sort_unstable();

    let server = ServerProcess::start_in(folder, settings)?;
    let before = server.processor_ms()?;
    let began = Instant::now();
    sleep(COUNTED).await;
    let claimed: u64 = server.metric(SUCCEEDED).await?;
    let (elapsed, spent) = (began.elapsed(), server.processor_ms()?.saturating_sub(before));
    if claimed >= queued as u64 {
        bail!("the {queued} queued requests were done within {elapsed:?}: queue more");
    }
    let mut report = Report::new("store");
    report.figure("finished", finished, "");
    report.figure("queued", queued, "");
    report.figure("file", size / 1024 / 1024, "MiB");
    report.figure("filling it took", filling.as_secs(), "s");
    let median = starts[starts.len() / 2].as_micros();
    report.figure("start until ready", u64::try_from(median)?, "µs");
    report.rate("claimed and completed", claimed, elapsed);
    report.processor(spent, claimed);
    report.check_delivery(&server).await?;
    Ok(report)
}

async fn fill(data: &Path, finished: usize, queued: usize) -> anyhow::Result<()> {
    let store = streamer_store::open(&Engine::Embedded { data: data.to_owned() })?;
    let mut writers = JoinSet::new();
    for position in 0..WRITERS {
        let share = |of: usize| of / WRITERS + usize::from(position < of % WRITERS);
        let (store, finished, queued) = (store.clone(), share(finished), share(queued));
        writers.spawn(async move {
            for _ in 0..finished {
                live(&store).await?;
            }
            for number in 0..queued {
                let mut request = new_request();
                request.owner.tenant = format!("tenant-{}", number % 10);
                store.create_request(request).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(written) = writers.join_next().await {
        written??;
    }
    Ok(())
}

/// A whole life.
async fn live(store: &Arc<dyn Store>) -> anyhow::Result<()> {
    let (request, now) = (new_request(), SystemClock.now());
    let uid = request.uid;
    store.create_request(request).await?;
    let claim = Claim {
        uid,
        holder: "bench".into(),
        worker: None,
        now,
        lease_until: now.plus(Duration::from_secs(60)),
    };
    let ClaimOutcome::Claimed(claimed) = store.claim(claim).await? else {
        bail!("a new request cannot be claimed")
    };
    let nothing = OutputDigest::default();
    let output = OutputSummary { chunks: 0, sha256: nothing.sha256().to_vec().into() };
    let end = Event {
        seq: claimed.record.last_seq + 1,
        attempt: 1,
        time: Some(timestamp(now.as_millis())),
        kind: Some(Kind::Succeeded(Succeeded { result: None, output: Some(output) })),
    };
    let append = Append {
        uid,
        writer: Writer::Attempt(1),
        events: vec![end],
        checkpoint: None,
        retry_at: None,
        now,
    };
    store.append(append).await?;
    Ok(())
}

fn new_request() -> NewRequest {
    let now: Timestamp = SystemClock.now();
    let data = Bytes::from_static(b"{\"steps\":0}");
    NewRequest {
        uid: Uid::new(now),
        client_id: None,
        owner: Owner { tenant: "bench".into(), user: "bench".into() },
        action: "echo_async".into(),
        payload: StoredPayload { content_type: "application/json".into(), data },
        metadata: None,
        priority: 0,
        create_time: now,
        not_before: now,
        deadline: None,
        close_by: None,
        redrive_of: None,
        trace_parent: None,
        trace_state: None,
        fingerprint: [0; 32],
        quota: Quota::default(),
    }
}
