//! Which TCP connections are open, and which of them are let in.
//!
//! Their number is bounded, in all and from one address, so that descriptors are left for everything
//! else. Connections on which no valid token was seen yet have half of the places, and one address has
//! half of these. When an address has a quarter of these places, each new connection closes its oldest
//! one that has been open for a second without a token; when it has half, its oldest one in any case.
//! When all of these places are taken, a new connection closes the oldest one of all that has been
//! open for a second, or is refused. So a flood from one address does not keep out a client from a
//! different one, which sends its token in its first request, and many clients behind one proxy can
//! connect at once.

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
use streamer_core::limited_address;
use streamer_rpc::Connection;
use streamer_telemetry::Metrics;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A connection without a valid token is not closed for others before this.
const MIN_LIFE: Duration = Duration::from_secs(1);

/// Numbers of connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionLimits {
    /// In all.
    pub(crate) all: usize,
    /// From one address.
    pub(crate) from_one_address: usize,
}

/// The open connections of a server.
#[derive(Clone)]
pub(crate) struct Connections(Arc<Shared>);

struct Shared {
    limits: ConnectionLimits,
    open: Mutex<Open>,
    metrics: ConnectionMetrics,
}

#[derive(Default)]
struct Open {
    count: usize,
    by_address: HashMap<IpAddr, OfAddress>,
    /// Those on which no valid token was seen, by the order in which they came.
    unauthenticated: BTreeMap<u64, Unauthenticated>,
    next: u64,
}

#[derive(Default)]
struct OfAddress {
    count: usize,
    /// Numbers of those on which no valid token was seen.
    unauthenticated: BTreeSet<u64>,
}

/// A connection on which no valid token was seen.
struct Unauthenticated {
    address: IpAddr,
    since: Instant,
    /// Not to be upgraded under the lock: the end of the connection takes it too.
    connection: Weak<OpenConnection>,
}

impl Open {
    /// Takes a connection out of those on which no valid token was seen.
    fn forget(&mut self, number: u64) -> Option<Weak<OpenConnection>> {
        let found = self.unauthenticated.remove(&number)?;
        if let Some(of_address) = self.by_address.get_mut(&found.address) {
            of_address.unauthenticated.remove(&number);
        }
        Some(found.connection)
    }

    /// The oldest one of this address on which no valid token was seen; with `if_stale`, if it had time
    /// to send one.
    fn oldest_of(&mut self, address: IpAddr, if_stale: bool) -> Option<Weak<OpenConnection>> {
        let number = *self.by_address.get(&address)?.unauthenticated.first()?;
        if if_stale && self.unauthenticated.get(&number)?.since.elapsed() < MIN_LIFE {
            return None;
        }
        self.forget(number)
    }

    /// The oldest one of all, if it had time to send a token.
    fn oldest(&mut self) -> Option<Weak<OpenConnection>> {
        let (number, oldest) = self.unauthenticated.first_key_value()?;
        let (number, had_time) = (*number, oldest.since.elapsed() >= MIN_LIFE);
        if had_time { self.forget(number) } else { None }
    }
}

struct ConnectionMetrics {
    open: Gauge,
    limit: Gauge,
    unauthenticated: Gauge,
    refused: Counter,
    evicted: Counter,
}

/// A connection that is open as long as this lives.
pub(crate) struct OpenConnection {
    number: u64,
    address: SocketAddr,
    /// A valid token was seen on it.
    is_known: AtomicBool,
    /// It has to make room.
    pub(crate) evicted: CancellationToken,
    shared: Arc<Shared>,
}

impl Connections {
    pub(crate) fn new(limits: ConnectionLimits, metrics: &Metrics) -> Self {
        let metrics = ConnectionMetrics {
            open: metrics.gauge("streamer_server_connections", "Open TCP connections"),
            limit: metrics
                .gauge("streamer_server_connections_limit", "Limit of open TCP connections (server.max_connections)"),
            unauthenticated: metrics.gauge(
                "streamer_server_unauthenticated_connections",
                "Open TCP connections on which no valid token was seen; they get half of the places",
            ),
            refused: metrics.counter(
                "streamer_server_refused_connections",
                "TCP connections that were closed at once: too many in all or from one address",
            ),
            evicted: metrics.counter(
                "streamer_server_evicted_connections",
                "TCP connections without a valid token that were closed to make room",
            ),
        };
        metrics.limit.set(i64::try_from(limits.all).unwrap_or(i64::MAX));
        Self(Arc::new(Shared { limits, open: Mutex::default(), metrics }))
    }

