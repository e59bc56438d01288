//! The connections of this gateway: counted, looked after, noted in the store.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use streamer_core::{Clock, Timestamp, Uid, limited_address};
use streamer_store::{ConnectionRecord, Owner, Store};
use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    GatewayOptions,
    buffers::Buffers,
    handle::{ConnectionHandle, close_code},
    messages,
    metrics::GatewayMetrics,
    ws::frame,
};

/// Seconds that a client has to answer a close frame.
const CLOSE_TIMEOUT: u32 = 5;
/// A client is told so long before its token ends.
const EXPIRY_NOTICE: Duration = Duration::from_secs(60);
/// This gateway's life is renewed in the store so often, and ends after three times that.
const GATEWAY_LEASE: Duration = Duration::from_secs(20);
/// Changes noted in the store at a time.
const NOTE_BATCH: usize = 1000;
/// Changes that wait to be noted at most; beyond that old ones are dropped, and the gateway's own
/// lease is what ends them.
const MAX_WAITING_NOTES: usize = 100_000;
const NOTE_RETRY: Duration = Duration::from_secs(1);

pub(crate) struct Registry {
    name: String,
    connections: Mutex<Connections>,
    notes: Mutex<Notes>,
    noted: Notify,
    /// The last connection has gone.
    emptied: Notify,
    /// Bytes of unfinished messages.
    pub(crate) buffers: Buffers,
    /// Seconds since the start, from 1.
    seconds: AtomicU32,
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    options: Arc<GatewayOptions>,
    metrics: GatewayMetrics,
}

#[derive(Default)]
struct Connections {
    by_id: HashMap<Uid, Arc<ConnectionHandle>>,
    /// The same, by tenant and user.
    of_tenant: HashMap<String, HashMap<String, HashMap<Uid, Arc<ConnectionHandle>>>>,
    of_address: HashMap<IpAddr, usize>,
    draining: bool,
}

impl Connections {
    fn of_user(&self, tenant: &str, user: &str) -> Option<&HashMap<Uid, Arc<ConnectionHandle>>> {
        self.of_tenant.get(tenant)?.get(user)
    }

    /// Takes a connection out of those of its user.
    fn forget(&mut self, owner: &Owner, id: Uid) {
        let Some(of_tenant) = self.of_tenant.get_mut(&owner.tenant) else { return };
        let Some(of_user) = of_tenant.get_mut(&owner.user) else { return };
        of_user.remove(&id);
        if of_user.is_empty() {
            of_tenant.remove(&owner.user);
        }
        if of_tenant.is_empty() {
            self.of_tenant.remove(&owner.tenant);
        }
    }
}

#[derive(Default)]
struct Notes {
    opened: HashMap<Uid, ConnectionRecord>,
    /// The oldest first.
    closed: BTreeSet<Uid>,
}

/// Why a connection is not let in.
pub(crate) enum Refused {
    /// Too many of one user.
    User(usize),
    /// Too many from one address.
    Address(usize),
    /// Too many in all.
    Total(usize),
    /// The gateway is stopping.
    Draining,
}

impl Registry {
    pub(crate) fn new(
        name: String,
        store: Arc<dyn Store>,
        clock: Arc<dyn Clock>,
        options: Arc<GatewayOptions>,
        metrics: GatewayMetrics,
    ) -> Self {
        let buffers = Buffers::new(
            options.max_buffered_bytes,
            options.max_buffered_bytes_per_user,
            metrics.clone(),
        );
        Self {
            name,
            buffers,
            connections: Mutex::default(),
            notes: Mutex::default(),
            noted: Notify::new(),
            emptied: Notify::new(),
            seconds: AtomicU32::new(1),
            store,
            clock,
            options,
            metrics,
        }
    }

    /// A coarse clock that costs nothing to read.
    pub(crate) fn seconds(&self) -> u32 {
        self.seconds.load(Ordering::Relaxed)
    }

