//! Start-up and claims on a large store, which is filled directly before the server starts.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use bytes::Bytes;
use streamer_core::{Clock, OutputDigest, SystemClock, Timestamp, Uid};
use streamer_proto::{
    common::v1::{Event, OutputSummary, Succeeded, event::Kind},
    timestamp,
};
use streamer_store::{
    Append, Claim, ClaimOutcome, NewRequest, Owner, Quota, Store, StoredPayload, Writer,
};
use tempfile::TempDir;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::report::{Report, SUCCEEDED};
use super::server_process::ServerProcess;

/// Number of concurrent store operations while the store is filled.
const WRITERS: usize = 256;
/// Period during which claims are counted.
const CLAIM_PERIOD: Duration = Duration::from_secs(3);
/// Number of server starts, of which the median is reported.
const STARTS: usize = 5;

pub(super) async fn run(
    finished: usize,
    queued: usize,
    settings: &[String],
) -> anyhow::Result<Report> {
    let data = TempDir::with_prefix("streamer-bench-").context("failed to create a data folder")?;
    let began = Instant::now();
    fill(data.path(), finished, queued).await?;
    let fill_time = began.elapsed();
    let size = data.path().join("streamer.db").metadata()?.len();

    let no_async_actions = [settings, &["execution.builtin_actions=echo".to_owned()]].concat();
    let mut starts = Vec::with_capacity(STARTS);
    let mut folder = data;
    for _ in 0..STARTS {
        let began = Instant::now();
        let server = ServerProcess::start_in(folder, &no_async_actions)?;
        starts.push(began.elapsed());
        folder = server.stop()?;
    }
    starts.sort_unstable();

    let server = ServerProcess::start_in(folder, settings)?;
    let before = server.processor_ms()?;
    let began = Instant::now();
    sleep(CLAIM_PERIOD).await;
    let claimed: u64 = server.metric(SUCCEEDED).await?;
    let (elapsed, processor_ms) = (began.elapsed(), server.processor_ms()?.saturating_sub(before));
    if claimed >= queued as u64 {
        bail!("all {queued} queued requests ended within {elapsed:?}; increase --queued");
    }
    let mut report = Report::new("store");
    report.figure("finished", finished, "");
    report.figure("queued", queued, "");
    report.figure("file", size / 1024 / 1024, "MiB");
    report.figure("filling it took", fill_time.as_secs(), "s");
    let median = starts[starts.len() / 2].as_micros();
    report.figure("start until ready", u64::try_from(median)?, "µs");
    report.rate("claimed and completed", claimed, elapsed);
    report.processor(processor_ms, claimed);
    report.check_delivery(&server).await?;
    Ok(report)
}

/// Creates the requests in the store with [`WRITERS`] concurrent operations.
async fn fill(data: &Path, finished: usize, queued: usize) -> anyhow::Result<()> {
    let store = streamer_store_sqlite::open(data)?;
    let mut writers = JoinSet::new();
    for position in 0..WRITERS {
        let share = |total: usize| total / WRITERS + usize::from(position < total % WRITERS);
        let (store, finished, queued) = (store.clone(), share(finished), share(queued));
        writers.spawn(async move {
            for _ in 0..finished {
                create_finished(&store).await?;
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

/// Creates a request, claims it and appends its terminal event.
async fn create_finished(store: &Arc<dyn Store>) -> anyhow::Result<()> {
    let (request, now) = (new_request(), SystemClock.now());
    let uid = request.uid;
    store.create_request(request).await?;
    let claim = Claim {
        uid,
        holder: "bench".into(),
        worker: None,
        now,
        lease_until: now.plus(Duration::from_secs(60)),
        repeats: None,
    };
    let ClaimOutcome::Claimed(claimed) = store.claim(claim).await? else {
        bail!("a new request could not be claimed")
    };
    let empty = OutputDigest::default();
    let output = OutputSummary { chunks: 0, sha256: empty.sha256().to_vec().into() };
    let end = Event {
        seq: claimed.record.last_seq.next().as_i64(),
        attempt: 1,
        time: Some(timestamp(now.as_millis())),
        kind: Some(Kind::Succeeded(Succeeded { result: None, output: Some(output) })),
    };
    let append = Append {
        uid,
        writer: Writer::Attempt(claimed.record.attempt),
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
