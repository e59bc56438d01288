//! Functions for the hosts of URLs and for IP addresses.

use std::net::{IpAddr, Ipv6Addr};

/// Returns whether the host of a URL refers to this machine: `localhost`, an address in 127.0.0.0/8, or `::1`. An IPv6
/// address may be in brackets. The whole host must match: `localhost.example.com` does not.
#[must_use]
pub fn is_loopback_host(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// Returns the key that per-address limits use for a peer: the whole address for IPv4 (including IPv4 addresses that
/// are mapped to IPv6), or the first 64 bits of an IPv6 address, because one host owns all addresses with that prefix
/// (RFC 4291 2.5.4, RFC 6177).
#[must_use]
pub fn rate_limit_key(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let network = address.to_bits() & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from_bits(network))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_hosts_are_this_machine() {
        for host in ["localhost", "127.0.0.1", "127.19.28.3", "[::1]", "::1"] {
            assert!(is_loopback_host(host), "{host}");
        }
        for host in
            ["", "localhost.example.com", "127.0.0.1.example.com", "10.0.0.1", "[::2]", "127.1"]
        {
            assert!(!is_loopback_host(host), "{host}");
        }
    }

    #[test]
    fn addresses_of_one_network_count_as_one() {
        let counted = |text: &str| rate_limit_key(text.parse().unwrap()).to_string();
        assert_eq!(counted("192.0.2.1"), "192.0.2.1");
        assert_eq!(counted("::ffff:192.0.2.1"), "192.0.2.1");
        assert_eq!(counted("2001:db8:0:1:2:3:4:5"), "2001:db8:0:1::");
        assert_eq!(counted("2001:db8:0:1:ffff::1"), "2001:db8:0:1::");
        assert_ne!(counted("2001:db8:0:2::"), counted("2001:db8:0:1::"));
    }
}
