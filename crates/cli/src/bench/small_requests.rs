//! Small requests of one tenant, whose times show what others do to it.

use std::time::Duration;

use anyhow::{Context, bail};
use hdrhistogram::Histogram;
use streamer_client::Session;
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    Subject,
    report::{histogram, record},
};

/// How long one of them may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// The times from the submission of each small request to its end. They come one after the other, at most
/// `rate` a second.
pub(super) async fn measure(
    subject: &Subject,
    token: &str,
    rate: u64,
    duration: Duration,
    name: &str,
) -> anyhow::Result<Histogram<u64>> {
    let every = Duration::from_secs_f64(1.0 / rate.max(1) as f64);
    let mut session = Session::connect(&subject.url, token).await?;
    session.next_text().await?;
    let end = Instant::now() + duration;
    let mut latencies = histogram();
    let mut count = 0;
    while Instant::now() < end {
        let begin = Instant::now();
        let payload = r#"{"steps":2,"delay_ms":0,"result":1}"#;
        let id = format!("{name}-{count}");
        let request = format!(r#"{{"id":"{id}","action":"echo_async","payload":{payload}}}"#);
        session.send(request).await?;
        loop {
            let message = timeout(PATIENCE, session.next_text()).await.context("waiting")??;
            if message.starts_with("{\"type\":\"complete\"") {
                break;
            }
            if message.starts_with("{\"type\":\"error\"") {
                bail!("the server refused: {message}");
            }
        }
        record(&mut latencies, begin.elapsed());
        count += 1;
        sleep_until(begin + every).await;
    }
    Ok(latencies)
}
