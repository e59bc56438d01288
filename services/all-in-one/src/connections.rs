//! Which TCP connections are open, and which of them are let in.
//!
//! Their number is bounded, in all and from one address, so that descriptors are left for everything
//! else. Connections on which no valid token was seen yet have half of the places: when these are all
//! taken, the one that has been a stranger for longest makes room. So strangers cannot keep clients
//! out, however many they are: a client has its token in its first request.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use streamer_rpc::Connection;
use streamer_telemetry::Metrics;
use tokio_util::sync::CancellationToken;

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
    by_address: HashMap<IpAddr, usize>,
    /// Those on which no valid token was seen, by the order in which they came.
    strangers: BTreeMap<u64, Weak<OpenConnection>>,
    next: u64,
}

struct ConnectionMetrics {
    open: Gauge,
    limit: Gauge,
    strangers: Gauge,
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
                .gauge("streamer_server_connections_limit", "Most of them (server.max_connections)"),
            strangers: metrics.gauge(
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
        let mut open = self.0.open.lock();
        let of_address = open.by_address.get(&address.ip()).copied().unwrap_or(0);
        let refusal = if of_address >= limits.from_one_address {
            Some("server.max_connections_per_address")
        } else {
            (open.count >= limits.all).then_some("server.max_connections")
        };
        if let Some(option) = refusal {
            // The oldest stranger makes room for the next one that comes.
            let oldest = open.strangers.pop_first();
            drop(open);
            self.evict(oldest);
            metrics.refused.inc();
            return Err(option);
        }
        let full = open.strangers.len() >= (limits.all / 2).max(1);
        let oldest = if full { open.strangers.pop_first() } else { None };
        let number = open.next;
        open.next += 1;
        open.count += 1;
        *open.by_address.entry(address.ip()).or_insert(0) += 1;
        let shared = self.0.clone();
        let evicted = CancellationToken::new();
        let connection = Arc::new(OpenConnection {
            number,
            address,
            is_known: AtomicBool::new(false),
            evicted,
            shared,
        });
        open.strangers.insert(number, Arc::downgrade(&connection));
        self.0.show(&open);
        drop(open);
        self.evict(oldest);
        Ok(connection)
    }

    fn evict(&self, stranger: Option<(u64, Weak<OpenConnection>)>) {
        if let Some(connection) = stranger.and_then(|(_, connection)| connection.upgrade()) {
            connection.evicted.cancel();
            self.0.metrics.evicted.inc();
        }
    }
}

impl Shared {
    fn show(&self, open: &Open) {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.metrics.open.set(number(open.count));
        self.metrics.strangers.set(number(open.strangers.len()));
    }
}

impl OpenConnection {
    /// Whether no valid token was seen on it.
    pub(crate) fn is_a_strangers(&self) -> bool {
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
        open.strangers.remove(&self.number);
        self.shared.show(&open);
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        let mut open = self.shared.open.lock();
        open.strangers.remove(&self.number);
        open.count -= 1;
        if let Some(count) = open.by_address.get_mut(&self.address.ip()) {
            *count -= 1;
            if *count == 0 {
                open.by_address.remove(&self.address.ip());
            }
        }
        self.shared.show(&open);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connections(all: usize, from_one_address: usize) -> Connections {
        Connections::new(ConnectionLimits { all, from_one_address }, &Metrics::new())
    }

    fn address(host: u8) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, host], 1))
    }

    #[test]
    fn strangers_make_room_for_later_ones_and_clients_stay() {
        let connections = connections(8, 100);
        let client = connections.admit(address(1)).unwrap();
        client.authenticated();
        let strangers: Vec<_> = (0..5).map(|_| connections.admit(address(2)).unwrap()).collect();
        let evicted: Vec<_> = strangers.iter().map(|one| one.evicted.is_cancelled()).collect();
        assert_eq!(evicted, [true, false, false, false, false]);
        assert!(!client.evicted.is_cancelled());
        assert!(!client.is_a_strangers() && strangers[4].is_a_strangers());
    }

    #[test]
    fn all_and_those_of_one_address_are_bounded() {
        let connections = connections(4, 2);
        let known = |host| {
            let connection = connections.admit(address(host))?;
            connection.authenticated();
            Ok(connection)
        };
        let mut open = vec![known(1).unwrap(), known(1).unwrap()];
        assert_eq!(known(1).err(), Some("server.max_connections_per_address"));
        open.extend([known(2).unwrap(), known(3).unwrap()]);
        assert_eq!(known(4).err(), Some("server.max_connections"));
        open.clear();
        assert!(known(1).is_ok());
    }

    #[test]
    fn a_stranger_is_evicted_when_all_places_are_taken() {
        let connections = connections(2, 2);
        let client = connections.admit(address(1)).unwrap();
        client.authenticated();
        let stranger = connections.admit(address(1)).unwrap();
        assert!(connections.admit(address(2)).is_err());
        assert!(stranger.evicted.is_cancelled());
        drop(stranger);
        assert!(connections.admit(address(2)).is_ok());
    }
}
