//! `streamer.progress.v1.ProgressService`.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::stream::BoxStream;
use parking_lot::Mutex;
use streamer_auth::{Caller, Principal};
use streamer_core::{Limits, OpenWatches, Uid, Violations, validate};
use streamer_handler::OutputBudget;
use streamer_proto::{
    common::v1::Event,
    progress::v1::{
        ListEventsRequest, ListEventsResponse, WatchRequest, WatchResponse,
        progress_service_client::ProgressServiceClient, progress_service_server::ProgressService,
    },
};
use streamer_rpc::{
    FORWARDED, Member, WATCH_COUNTED, encode_event, not_found, status, store_status,
    validation_status, with_authorization,
};
use streamer_store::{Owner, RequestRecord, Store, StoreError, find_by_name};
use tokio::{sync::OnceCell, time::timeout};
use tonic::{Code, Request, Response, Status, metadata::MetadataValue};

use crate::{
    Ring,
    topics::{Read, Subscription, Topics},
    unread::{UnreadBudget, relay},
    watcher::Watcher,
};

/// How long another instance may take to begin a stream, before it is served here.
const PASS_ON_TIMEOUT: Duration = Duration::from_secs(3);
/// Names looked up at once, beyond which entries that nobody needs are looked for.
const MAX_FINDING: usize = 1024;
const MAX_PAGE: i32 = 1000;
const DEFAULT_PAGE: usize = 100;
const MAX_PAGE_BYTES: usize = 1024 * 1024;

/// Serves watchers.
pub struct WatchService {
    topics: Arc<Topics>,
    store: Arc<dyn Store>,
    ring: Option<Ring>,
    limits: Limits,
    open_watches: Arc<OpenWatches>,
    unread: Arc<OutputBudget>,
    finding: Finding,
}

/// Names that are being looked up: who asks for the same one at the same time shares the answer.
type Finding = Mutex<HashMap<(Owner, String), Weak<OnceCell<Option<Found>>>>>;