    /// Lets a connection in, if there is room; otherwise says which option bounds it.
    pub(crate) fn admit(&self, address: SocketAddr) -> Result<Arc<OpenConnection>, &'static str> {
        let Shared { limits, metrics, .. } = &*self.0;
        let ip = limited_address(address.ip());
        let max_unauthenticated = (limits.all / 2).max(1);
        let mut open = self.0.open.lock();
        let of_address = open.by_address.get(&ip);
        let (count, unauthenticated) =
            of_address.map_or((0, 0), |found| (found.count, found.unauthenticated.len()));
        // An evicted connection leaves its descriptor only once it has closed: where all places are
        // taken, this one is refused all the same.
        let (outcome, evicted) = if count >= limits.from_one_address {
            (Err("server.max_connections_per_address"), open.oldest_of(ip, false))
        } else if open.count >= limits.all {
            (Err("server.max_connections"), open.oldest())
        } else if unauthenticated >= (max_unauthenticated / 2).max(1) {
            (Ok(()), open.oldest_of(ip, false))
        } else if unauthenticated >= (max_unauthenticated / 4).max(1) {
            (Ok(()), open.oldest_of(ip, true))
        } else if open.unauthenticated.len() >= max_unauthenticated {
            let oldest = open.oldest();
            (oldest.as_ref().map(drop).ok_or("server.max_connections"), oldest)
        } else {
            (Ok(()), None)
        };
        let admitted = outcome.map(|()| {
            let number = open.next;
            open.next += 1;
            open.count += 1;
            let of_address = open.by_address.entry(ip).or_default();
            of_address.count += 1;
            of_address.unauthenticated.insert(number);
            let connection = Arc::new(OpenConnection {
                number,
                address,
                is_known: AtomicBool::new(false),
                evicted: CancellationToken::new(),
                shared: self.0.clone(),
            });
            let newcomer = Unauthenticated {
                address: ip,
                since: Instant::now(),
                connection: Arc::downgrade(&connection),
            };
            open.unauthenticated.insert(number, newcomer);
            connection
        });
        self.0.show(&open);
        drop(open);
        if let Some(connection) = evicted.and_then(|connection| connection.upgrade()) {
            connection.evicted.cancel();
            metrics.evicted.inc();
        }
        if admitted.is_err() {
            metrics.refused.inc();
        }
        admitted
    }
}

impl Shared {
    fn show(&self, open: &Open) {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.metrics.open.set(number(open.count));
        self.metrics.unauthenticated.set(number(open.unauthenticated.len()));
    }
}

impl OpenConnection {
    /// Whether no valid token was seen on it.
    pub(crate) fn is_unauthenticated(&self) -> bool {
        !self.is_known.load(Ordering::Relaxed)
    }
}

impl Connection for OpenConnection {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn authenticated(&self) {
        if self.is_known.swap(true, Ordering::Relaxed) {
            return;
        }
        let mut open = self.shared.open.lock();
        open.forget(self.number);
        self.shared.show(&open);
    }

    fn evicted(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(self.evicted.clone().cancelled_owned())
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        let ip = limited_address(self.address.ip());
        let mut open = self.shared.open.lock();
        open.forget(self.number);
        open.count -= 1;
        if let Some(of_address) = open.by_address.get_mut(&ip) {
            of_address.count -= 1;
            if of_address.count == 0 {
                open.by_address.remove(&ip);
            }
        }
        self.shared.show(&open);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn connections(all: usize, from_one_address: usize) -> Connections {
        Connections::new(ConnectionLimits { all, from_one_address }, &Metrics::new())
    }

    fn address(host: u8) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, host], 1))
    }

    #[tokio::test(start_paused = true)]
    async fn connections_without_a_token_make_room_for_those_of_the_same_address() {
        let connections = connections(16, 100);
        let client = connections.admit(address(1)).unwrap();
        client.authenticated();
        let other = connections.admit(address(1)).unwrap();
        // Half of the half.
        let flood: Vec<_> = (0..7).map(|_| connections.admit(address(2)).unwrap()).collect();
        let evicted: Vec<_> = flood.iter().map(|one| one.evicted.is_cancelled()).collect();
        assert_eq!(evicted, [true, true, true, false, false, false, false]);
        assert!(!client.evicted.is_cancelled() && !other.evicted.is_cancelled());
        assert!(!client.is_unauthenticated() && flood[6].is_unauthenticated());
    }

    #[tokio::test(start_paused = true)]
    async fn refused_connections_evict_none_of_other_addresses() {
        let connections = connections(100, 2);
        let client = connections.admit(address(1)).unwrap();
        let known = |host| {
            let connection = connections.admit(address(host))?;
            connection.authenticated();
            Ok(connection)
        };
        let mut open = vec![known(2).unwrap(), known(2).unwrap()];
        for _ in 0..1000 {
            assert_eq!(known(2).err(), Some("server.max_connections_per_address"));
        }
        assert!(!client.evicted.is_cancelled());
        open.clear();
        assert!(known(2).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_of_an_address_has_a_second_until_half_of_the_places_are_taken() {
        let connections = connections(32, 100);
        let mut open: Vec<_> = (0..6).map(|_| connections.admit(address(1)).unwrap()).collect();
        assert!(open.iter().all(|one| !one.evicted.is_cancelled()));
        advance(MIN_LIFE).await;
        open.push(connections.admit(address(1)).unwrap());
        let evicted: Vec<_> = open.iter().map(|one| one.evicted.is_cancelled()).collect();
        assert_eq!(evicted, [true, false, false, false, false, false, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_has_time_to_send_its_token() {
        let connections = connections(4, 4);
        let strangers = [1, 2].map(|host| connections.admit(address(host)).unwrap());
        assert_eq!(connections.admit(address(3)).err(), Some("server.max_connections"));
        assert!(strangers.iter().all(|one| !one.evicted.is_cancelled()));
        advance(MIN_LIFE).await;
        let late = connections.admit(address(3)).unwrap();
        assert!(strangers[0].evicted.is_cancelled() && !strangers[1].evicted.is_cancelled());
        drop((strangers, late));
        let all = [1, 2, 3, 4].map(|host| {
            let connection = connections.admit(address(host)).unwrap();
            connection.authenticated();
            connection
        });
        assert_eq!(connections.admit(address(5)).err(), Some("server.max_connections"));
        drop(all);
        let open = connections.0.open.lock();
        assert!(open.count == 0 && open.by_address.is_empty() && open.unauthenticated.is_empty());
    }
}
