//! Waiting for the outcome of an async request.

use std::time::Duration;

use streamer_auth::Caller;
use streamer_core::{TenantLimit, Uid, retry};
use streamer_proto::{
    common::v1::Event,
    progress::v1::{WatchRequest, WatchResponse},
};
use streamer_rpc::{RouteKey, is_terminal, with_authorization};
use tokio::time::{sleep, timeout};
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

use crate::peers::Peers;

/// Waits between watches that break off, drawn with full jitter.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// The terminal event of a request, if it comes in time.
pub(crate) async fn for_terminal_event(
    peers: &Peers,
    caller: &Caller,
    uid: Uid,
    limit: Duration,
) -> Result<Option<Event>, Status> {
    match timeout(limit, terminal_event(peers, caller, uid)).await {
        Ok(event) => event.map(Some),
        Err(_) => Ok(None),
    }
}

/// Watches again where a watch breaks off, until the end has come.
async fn terminal_event(peers: &Peers, caller: &Caller, uid: Uid) -> Result<Event, Status> {
    let mut pause = FIRST_PAUSE;
    loop {
        let watch = WatchRequest {
            request_id: uid.to_string(),
            outcome_only: true,
            ..WatchRequest::default()
        };
        let mut watch = with_authorization(watch, caller.authorization.clone());
        watch.extensions_mut().insert(RouteKey(uid));
        let outcome = match peers.progress().watch(watch).await {
            Ok(response) => end_of(response.into_inner()).await,
            Err(status) => Err(status),
        };
        match outcome {
            Ok(Some(event)) => return Ok(event),
            Ok(None) => {}
            Err(status) if is_lasting(&status) => return Err(status),
            Err(status) => tracing::debug!(%uid, %status, "a watch broke off"),
        }
        sleep(pause.mul_f64(retry::random_fraction())).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// The terminal event, when the stream comes to it.
async fn end_of(mut stream: Streaming<WatchResponse>) -> Result<Option<Event>, Status> {
    while let Some(response) = stream.message().await? {
        if let Some(last) = response.events.into_iter().last()
            && is_terminal(&last)
        {
            return Ok(Some(last));
        }
    }
    Ok(None)
}

/// Watching again would not help.
fn is_lasting(status: &Status) -> bool {
    matches!(status.code(), Code::NotFound | Code::PermissionDenied | Code::Unauthenticated)
        || is_over_watch_limit(status)
}

/// The caller has too many watches open. It can watch later; a store that is overloaded is asked again.
pub(crate) fn is_over_watch_limit(status: &Status) -> bool {
    let limits = [TenantLimit::WatchesPerUser, TenantLimit::WatchesPerTenant];
    let quota = status.get_details_quota_failure();
    quota.is_some_and(|quota| {
        let mut subjects = quota.violations.iter().map(|violation| violation.subject.as_str());
        subjects.any(|subject| limits.iter().any(|limit| limit.option() == subject))
    })
}