    /// Lets a connection in, within the limits.
    pub(crate) fn add(&self, handle: &Arc<ConnectionHandle>) -> Result<(), Refused> {
        let owner = handle.owner();
        let options = &self.options;
        let mut connections = self.connections.lock();
        if connections.draining {
            return Err(Refused::Draining);
        }
        if connections.by_id.len() >= options.max_connections {
            return Err(Refused::Total(options.max_connections));
        }
        let of_user = connections.of_user(&owner.tenant, &owner.user).map_or(0, HashMap::len);
        if of_user >= options.max_connections_per_user {
            return Err(Refused::User(options.max_connections_per_user));
        }
        if let Some(address) = handle.remote_address {
            let of_address = connections.of_address.entry(limited_address(address)).or_insert(0);
            if *of_address >= options.max_connections_per_address {
                return Err(Refused::Address(options.max_connections_per_address));
            }
            *of_address += 1;
        }
        let of_tenant = connections.of_tenant.entry(owner.tenant.clone()).or_default();
        let of_user = of_tenant.entry(owner.user.clone()).or_default();
        of_user.insert(handle.id, handle.clone());
        connections.by_id.insert(handle.id, handle.clone());
        drop(connections);
        // Spread over the heartbeat, so that pings do not go out all at once.
        let heartbeat = u32::try_from(options.heartbeat.as_secs()).unwrap_or(25).max(1);
        let spread = u32::try_from(handle.id.spread() % u64::from(heartbeat)).unwrap_or(0);
        let now = self.seconds();
        handle.pulse.seen.store(now, Ordering::Relaxed);
        handle.pulse.reading.store(true, Ordering::Relaxed);
        handle.pulse.pinged.store(now.saturating_sub(spread), Ordering::Relaxed);
        self.metrics.connections.inc();
        self.metrics.opened.inc();
        self.note(|notes| {
            notes.opened.insert(handle.id, self.record(handle, owner));
        });
        Ok(())
    }

    pub(crate) fn remove(&self, handle: &ConnectionHandle) {
        let mut connections = self.connections.lock();
        if connections.by_id.remove(&handle.id).is_none() {
            return;
        }
        connections.forget(&handle.owner(), handle.id);
        if let Some(address) = handle.remote_address {
            count_down(&mut connections.of_address, &limited_address(address));
        }
        let empty = connections.by_id.is_empty();
        drop(connections);
        if empty {
            self.emptied.notify_waiters();
        }
        self.metrics.connections.dec();
        self.note(|notes| {
            // What was never noted need not be forgotten.
            if notes.opened.remove(&handle.id).is_none() {
                notes.closed.insert(handle.id);
                if notes.closed.len() > MAX_WAITING_NOTES {
                    notes.closed.pop_first();
                }
            }
        });
    }

    pub(crate) fn get(&self, id: Uid) -> Option<Arc<ConnectionHandle>> {
        self.connections.lock().by_id.get(&id).cloned()
    }

    /// Pushes a frame to every connection of a tenant, or of one user of it; says to how many.
    pub(crate) fn push(&self, tenant: &str, user: Option<&str>, frame: &Bytes) -> usize {
        let recipients: Vec<_> = {
            let connections = self.connections.lock();
            match user {
                Some(user) => {
                    let of_user = connections.of_user(tenant, user).into_iter().flatten();
                    of_user.map(|(_, handle)| handle.clone()).collect()
                }
                None => {
                    let users = connections.of_tenant.get(tenant).into_iter().flatten();
                    users.flat_map(|(_, of_user)| of_user.values().cloned()).collect()
                }
            }
        };
        recipients.iter().for_each(|handle| handle.push(frame.clone()));
        recipients.len()
    }

