//! Hosts of URLs.

use std::net::IpAddr;

/// Returns whether the host of a URL is this machine: `localhost`, or an address in 127.0.0.0/8 or `::1`.
/// An IPv6 address may be in brackets. The whole host counts: `localhost.example.com` is a different one.
#[must_use]
pub fn is_loopback_host(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
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
}
