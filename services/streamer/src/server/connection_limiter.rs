//! Limits the number of open TCP connections and decides which new connections are admitted.
//!
//! The number of connections is limited in total and per address, so that file descriptors remain
//! available for other uses. Unauthenticated connections, which have not sent a valid token yet, may use
//! half of the total, and one address may use half of that limit. When an address uses a quarter of the
//! unauthenticated limit, each new connection from it evicts its oldest unauthenticated connection if
//! that connection has been unauthenticated for a second; when the address uses half of the limit, the
//! connection is evicted in any case. When the whole unauthenticated limit is used, a new connection
//! evicts the oldest unauthenticated connection of all addresses if that connection has been
//! unauthenticated for a second; otherwise the new connection is rejected. Therefore, a flood from one
//! address does not lock out a client at a different address, which sends its token in its first request,
//! and many clients behind one proxy can connect at the same time.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    future::Future,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use streamer_core::{rate_limit_key, saturate};
use streamer_rpc::Connection;
use streamer_telemetry::Metrics;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Minimum age at which a connection without a valid token is evicted in favor of other addresses.
const TOKEN_GRACE_PERIOD: Duration = Duration::from_secs(1);

/// Maximum numbers of connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionLimits {
    /// Maximum number of connections in total.
    pub(crate) total: usize,
    /// Maximum number of connections from one address.
    pub(crate) per_address: usize,
}

/// Counts and limits the open connections of a server.
#[derive(Clone)]
pub(crate) struct ConnectionLimiter(Arc<Shared>);

struct Shared {
    limits: ConnectionLimits,
    state: Mutex<State>,
    metrics: ConnectionMetrics,
}

#[derive(Default)]
struct State {
    count: usize,
    by_address: HashMap<IpAddr, AddressState>,
    /// Connections without a valid token, in order of arrival.
    unauthenticated: BTreeMap<u64, Unauthenticated>,
    next: u64,
}

#[derive(Default)]
struct AddressState {
    count: usize,
    /// Numbers of the address's connections without a valid token, in order of arrival.
    unauthenticated: BTreeSet<u64>,
}

/// A connection without a valid token.
struct Unauthenticated {
    address: IpAddr,
    since: Instant,
    /// Must not be upgraded while the lock is held, because dropping the connection acquires the lock.
    connection: Weak<OpenConnection>,
}

impl State {
    /// Removes a connection from the unauthenticated connections.
    fn remove_unauthenticated(&mut self, number: u64) -> Option<Weak<OpenConnection>> {
        let found = self.unauthenticated.remove(&number)?;
        if let Some(of_address) = self.by_address.get_mut(&found.address) {
            of_address.unauthenticated.remove(&number);
        }
        Some(found.connection)
    }

    /// Removes and returns the oldest unauthenticated connection of the given address. If `if_stale` is
    /// set, does so only if its grace period has ended.
    fn take_oldest_of(&mut self, address: IpAddr, if_stale: bool) -> Option<Weak<OpenConnection>> {
        let number = *self.by_address.get(&address)?.unauthenticated.first()?;
        if if_stale && self.unauthenticated.get(&number)?.since.elapsed() < TOKEN_GRACE_PERIOD {
            return None;
        }
        self.remove_unauthenticated(number)
    }

    /// Removes and returns the oldest unauthenticated connection if its grace period has ended.
    fn take_oldest(&mut self) -> Option<Weak<OpenConnection>> {
        let (number, oldest) = self.unauthenticated.first_key_value()?;
        let (number, is_stale) = (*number, oldest.since.elapsed() >= TOKEN_GRACE_PERIOD);
        if is_stale { self.remove_unauthenticated(number) } else { None }
    }
}

struct ConnectionMetrics {
    open: Gauge,
    limit: Gauge,
    unauthenticated: Gauge,
    rejected: Counter,
    evicted: Counter,
}

/// A connection that counts as open until the value is dropped.
pub(crate) struct OpenConnection {
    number: u64,
    address: SocketAddr,
    /// Whether a valid token has been received.
    is_authenticated: AtomicBool,
    /// Cancelled when the connection is evicted.
    pub(crate) evicted: CancellationToken,
    shared: Arc<Shared>,
}