    /// Looks after every connection once a second: one timer for all of them.
    pub(crate) async fn sweep(&self, shutdown: CancellationToken) {
        let mut ticks = interval(Duration::from_secs(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let now = self.seconds.fetch_add(1, Ordering::Relaxed) + 1;
            let time = self.clock.now();
            let all: Vec<_> = self.connections.lock().by_id.values().cloned().collect();
            for handle in all {
                self.look_after(&handle, now, time);
            }
        }
    }

    fn look_after(&self, handle: &ConnectionHandle, now: u32, time: Timestamp) {
        let pulse = &handle.pulse;
        let since = |then: u32| now.saturating_sub(then);
        let closing = pulse.closing_since.load(Ordering::Relaxed);
        if closing != 0 {
            if since(closing) >= CLOSE_TIMEOUT {
                handle.abort();
            }
            return;
        }
        let heartbeat = u32::try_from(self.options.heartbeat.as_secs()).unwrap_or(25).max(1);
        if !pulse.reading.load(Ordering::Relaxed) {
            pulse.seen.store(now, Ordering::Relaxed);
        }
        let quiet = since(pulse.seen.load(Ordering::Relaxed));
        if quiet > heartbeat.saturating_mul(2) + 1 {
            handle.abort();
            return;
        }
        let partial = &pulse.partial_since;
        let patience = self.options.message_timeout.as_millis().div_ceil(1000);
        let patience = u32::try_from(patience).unwrap_or(u32::MAX);
        match partial.load(Ordering::Relaxed) {
            0 => {}
            // It is not read from: its silence is ours.
            begun if !pulse.reading.load(Ordering::Relaxed) => {
                // Unless the rest has come meanwhile.
                let relaxed = Ordering::Relaxed;
                let _is_the_same = partial.compare_exchange(begun, now, relaxed, relaxed);
            }
            begun if since(begun) > patience => {
                let rule = "a message must be whole in time (gateway.message_timeout_ms)";
                handle.close(close_code::POLICY, rule);
                return;
            }
            _ => {}
        }
        let slow = u32::try_from(self.options.slow_consumer_timeout.as_secs()).unwrap_or(30).max(1);
        let blocked = pulse.blocked_since.load(Ordering::Relaxed);
        if blocked != 0 && since(blocked) >= slow {
            handle.close(close_code::TOO_SLOW, "it does not take what it asked for");
            return;
        }
        if quiet >= heartbeat && since(pulse.pinged.load(Ordering::Relaxed)) >= heartbeat {
            pulse.pinged.store(now, Ordering::Relaxed);
            handle.push(frame::PING);
        }
        let expires_at = handle.principal().expires_at;
        if expires_at <= time {
            handle.close(close_code::UNAUTHENTICATED, "the token has expired");
        } else if expires_at.since(time) <= EXPIRY_NOTICE
            && !pulse.expiry_told.swap(true, Ordering::Relaxed)
        {
            handle.push(messages::auth_expiring(expires_at, time));
        }
    }

    /// Tells every connection to go elsewhere, and lets nobody in any more.
    pub(crate) fn drain(&self, reconnect_after: Duration) {
        let all: Vec<_> = {
            let mut connections = self.connections.lock();
            connections.draining = true;
            connections.by_id.values().cloned().collect()
        };
        let reconnect_after_ms = i64::try_from(reconnect_after.as_millis()).unwrap_or(0);
        let frame = messages::draining(reconnect_after_ms, self.clock.now());
        for handle in all {
            handle.push(frame.clone());
            handle.close(close_code::GOING_AWAY, "the gateway is stopping");
        }
    }

    /// Returns once nobody is connected.
    pub(crate) async fn empty(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.connections.lock().by_id.is_empty() {
                return;
            }
            emptied.await;
        }
    }

    /// Brings changes into the store, many at a time, and says that this gateway lives.
    pub(crate) async fn keep_notes(&self, shutdown: CancellationToken) {
        let mut renewals = interval(GATEWAY_LEASE);
        renewals.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.noted.notified() => {}
                _ = renewals.tick() => {
                    let until = self.clock.now().plus(GATEWAY_LEASE * 3);
                    if let Err(error) = self.store.renew_gateway(self.name.clone(), until).await {
                        tracing::warn!(%error, "could not renew the gateway's lease");
                    }
                }
            }
            while let Some((opened, closed)) = self.take_notes() {
                let kept = (opened.clone(), closed.clone());
                if let Err(error) = self.store.update_connections(opened, closed).await {
                    tracing::warn!(%error, "could not note connections, will try again");
                    self.put_back(kept);
                    // Looked at again after the pause, and so is everything else meanwhile.
                    self.noted.notify_one();
                    tokio::select! {
                        () = shutdown.cancelled() => return,
                        () = sleep(NOTE_RETRY) => break,
                    }
                }
            }
        }
    }

    fn take_notes(&self) -> Option<(Vec<ConnectionRecord>, Vec<Uid>)> {
        let mut notes = self.notes.lock();
        let ids: Vec<Uid> = notes.opened.keys().take(NOTE_BATCH).copied().collect();
        let opened: Vec<_> = ids.iter().filter_map(|id| notes.opened.remove(id)).collect();
        let closed: Vec<Uid> =
            std::iter::from_fn(|| notes.closed.pop_first()).take(NOTE_BATCH).collect();
        if notes.opened.is_empty() {
            notes.opened = HashMap::new();
        }
        (!opened.is_empty() || !closed.is_empty()).then_some((opened, closed))
    }

    fn put_back(&self, (opened, closed): (Vec<ConnectionRecord>, Vec<Uid>)) {
        self.note(|notes| {
            for record in opened {
                // Closed meanwhile: it may have been written all the same, and has to be removed.
                if !notes.closed.contains(&record.id) {
                    notes.opened.insert(record.id, record);
                }
            }
            notes.closed.extend(closed);
        });
    }

    fn note(&self, change: impl FnOnce(&mut Notes)) {
        change(&mut self.notes.lock());
        self.noted.notify_one();
    }

    fn record(&self, handle: &ConnectionHandle, owner: Owner) -> ConnectionRecord {
        ConnectionRecord {
            id: handle.id,
            owner,
            gateway: self.name.clone(),
            remote_address: handle.remote_address.map(|ip| ip.to_string()).unwrap_or_default(),
            user_agent: handle.user_agent.to_string(),
            connect_time: handle.connect_time,
        }
    }
}

fn count_down<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}
