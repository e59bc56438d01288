//! Waits for the outcome of an async request.

use std::time::Duration;

use streamer_auth::Caller;
use streamer_cluster::RouteKey;
use streamer_core::{Backoff, TenantLimit, Uid};
use streamer_proto::{
    common::v1::Event,
    progress::v1::{WatchRequest, WatchResponse},
};
use streamer_rpc::{Responses, is_terminal, with_authorization};
use tokio::time::{sleep, timeout};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::upstreams::Upstreams;

/// Initial backoff between watches, with full jitter.
const INITIAL_BACKOFF: Duration = Duration::from_millis(20);
/// Maximum backoff between watches.
const MAX_BACKOFF: Duration = Duration::from_secs(1);

/// Returns the terminal event of a request; `None` if it does not occur within `limit`.
pub(crate) async fn terminal_event(
    upstreams: &Upstreams,
    caller: &Caller,
    uid: Uid,
    limit: Duration,
) -> Result<Option<Event>, Status> {
    match timeout(limit, watch_until_terminal(upstreams, caller, uid)).await {
        Ok(event) => event.map(Some),
        Err(_) => Ok(None),
    }
}

/// Watches a request until its terminal event, and restarts the watch if it fails.
async fn watch_until_terminal(
    upstreams: &Upstreams,
    caller: &Caller,
    uid: Uid,
) -> Result<Event, Status> {
    let mut backoff = Backoff::new(INITIAL_BACKOFF, MAX_BACKOFF);
    loop {
        let watch = WatchRequest {
            request_id: uid.to_string(),
            outcome_only: true,
            ..WatchRequest::default()
        };
        let mut watch = with_authorization(watch, caller.authorization.clone());
        watch.extensions_mut().insert(RouteKey(uid));
        let outcome = match upstreams.progress().watch(watch).await {
            Ok(response) => read_terminal_event(response.into_inner()).await,
            Err(status) => Err(status),
        };
        match outcome {
            Ok(Some(event)) => return Ok(event),
            Ok(None) => {}
            Err(status) if is_permanent(&status) => return Err(status),
            Err(status) => tracing::debug!(%uid, %status, "failed to watch the request; retrying"),
        }
        sleep(backoff.wait()).await;
    }
}

/// Reads a watch stream up to the terminal event; returns `None` if the stream ends without one.
async fn read_terminal_event(
    mut stream: Responses<WatchResponse>,
) -> Result<Option<Event>, Status> {
    while let Some(response) = stream.message().await? {
        if let Some(last) = response.events.into_iter().last()
            && is_terminal(&last)
        {
            return Ok(Some(last));
        }
    }
    Ok(None)
}

/// Returns whether a new watch would fail with the same status.
fn is_permanent(status: &Status) -> bool {
    matches!(status.code(), Code::NotFound | Code::PermissionDenied | Code::Unauthenticated)
        || is_over_watch_limit(status)
}

/// Returns whether `status` reports that the caller has too many open watches. A `RESOURCE_EXHAUSTED` status from an
/// overloaded store is retried instead.
pub(crate) fn is_over_watch_limit(status: &Status) -> bool {
    let limits = [TenantLimit::WatchesPerUser, TenantLimit::WatchesPerTenant];
    let quota = status.get_details_quota_failure();
    quota.is_some_and(|quota| {
        let mut subjects = quota.violations.iter().map(|violation| violation.subject.as_str());
        subjects.any(|subject| limits.iter().any(|limit| limit.option() == subject))
    })
}