impl ConnectionLimiter {
    pub(crate) fn new(limits: ConnectionLimits, metrics: &Metrics) -> Self {
        let metrics = ConnectionMetrics {
            open: metrics.gauge("streamer_server_connections", "Open TCP connections"),
            limit: metrics.gauge(
                "streamer_server_connections_limit",
                "Limit of open TCP connections (server.max_connections)",
            ),
            unauthenticated: metrics.gauge(
                "streamer_server_unauthenticated_connections",
                "Open TCP connections without a valid token, which may use half of the limit",
            ),
            rejected: metrics.counter(
                "streamer_server_rejected_connections",
                "TCP connections rejected because of the total limit or the limit per address",
            ),
            evicted: metrics.counter(
                "streamer_server_evicted_connections",
                "TCP connections without a valid token closed to admit new connections",
            ),
        };
        metrics.limit.set(saturate::to_i64(limits.total));
        Self(Arc::new(Shared { limits, state: Mutex::default(), metrics }))
    }

    /// Admits a connection if the limits allow it.
    ///
    /// # Errors
    /// Returns the name of the option whose limit is reached.
    pub(crate) fn admit(&self, address: SocketAddr) -> Result<Arc<OpenConnection>, &'static str> {
        let Shared { limits, metrics, .. } = &*self.0;
        let ip = rate_limit_key(address.ip());
        let max_unauthenticated = (limits.total / 2).max(1);
        let mut state = self.0.state.lock();
        let of_address = state.by_address.get(&ip);
        let (count, unauthenticated) =
            of_address.map_or((0, 0), |found| (found.count, found.unauthenticated.len()));
        // An evicted connection frees its descriptor only when it is closed, so the new connection is
        // still rejected at the limits.
        let (outcome, evicted) = if count >= limits.per_address {
            (Err("server.max_connections_per_address"), state.take_oldest_of(ip, false))
        } else if state.count >= limits.total {
            (Err("server.max_connections"), state.take_oldest())
        } else if unauthenticated >= (max_unauthenticated / 2).max(1) {
            (Ok(()), state.take_oldest_of(ip, false))
        } else if unauthenticated >= (max_unauthenticated / 4).max(1) {
            (Ok(()), state.take_oldest_of(ip, true))
        } else if state.unauthenticated.len() >= max_unauthenticated {
            let oldest = state.take_oldest();
            (oldest.as_ref().map(drop).ok_or("server.max_connections"), oldest)
        } else {
            (Ok(()), None)
        };
        let admitted = outcome.map(|()| {
            let number = state.next;
            state.next += 1;
            state.count += 1;
            let of_address = state.by_address.entry(ip).or_default();
            of_address.count += 1;
            of_address.unauthenticated.insert(number);
            let connection = Arc::new(OpenConnection {
                number,
                address,
                is_authenticated: AtomicBool::new(false),
                evicted: CancellationToken::new(),
                shared: self.0.clone(),
            });
            let entry = Unauthenticated {
                address: ip,
                since: Instant::now(),
                connection: Arc::downgrade(&connection),
            };
            state.unauthenticated.insert(number, entry);
            connection
        });
        self.0.update_metrics(&state);
        drop(state);
        if let Some(connection) = evicted.and_then(|connection| connection.upgrade()) {
            connection.evicted.cancel();
            metrics.evicted.inc();
        }
        if admitted.is_err() {
            metrics.rejected.inc();
        }
        admitted
    }
}

impl Shared {
    fn update_metrics(&self, state: &State) {
        self.metrics.open.set(saturate::to_i64(state.count));
        self.metrics.unauthenticated.set(saturate::to_i64(state.unauthenticated.len()));
    }
}

impl OpenConnection {
    /// Returns whether no valid token has been received.
    pub(crate) fn is_unauthenticated(&self) -> bool {
        !self.is_authenticated.load(Ordering::Relaxed)
    }
}

