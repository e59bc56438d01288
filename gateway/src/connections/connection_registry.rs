//! Registry of the connections of this gateway: enforces limits, checks liveness and writes
//! connection records to the store.

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
use streamer_core::{Clock, CloseCode, Timestamp, Uid, rate_limit_key, saturate};
use streamer_store::{ConnectionRecord, Owner, Store};
use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    buffer_budget::BufferBudget, connection_handle::ConnectionHandle, metrics::GatewayMetrics,
    options::GatewayOptions, protocol::server_message, ws::frame,
};

/// Time within which a client must respond to a close frame, in seconds.
const CLOSE_TIMEOUT: u32 = 5;
/// Time before the expiry of a token at which the client is notified.
const EXPIRY_NOTICE: Duration = Duration::from_secs(60);
/// Interval at which the gateway renews its lease in the store; the lease lasts three intervals.
const LEASE_RENEWAL_INTERVAL: Duration = Duration::from_secs(20);
/// Maximum number of records that one write adds, and maximum number that it removes.
const WRITE_BATCH: usize = 1000;
/// Maximum number of pending removals. Above it, the oldest removals are dropped; their records expire
/// with the gateway's lease.
const MAX_PENDING_REMOVALS: usize = 100_000;
/// Delay before a failed write is retried.
const WRITE_RETRY_DELAY: Duration = Duration::from_secs(1);

pub(crate) struct ConnectionRegistry {
    name: String,
    connections: Mutex<Connections>,
    pending_writes: Mutex<PendingWrites>,
    write_queued: Notify,
    /// Notified when the last connection is removed.
    emptied: Notify,
    /// Budget of bytes for incomplete messages.
    pub(crate) buffer_budget: BufferBudget,
    /// Time since the gateway started, in seconds, beginning at 1.
    seconds: AtomicU32,
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    options: Arc<GatewayOptions>,
    metrics: GatewayMetrics,
}

#[derive(Default)]
struct Connections {
    by_id: HashMap<Uid, Arc<ConnectionHandle>>,
    /// The connections of `by_id`, indexed by tenant and user.
    by_tenant: HashMap<String, HashMap<String, HashMap<Uid, Arc<ConnectionHandle>>>>,
    count_by_address: HashMap<IpAddr, usize>,
    draining: bool,
}

impl Connections {
    fn of_user(&self, tenant: &str, user: &str) -> Option<&HashMap<Uid, Arc<ConnectionHandle>>> {
        self.by_tenant.get(tenant)?.get(user)
    }

    /// Removes a connection from the index of its user.
    fn remove_from_user(&mut self, owner: &Owner, id: Uid) {
        let Some(of_tenant) = self.by_tenant.get_mut(&owner.tenant) else { return };
        let Some(of_user) = of_tenant.get_mut(&owner.user) else { return };
        of_user.remove(&id);
        if of_user.is_empty() {
            of_tenant.remove(&owner.user);
        }
        if of_tenant.is_empty() {
            self.by_tenant.remove(&owner.tenant);
        }
    }
}

#[derive(Default)]
struct PendingWrites {
    opened: HashMap<Uid, ConnectionRecord>,
    /// Identifiers of closed connections, oldest first.
    closed: BTreeSet<Uid>,
}

/// Reason for the rejection of a connection.
pub(crate) enum AdmissionError {
    /// The user has reached the given maximum number of connections.
    TooManyPerUser(usize),
    /// The address has reached the given maximum number of connections.
    TooManyPerAddress(usize),
    /// The gateway has reached the given maximum number of connections.
    TooMany(usize),
    /// The gateway is draining.
    Draining,
}

impl ConnectionRegistry {
    pub(crate) fn new(
        name: String,
        store: Arc<dyn Store>,
        clock: Arc<dyn Clock>,
        options: Arc<GatewayOptions>,
        metrics: GatewayMetrics,
    ) -> Self {
        let buffer_budget = BufferBudget::new(
            options.max_buffered_bytes,
            options.max_buffered_bytes_per_user,
            metrics.clone(),
        );
        Self {
            name,
            buffer_budget,
            connections: Mutex::default(),
            pending_writes: Mutex::default(),
            write_queued: Notify::new(),
            emptied: Notify::new(),
            seconds: AtomicU32::new(1),
            store,
            clock,
            options,
            metrics,
        }
    }

    /// Returns the time of a coarse clock that is cheap to read.
    pub(crate) fn seconds(&self) -> u32 {
        self.seconds.load(Ordering::Relaxed)
    }

