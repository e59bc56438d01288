//! Implementation of `streamer.progress.v1.ProgressService`.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::stream::BoxStream;
use parking_lot::Mutex;
use streamer_auth::{Caller, Principal};
use streamer_cluster::Instance;
use streamer_core::{Limits, OpenWatches, Seq, Uid, Violations, validate};
use streamer_handler::MemoryBudget;
use streamer_proto::{
    common::v1::Event,
    progress::v1::{
        ListEventsRequest, ListEventsResponse, WatchRequest, WatchResponse,
        progress_service_server::ProgressService,
    },
    stubs::ProgressServiceStub,
};
use streamer_rpc::{
    FORWARDED, WATCH_COUNTED, encode_event, ensure_valid, not_found, read_page_size, status,
    store_status, with_authorization,
};
use streamer_store::{Owner, RequestRecord, Store, StoreError, find_by_client_id_or_uid};
use tokio::{sync::OnceCell, time::timeout};
use tonic::{Code, Request, Response, Status, metadata::MetadataValue};

use crate::{
    ring::Ring,
    topics::{Read, Subscription, Topics},
    unread_budget::{UnreadBudget, relay},
    watcher::Watcher,
};

/// Timeout for another instance to start a watch, after which this instance serves the watch.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(3);
/// Number of pending lookups at which abandoned ones are removed.
const MAX_PENDING_LOOKUPS: usize = 1024;
const MAX_PAGE_SIZE: i32 = 1000;
const DEFAULT_PAGE_SIZE: usize = 100;
const MAX_PAGE_BYTES: usize = 1024 * 1024;

/// Public API for watchers.
pub struct WatchService {
    topics: Arc<Topics>,
    store: Arc<dyn Store>,
    ring: Option<Ring>,
    limits: Limits,
    open_watches: Arc<OpenWatches>,
    unread: Arc<MemoryBudget>,
    lookups: PendingLookups,
}

/// Pending lookups of request IDs; concurrent calls for the same ID share one lookup.
type PendingLookups = Mutex<HashMap<(Owner, String), Weak<OnceCell<Option<ResolvedRequest>>>>>;

/// Request to which a request ID refers.
#[derive(Clone)]
struct ResolvedRequest {
    uid: Uid,
    owner: Owner,
}

impl WatchService {
    pub(crate) fn new(
        topics: Arc<Topics>,
        store: Arc<dyn Store>,
        ring: Option<Ring>,
        limits: Limits,
        open_watches: Arc<OpenWatches>,
        unread: Arc<MemoryBudget>,
    ) -> Self {
        Self { topics, store, ring, limits, open_watches, unread, lookups: Mutex::default() }
    }

    /// Forwards a watch to the instance to which the request belongs, where its events arrive first. Returns `None` if
    /// the owner is this instance, is unreachable or does not respond in time.
    async fn forward(
        &self,
        caller: &Caller,
        request: &WatchRequest,
    ) -> Result<Option<BoxStream<'static, Result<WatchResponse, Status>>>, Status> {
        let Some(ring) = &self.ring else { return Ok(None) };
        // A client ID that is also a valid UID may select a different instance, which can serve the watch too.
        let mut watch = request.clone();
        let uid = match request.request_id.parse::<Uid>() {
            Ok(uid) => uid,
            Err(_) => {
                let uid = self.resolve(&caller.principal, &request.request_id).await?;
                watch.request_id = uid.to_string();
                uid
            }
        };
        let Some(owner) = ring.owner(uid).filter(Instance::is_reachable) else { return Ok(None) };
        let mut watch = with_authorization(watch, caller.authorization.clone());
        watch.metadata_mut().insert(FORWARDED, MetadataValue::from_static("1"));
        let mut client = ProgressServiceStub::new(owner.watch_channel())
            .max_decoding_message_size(self.limits.max_message_bytes().saturating_mul(2));
        match timeout(FORWARD_TIMEOUT, client.watch(watch)).await {
            Ok(Ok(response)) => Ok(Some(Box::pin(response.into_inner()))),
            Ok(Err(status)) if status.code() == Code::Unavailable => {
                owner.record_reachable(false);
                Ok(None)
            }
            Ok(Err(status)) => Err(status),
            Err(_) => {
                owner.record_reachable(false);
                Ok(None)
            }
        }
    }

    /// Subscribes to the request whose `uid` or client ID is `name`, if the caller may read it.
    async fn subscribe(&self, principal: &Principal, name: &str) -> Result<Subscription, Status> {
        if let Ok(uid) = name.parse::<Uid>()
            && let Some(subscription) = self.topics.subscribe_loaded(uid)
            && let Some(request) = subscription.topic.snapshot()
            && principal.can_read(&request.tenant_id, &request.user_id)
        {
            return Ok(subscription);
        }
        let uid = self.resolve(principal, name).await?;
        let subscription = self.topics.load(uid).await.map_err(|error| store_status(&error))?;
        subscription.ok_or_else(|| not_found(name))
    }

    /// Returns the `uid` of the request whose `uid` or client ID is `name`, if the caller may read it.
    async fn resolve(&self, principal: &Principal, name: &str) -> Result<Uid, Status> {
        let owner = Owner { tenant: principal.tenant.clone(), user: principal.user.clone() };
        let key = (owner, name.to_owned());
        let (lookup, is_joined) = {
            let mut lookups = self.lookups.lock();
            match lookups.get(&key).and_then(Weak::upgrade) {
                Some(lookup) => (lookup, true),
                None => {
                    // Callers that abandon a lookup leave its entry in the map.
                    if lookups.len() >= MAX_PENDING_LOOKUPS {
                        lookups.retain(|_, lookup| lookup.strong_count() > 0);
                    }
                    let lookup = Arc::new(OnceCell::new());
                    lookups.insert(key.clone(), Arc::downgrade(&lookup));
                    (lookup, false)
                }
            }
        };
        let query = || async {
            let record = find_by_client_id_or_uid(&*self.store, &key.0, name).await?;
            let resolved =
                |record: RequestRecord| ResolvedRequest { uid: record.uid, owner: record.owner };
            Ok::<_, StoreError>(record.map(resolved))
        };
        let mut result = lookup.get_or_try_init(query).await.cloned();
        if is_joined && matches!(result, Ok(None)) {
            // The shared lookup may have started before the request existed.
            result = query().await;
        }
        {
            // The last of the concurrent callers removes the entry.
            let mut lookups = self.lookups.lock();
            if Arc::strong_count(&lookup) == 1
                && lookups.get(&key).is_some_and(|entry| entry.ptr_eq(&Arc::downgrade(&lookup)))
            {
                lookups.remove(&key);
            }
        }
        match result.map_err(|error| store_status(&error))? {
            Some(found) if principal.can_read(&found.owner.tenant, &found.owner.user) => {
                Ok(found.uid)
            }
            _ => Err(not_found(name)),
        }
    }

    /// Returns a page of the event log if it is in memory and the caller may read it.
    fn read_in_memory(
        &self,
        principal: &Principal,
        request: &ListEventsRequest,
        after_seq: Seq,
        limit: usize,
    ) -> Option<Vec<Event>> {
        let uid = request.request_id.parse().ok()?;
        let topic = self.topics.subscribe_loaded(uid)?.topic;
        let snapshot = topic.snapshot()?;
        if !principal.can_read(&snapshot.tenant_id, &snapshot.user_id) {
            return None;
        }
        match topic.read(after_seq, limit, MAX_PAGE_BYTES) {
            Read::Events(events) => Some(events),
            Read::InStore | Read::UpToDate | Read::Ended => None,
        }
    }
}