impl Connection for OpenConnection {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn authenticated(&self) {
        if self.is_authenticated.swap(true, Ordering::Relaxed) {
            return;
        }
        let mut state = self.shared.state.lock();
        state.remove_unauthenticated(self.number);
        self.shared.update_metrics(&state);
    }

    fn evicted(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(self.evicted.clone().cancelled_owned())
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        let ip = rate_limit_key(self.address.ip());
        let mut state = self.shared.state.lock();
        state.remove_unauthenticated(self.number);
        state.count -= 1;
        if let Some(of_address) = state.by_address.get_mut(&ip) {
            of_address.count -= 1;
            if of_address.count == 0 {
                state.by_address.remove(&ip);
            }
        }
        self.shared.update_metrics(&state);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn limiter(total: usize, per_address: usize) -> ConnectionLimiter {
        ConnectionLimiter::new(ConnectionLimits { total, per_address }, &Metrics::new())
    }

    fn address(host: u8) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, host], 1))
    }

    #[tokio::test(start_paused = true)]
    async fn unauthenticated_connections_are_evicted_for_new_ones_of_the_same_address() {
        let limiter = limiter(16, 100);
        let client = limiter.admit(address(1)).unwrap();
        client.authenticated();
        let other = limiter.admit(address(1)).unwrap();
        // Half of the unauthenticated limit.
        let flood: Vec<_> = (0..7).map(|_| limiter.admit(address(2)).unwrap()).collect();
        let evicted: Vec<_> = flood.iter().map(|one| one.evicted.is_cancelled()).collect();
        assert_eq!(evicted, [true, true, true, false, false, false, false]);
        assert!(!client.evicted.is_cancelled() && !other.evicted.is_cancelled());
        assert!(!client.is_unauthenticated() && flood[6].is_unauthenticated());
    }

    #[tokio::test(start_paused = true)]
    async fn rejected_connections_evict_none_of_other_addresses() {
        let limiter = limiter(100, 2);
        let client = limiter.admit(address(1)).unwrap();
        let authenticated = |host| {
            let connection = limiter.admit(address(host))?;
            connection.authenticated();
            Ok(connection)
        };
        let mut open = vec![authenticated(2).unwrap(), authenticated(2).unwrap()];
        for _ in 0..1000 {
            assert_eq!(authenticated(2).err(), Some("server.max_connections_per_address"));
        }
        assert!(!client.evicted.is_cancelled());
        open.clear();
        assert!(authenticated(2).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_of_an_address_has_a_grace_period_below_half_of_the_limit() {
        let limiter = limiter(32, 100);
        let mut open: Vec<_> = (0..6).map(|_| limiter.admit(address(1)).unwrap()).collect();
        assert!(open.iter().all(|one| !one.evicted.is_cancelled()));
        advance(TOKEN_GRACE_PERIOD).await;
        open.push(limiter.admit(address(1)).unwrap());
        let evicted: Vec<_> = open.iter().map(|one| one.evicted.is_cancelled()).collect();
        assert_eq!(evicted, [true, false, false, false, false, false, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_connection_has_a_grace_period() {
        let limiter = limiter(4, 4);
        let unauthenticated = [1, 2].map(|host| limiter.admit(address(host)).unwrap());
        assert_eq!(limiter.admit(address(3)).err(), Some("server.max_connections"));
        assert!(unauthenticated.iter().all(|one| !one.evicted.is_cancelled()));
        advance(TOKEN_GRACE_PERIOD).await;
        let late = limiter.admit(address(3)).unwrap();
        assert!(
            unauthenticated[0].evicted.is_cancelled() && !unauthenticated[1].evicted.is_cancelled()
        );
        drop((unauthenticated, late));
        let all = [1, 2, 3, 4].map(|host| {
            let connection = limiter.admit(address(host)).unwrap();
            connection.authenticated();
            connection
        });
        assert_eq!(limiter.admit(address(5)).err(), Some("server.max_connections"));
        drop(all);
        let state = limiter.0.state.lock();
        assert!(
            state.count == 0 && state.by_address.is_empty() && state.unauthenticated.is_empty()
        );
    }
}
