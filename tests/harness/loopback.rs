//! Addresses and ports that no other test uses at the same time, in any process.
//!
//! If a test binds port 0, releases the assigned port and uses it later, any process can bind the port in the
//! meantime: the system also assigns such ports to outgoing connections. Ports below the ephemeral range are
//! never assigned; on a loopback address that only one test uses, they remain free.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process,
    sync::atomic::{AtomicU16, AtomicU32, Ordering},
};

/// Port that is bound on an address while the address is claimed.
const CLAIM_PORT: u16 = 10_000;
/// Ports of claimed addresses.
const PORTS: std::ops::Range<u16> = 10_001..20_000;
/// Ports for servers that listen on every address; disjoint from [`PORTS`], which they would block.
const WILDCARD_PORTS: std::ops::Range<u16> = 20_000..32_000;

/// IPv4 loopback address that only one test uses.
pub struct LoopbackAddress {
    ip: Ipv4Addr,
    next_port: AtomicU16,
    _claim: TcpListener,
}

impl LoopbackAddress {
    /// Claims an address until the value is dropped.
    ///
    /// # Panics
    /// Panics if no address can be claimed.
    #[must_use]
    pub fn claim() -> Self {
        // The networks 127.1.0.0/16 to 127.254.0.0/16.
        const COUNT: u32 = 254 << 16;
        let numbers = candidates().take(100).map(|candidate| candidate % COUNT);
        let mut claims = numbers.filter_map(|number| {
            let [_, network, high, low] = number.to_be_bytes();
            Self::try_claim(Ipv4Addr::new(127, network + 1, high, low))
        });
        claims.next().unwrap_or_else(|| panic!("port {CLAIM_PORT} is in use on every address"))
    }

    /// Returns a socket address with a free port that was not returned before.
    ///
    /// # Panics
    /// Panics if all ports have been returned.
    #[must_use]
    pub fn next(&self) -> SocketAddr {
        loop {
            let port = self.next_port.fetch_add(1, Ordering::Relaxed);
            assert!(PORTS.contains(&port), "all ports of {} are in use", self.ip);
            // Fails if a process listens on the port of every address.
            if TcpListener::bind((self.ip, port)).is_ok() {
                return (self.ip, port).into();
            }
        }
    }

    fn try_claim(ip: Ipv4Addr) -> Option<Self> {
        match TcpListener::bind((ip, CLAIM_PORT)) {
            Ok(claim) => Some(Self { ip, next_port: PORTS.start.into(), _claim: claim }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
            Err(error) => panic!("{ip} cannot be claimed: {error}"),
        }
    }
}

/// Port for a server that listens on every address. It is claimed through the loopback address whose last two
/// bytes are the port.
pub(crate) struct WildcardPort {
    pub(crate) number: u16,
    _claim: LoopbackAddress,
}

impl WildcardPort {
    /// Claims a port that is free on every address. A process that is not a test can still bind the port before
    /// the server does.
    pub(crate) fn claim() -> Self {
        let count = u32::from(WILDCARD_PORTS.end - WILDCARD_PORTS.start);
        let mut claims = candidates().take(1_000).filter_map(|candidate| {
            let offset = u16::try_from(candidate % count).expect("less than the count");
            let number = WILDCARD_PORTS.start + offset;
            let [high, low] = number.to_be_bytes();
            let claim = LoopbackAddress::try_claim(Ipv4Addr::new(127, 255, high, low))?;
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, number)).ok()?;
            Some(Self { number, _claim: claim })
        });
        claims.next().expect("a port is free")
    }
}

/// Returns candidate numbers in an order that differs between processes and threads.
fn candidates() -> impl Iterator<Item = u32> {
    const PER_PROCESS: u32 = 64;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = process::id().wrapping_mul(PER_PROCESS);
    std::iter::repeat_with(move || first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)))
}