#[tonic::async_trait]
impl ProgressService for WatchService {
    type WatchStream = BoxStream<'static, Result<WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let caller = Caller::of(&request)?;
        let is_forwarded = request.metadata().contains_key(FORWARDED);
        // A gateway watches on behalf of its subscribers and counts them itself.
        let is_from_gateway = request.metadata().contains_key(WATCH_COUNTED);
        let request = request.into_inner();
        let mut violations = check_request_id(&request.request_id);
        let after_seq = request.after_seq.map(Seq::from_i64).transpose();
        let after_seq = violations.accept("after_seq", after_seq).flatten();
        ensure_valid(&violations)?;
        if let Some(ring) = &self.ring {
            ring.check_serving()?;
        }
        let principal = &caller.principal;
        let unread = (!is_from_gateway).then(|| UnreadBudget::for_user(&self.unread, principal));
        let open_watch = if is_forwarded || is_from_gateway {
            None
        } else {
            let of_user = self.open_watches.of(&principal.tenant, &principal.user);
            Some(of_user.open().map_err(|error| status(&error))?)
        };
        if !is_forwarded && let Some(stream) = self.forward(&caller, &request).await? {
            return Ok(Response::new(relay(stream, open_watch, unread)));
        }
        let subscription = self.subscribe(principal, &request.request_id).await?;
        let (topics, store) = (self.topics.clone(), self.store.clone());
        let guards = (open_watch, unread);
        let watcher = Watcher::new(subscription, topics, store, &request, after_seq, guards);
        Ok(Response::new(watcher.into_stream()))
    }

    async fn list_events(
        &self,
        request: Request<ListEventsRequest>,
    ) -> Result<Response<ListEventsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut violations = check_request_id(&request.request_id);
        let limit =
            read_page_size(request.page_size, MAX_PAGE_SIZE, DEFAULT_PAGE_SIZE, &mut violations);
        let after_seq = violations.accept("after_seq", Seq::from_i64(request.after_seq));
        let after_seq = after_seq.unwrap_or_default();
        ensure_valid(&violations)?;
        let encoding = request.payload_encoding();
        let mut events = match self.read_in_memory(&caller.principal, &request, after_seq, limit) {
            Some(events) => events,
            None => {
                let uid = self.resolve(&caller.principal, &request.request_id).await?;
                let page = self.store.read_events(uid, after_seq, limit, MAX_PAGE_BYTES).await;
                page.map_err(|error| store_status(&error))?.events
            }
        };
        for event in &mut events {
            encode_event(event, encoding);
        }
        Ok(Response::new(ListEventsResponse { events }))
    }
}

fn check_request_id(name: &str) -> Violations {
    let mut violations = Violations::default();
    violations.check("request_id", validate::request_id(name));
    violations
}