    /// Adds a connection if the limits allow it.
    pub(crate) fn add(&self, handle: &Arc<ConnectionHandle>) -> Result<(), AdmissionError> {
        let owner = handle.owner();
        let options = &self.options;
        let mut connections = self.connections.lock();
        if connections.draining {
            return Err(AdmissionError::Draining);
        }
        if connections.by_id.len() >= options.max_connections {
            return Err(AdmissionError::TooMany(options.max_connections));
        }
        let of_user = connections.of_user(&owner.tenant, &owner.user).map_or(0, HashMap::len);
        if of_user >= options.max_connections_per_user {
            return Err(AdmissionError::TooManyPerUser(options.max_connections_per_user));
        }
        if let Some(address) = handle.remote_address {
            let of_address =
                connections.count_by_address.entry(rate_limit_key(address)).or_insert(0);
            if *of_address >= options.max_connections_per_address {
                return Err(AdmissionError::TooManyPerAddress(options.max_connections_per_address));
            }
            *of_address += 1;
        }
        let of_tenant = connections.by_tenant.entry(owner.tenant.clone()).or_default();
        let of_user = of_tenant.entry(owner.user.clone()).or_default();
        of_user.insert(handle.id, handle.clone());
        connections.by_id.insert(handle.id, handle.clone());
        drop(connections);
        // Spreads the pings of all connections over the heartbeat interval.
        let heartbeat = saturate::to_u32(options.heartbeat.as_secs()).max(1);
        let spread = saturate::to_u32(handle.id.spread() % u64::from(heartbeat));
        let now = self.seconds();
        handle.liveness.last_frame.store(now, Ordering::Relaxed);
        handle.liveness.reading.store(true, Ordering::Relaxed);
        handle.liveness.last_ping.store(now.saturating_sub(spread), Ordering::Relaxed);
        self.metrics.connections.inc();
        self.metrics.accepted.inc();
        self.queue_write(|pending| {
            pending.opened.insert(handle.id, self.connection_record(handle, owner));
        });
        Ok(())
    }

    pub(crate) fn remove(&self, handle: &ConnectionHandle) {
        let mut connections = self.connections.lock();
        if connections.by_id.remove(&handle.id).is_none() {
            return;
        }
        connections.remove_from_user(&handle.owner(), handle.id);
        if let Some(address) = handle.remote_address {
            decrement(&mut connections.count_by_address, &rate_limit_key(address));
        }
        let empty = connections.by_id.is_empty();
        drop(connections);
        if empty {
            self.emptied.notify_waiters();
        }
        self.metrics.connections.dec();
        self.queue_write(|pending| {
            // A record that has not been written yet does not need to be removed.
            if pending.opened.remove(&handle.id).is_none() {
                pending.closed.insert(handle.id);
                if pending.closed.len() > MAX_PENDING_REMOVALS {
                    pending.closed.pop_first();
                }
            }
        });
    }

    pub(crate) fn get(&self, id: Uid) -> Option<Arc<ConnectionHandle>> {
        self.connections.lock().by_id.get(&id).cloned()
    }

    /// Pushes a frame to every connection of a tenant, or of one of its users. Returns the number of recipients.
    pub(crate) fn push(&self, tenant: &str, user: Option<&str>, frame: &Bytes) -> usize {
        let recipients: Vec<_> = {
            let connections = self.connections.lock();
            match user {
                Some(user) => {
                    let of_user = connections.of_user(tenant, user).into_iter().flatten();
                    of_user.map(|(_, handle)| handle.clone()).collect()
                }
                None => {
                    let users = connections.by_tenant.get(tenant).into_iter().flatten();
                    users.flat_map(|(_, of_user)| of_user.values().cloned()).collect()
                }
            }
        };
        recipients.iter().for_each(|handle| handle.push(frame.clone()));
        recipients.len()
    }