/// What a name stands for.
#[derive(Clone)]
struct Found {
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
        unread: Arc<OutputBudget>,
    ) -> Self {
        Self { topics, store, ring, limits, open_watches, unread, finding: Mutex::default() }
    }

    /// Passes a watch on to the instance that the request belongs to, where its events come first;
    /// `None` when that is this one, or cannot be reached.
    async fn pass_on(
        &self,
        caller: &Caller,
        request: &WatchRequest,
    ) -> Result<Option<BoxStream<'static, Result<WatchResponse, Status>>>, Status> {
        let Some(ring) = &self.ring else { return Ok(None) };
        // An own id that looks like a uid may lead to another instance, which serves it too.
        let mut watch = request.clone();
        let uid = match request.request_id.parse::<Uid>() {
            Ok(uid) => uid,
            Err(_) => {
                let uid = self.find(&caller.principal, &request.request_id).await?;
                watch.request_id = uid.to_string();
                uid
            }
        };
        let Some(owner) = ring.owner(uid).filter(Member::seems_up) else { return Ok(None) };
        let mut watch = with_authorization(watch, caller.authorization.clone());
        watch.metadata_mut().insert(FORWARDED, MetadataValue::from_static("1"));
        let mut client = ProgressServiceClient::new(owner.watch_channel())
            .max_decoding_message_size(self.limits.max_message_bytes().saturating_mul(2));
        match timeout(PASS_ON_TIMEOUT, client.watch(watch)).await {
            Ok(Ok(response)) => Ok(Some(Box::pin(response.into_inner()))),
            Ok(Err(status)) if status.code() == Code::Unavailable => {
                owner.note(false);
                Ok(None)
            }
            Ok(Err(status)) => Err(status),
            Err(_) => {
                owner.note(false);
                Ok(None)
            }
        }
    }

    /// Subscribes to the request that `name` stands for, if the caller may read it.
    async fn subscribe(&self, principal: &Principal, name: &str) -> Result<Subscription, Status> {
        if let Ok(uid) = name.parse::<Uid>()
            && let Some(subscription) = self.topics.loaded(uid)
            && let Some(request) = subscription.topic.snapshot()
            && principal.may_read(&request.tenant_id, &request.user_id)
        {
            return Ok(subscription);
        }
        let uid = self.find(principal, name).await?;
        let subscription = self.topics.load(uid).await.map_err(|error| store_status(&error))?;
        subscription.ok_or_else(|| not_found(name))
    }

    async fn find(&self, principal: &Principal, name: &str) -> Result<Uid, Status> {
        let owner = Owner { tenant: principal.tenant.clone(), user: principal.user.clone() };
        let key = (owner, name.to_owned());
        let (asking, joined) = {
            let mut finding = self.finding.lock();
            match finding.get(&key).and_then(Weak::upgrade) {
                Some(asking) => (asking, true),
                None => {
                    // Of those who gave up, the entries stay.
                    if finding.len() >= MAX_FINDING {
                        finding.retain(|_, asking| asking.strong_count() > 0);
                    }
                    let asking = Arc::new(OnceCell::new());
                    finding.insert(key.clone(), Arc::downgrade(&asking));
                    (asking, false)
                }
            }
        };
        let look_up = || async {
            let record = find_by_name(&*self.store, &key.0, name).await?;
            let found = |record: RequestRecord| Found { uid: record.uid, owner: record.owner };
            Ok::<_, StoreError>(record.map(found))
        };
        let mut found = asking.get_or_try_init(look_up).await.cloned();
        if joined && matches!(found, Ok(None)) {
            // The others may have looked before it was there.
            found = look_up().await;
        }
        {
            // The last one of those who ask together takes the entry away.
            let mut finding = self.finding.lock();
            if Arc::strong_count(&asking) == 1
                && finding.get(&key).is_some_and(|known| known.ptr_eq(&Arc::downgrade(&asking)))
            {
                finding.remove(&key);
            }
        }
        match found.map_err(|error| store_status(&error))? {
            Some(found) if principal.may_read(&found.owner.tenant, &found.owner.user) => {
                Ok(found.uid)
            }
            _ => Err(not_found(name)),
        }
    }

    /// A page of a log that is in memory, if its reader may read it.
    fn in_memory(
        &self,
        principal: &Principal,
        request: &ListEventsRequest,
        wanted: usize,
    ) -> Option<Vec<Event>> {
        let uid = request.request_id.parse().ok()?;
        let topic = self.topics.loaded(uid)?.topic;
        let snapshot = topic.snapshot()?;
        if !principal.may_read(&snapshot.tenant_id, &snapshot.user_id) {
            return None;
        }
        match topic.read(request.after_seq, wanted, MAX_PAGE_BYTES) {
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
        let caller = caller(&request)?;
        let forwarded = request.metadata().contains_key(FORWARDED);
        // A gateway reads for all of its subscribers, and counts them itself.
        let of_gateway = request.metadata().contains_key(WATCH_COUNTED);
        let request = request.into_inner();
        let mut violations = check_name(&request.request_id);
        if let Some(after_seq) = request.after_seq {
            violations.check("after_seq", validate::in_range(after_seq, 0, i64::MAX, ""));
        }
        refuse(&violations)?;
        if let Some(ring) = &self.ring {
            ring.check_serving()?;
        }
        let principal = &caller.principal;
        let unread = (!of_gateway).then(|| UnreadBudget::of(&self.unread, principal));
        let counted = if forwarded || of_gateway {
            None
        } else {
            let of_user = self.open_watches.of(&principal.tenant, &principal.user);
            Some(of_user.open().map_err(|error| status(&error))?)
        };
        if !forwarded && let Some(stream) = self.pass_on(&caller, &request).await? {
            return Ok(Response::new(relay(stream, counted, unread)));
        }
        let subscription = self.subscribe(principal, &request.request_id).await?;
        let (topics, store) = (self.topics.clone(), self.store.clone());
        let watcher = Watcher::new(subscription, topics, store, &request, (counted, unread));
        Ok(Response::new(watcher.into_stream()))
    }

    async fn list_events(
        &self,
        request: Request<ListEventsRequest>,
    ) -> Result<Response<ListEventsResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let mut violations = check_name(&request.request_id);
        let page_size = i64::from(request.page_size);
        violations.check("page_size", validate::in_range(page_size, 0, i64::from(MAX_PAGE), ""));
        violations.check("after_seq", validate::in_range(request.after_seq, 0, i64::MAX, ""));
        refuse(&violations)?;
        let wanted = match request.page_size {
            0 => DEFAULT_PAGE,
            size => usize::try_from(size).unwrap_or(DEFAULT_PAGE),
        };
        let encoding = request.payload_encoding();
        let mut events = match self.in_memory(&caller.principal, &request, wanted) {
            Some(events) => events,
            None => {
                let uid = self.find(&caller.principal, &request.request_id).await?;
                let page =
                    self.store.read_events(uid, request.after_seq, wanted, MAX_PAGE_BYTES).await;
                page.map_err(|error| store_status(&error))?.events
            }
        };
        for event in &mut events {
            encode_event(event, encoding);
        }
        Ok(Response::new(ListEventsResponse { events }))
    }
}

fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| Status::internal("the service is wired without authentication"))
}

fn check_name(name: &str) -> Violations {
    let mut violations = Violations::default();
    violations.check("request_id", validate::request_id(name));
    violations
}

fn refuse(violations: &Violations) -> Result<(), Status> {
    if violations.is_empty() { Ok(()) } else { Err(validation_status(violations)) }
}
