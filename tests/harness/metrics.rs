//! Reads the metrics of a server.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    str::FromStr,
    time::Duration,
};

/// Timeout of a request for the metrics, which applies if the server is stopped or blocked.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Returns all metrics of the server at `url`, in the text format of Prometheus.
///
/// # Panics
/// Panics if the server cannot be reached.
pub async fn metrics(url: &str) -> String {
    let address = url
        .trim_start_matches("http://")
        .parse()
        .expect("the URL contains an IP address and a port");
    let read = tokio::task::spawn_blocking(move || read(address));
    read.await.expect("reading does not panic").expect("the server responds")
}

/// Returns the value of a counter or gauge without labels; `None` if the server does not respond or has no such metric.
pub(crate) fn value<T: FromStr>(address: SocketAddr, name: &str) -> Option<T> {
    let metrics = read(address).ok()?;
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value?.parse().ok()
}

/// Returns the sum of the series of a counter or gauge with all the given labels, such as
/// `name{outcome="succeeded"}`; 0 if there are none.
///
/// # Panics
/// Panics if a value is not a number.
#[must_use]
pub fn sum(metrics: &str, series: &str) -> usize {
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    let wanted: Vec<_> =
        labels.trim_end_matches('}').split(',').filter(|l| !l.is_empty()).collect();
    let values = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = match rest.strip_prefix('{') {
            Some(labelled) => labelled.split_once("} ")?,
            None => ("", rest.strip_prefix(' ')?),
        };
        let matches = wanted.iter().all(|wanted| labels.split(',').any(|label| label == *wanted));
        matches.then(|| value.parse::<usize>().expect("a whole number"))
    });
    values.sum()
}

fn read(address: SocketAddr) -> std::io::Result<String> {
    let mut socket = TcpStream::connect_timeout(&address, TIMEOUT)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes())?;
    let mut response = String::new();
    socket.read_to_string(&mut response)?;
    Ok(response)
}