    /// Checks the liveness of every connection once per second, with one timer for all connections.
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
                self.check_liveness(&handle, now, time);
            }
        }
    }

    fn check_liveness(&self, handle: &ConnectionHandle, now: u32, time: Timestamp) {
        let liveness = &handle.liveness;
        let since = |then: u32| now.saturating_sub(then);
        let closing = liveness.closing_since.load(Ordering::Relaxed);
        if closing != 0 {
            if since(closing) >= CLOSE_TIMEOUT {
                handle.abort();
            }
            return;
        }
        let heartbeat = saturate::to_u32(self.options.heartbeat.as_secs()).max(1);
        if !liveness.reading.load(Ordering::Relaxed) {
            liveness.last_frame.store(now, Ordering::Relaxed);
        }
        let quiet = since(liveness.last_frame.load(Ordering::Relaxed));
        if quiet > heartbeat.saturating_mul(2) + 1 {
            handle.abort();
            return;
        }
        let partial = &liveness.partial_since;
        let limit = self.options.message_timeout.as_millis().div_ceil(1000);
        let limit = saturate::to_u32(limit);
        match partial.load(Ordering::Relaxed) {
            0 => {}
            // The gateway does not read from the connection, so the client does not cause the delay.
            begun if !liveness.reading.load(Ordering::Relaxed) => {
                // The exchange fails if the message has been completed in the meantime.
                let relaxed = Ordering::Relaxed;
                let _unchanged = partial.compare_exchange(begun, now, relaxed, relaxed);
            }
            begun if since(begun) > limit => {
                let rule = "a message was not complete in time (gateway.message_timeout)";
                handle.close(CloseCode::PolicyViolation, rule);
                return;
            }
            _ => {}
        }
        let slow = saturate::to_u32(self.options.slow_consumer_timeout.as_secs()).max(1);
        let blocked = liveness.blocked_since.load(Ordering::Relaxed);
        if blocked != 0 && since(blocked) >= slow {
            let reason = "slow consumer: send buffer full (gateway.slow_consumer_timeout)";
            handle.close(CloseCode::SlowConsumer, reason);
            return;
        }
        if quiet >= heartbeat && since(liveness.last_ping.load(Ordering::Relaxed)) >= heartbeat {
            liveness.last_ping.store(now, Ordering::Relaxed);
            handle.push(frame::PING);
        }
        let expires_at = handle.principal().expires_at;
        if expires_at <= time {
            handle.close(CloseCode::Unauthenticated, "the token has expired");
        } else if expires_at.since(time) <= EXPIRY_NOTICE
            && !liveness.expiry_notified.swap(true, Ordering::Relaxed)
        {
            handle.push(server_message::auth_expiring(expires_at, time));
        }
    }

    /// Requests that every client reconnect, closes all connections and rejects new ones.
    pub(crate) fn drain(&self, reconnect_after: Duration) {
        let all: Vec<_> = {
            let mut connections = self.connections.lock();
            connections.draining = true;
            connections.by_id.values().cloned().collect()
        };
        let reconnect_after_ms = saturate::to_millis(reconnect_after);
        let frame = server_message::draining(reconnect_after_ms, self.clock.now());
        for handle in all {
            handle.push(frame.clone());
            handle.close(CloseCode::GoingAway, "the gateway is shutting down");
        }
    }

    /// Waits until all connections are removed.
    pub(crate) async fn wait_until_empty(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.connections.lock().by_id.is_empty() {
                return;
            }
            emptied.await;
        }
    }

    /// Writes changes to the store in batches and renews the gateway's lease until `shutdown` is cancelled.
    pub(crate) async fn flush_registrations(&self, shutdown: CancellationToken) {
        let mut renewals = interval(LEASE_RENEWAL_INTERVAL);
        renewals.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.write_queued.notified() => {}
                _ = renewals.tick() => {
                    let until = self.clock.now().plus(LEASE_RENEWAL_INTERVAL * 3);
                    if let Err(error) = self.store.renew_gateway(self.name.clone(), until).await {
                        tracing::warn!(%error, "failed to renew the gateway's lease");
                    }
                }
            }
            while let Some((opened, closed)) = self.take_batch() {
                let batch = (opened.clone(), closed.clone());
                if let Err(error) = self.store.update_connections(opened, closed).await {
                    tracing::warn!(%error, "failed to write connection records; retrying");
                    self.requeue(batch);
                    // The batch is retried after the delay, together with changes made in the meantime.
                    self.write_queued.notify_one();
                    tokio::select! {
                        () = shutdown.cancelled() => return,
                        () = sleep(WRITE_RETRY_DELAY) => break,
                    }
                }
            }
        }
    }

    fn take_batch(&self) -> Option<(Vec<ConnectionRecord>, Vec<Uid>)> {
        let mut pending = self.pending_writes.lock();
        let ids: Vec<Uid> = pending.opened.keys().take(WRITE_BATCH).copied().collect();
        let opened: Vec<_> = ids.iter().filter_map(|id| pending.opened.remove(id)).collect();
        let closed: Vec<Uid> =
            std::iter::from_fn(|| pending.closed.pop_first()).take(WRITE_BATCH).collect();
        if pending.opened.is_empty() {
            pending.opened = HashMap::new();
        }
        (!opened.is_empty() || !closed.is_empty()).then_some((opened, closed))
    }

    fn requeue(&self, (opened, closed): (Vec<ConnectionRecord>, Vec<Uid>)) {
        self.queue_write(|pending| {
            for record in opened {
                // If the connection has been closed, its removal is kept: the failed write may have stored the record.
                if !pending.closed.contains(&record.id) {
                    pending.opened.insert(record.id, record);
                }
            }
            pending.closed.extend(closed);
        });
    }

    fn queue_write(&self, change: impl FnOnce(&mut PendingWrites)) {
        change(&mut self.pending_writes.lock());
        self.write_queued.notify_one();
    }

    fn connection_record(&self, handle: &ConnectionHandle, owner: Owner) -> ConnectionRecord {
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

fn decrement<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}
