//! Sends the content of a backup to a client.
//!
//! A task owns the content, and not the response stream: hyper polls a response body only while the client accepts data
//! for it. A client that accepts none, and does not close the connection, would otherwise keep the copy of the store,
//! and prevent other backups, for an unlimited time.

use std::time::Duration;

use futures_util::{Stream, stream};
use sha2::{Digest, Sha256};
use streamer_core::ErrorCode;
use streamer_proto::admin::v1::{BackupTrailer, backup_response::Part};
use streamer_rpc::{error_status, store_status};
use streamer_store::BackupContent;
use tokio::{sync::mpsc, time::timeout};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

/// Maximum size of the data in a message of a backup, in bytes.
const CHUNK_BYTES: usize = 256 * 1024;
/// Maximum time for which a client may accept no message.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Returns the messages after the header. The content is dropped when the stream ends or is dropped, when no message is
/// taken for [`STALL_TIMEOUT`], and after `time_left`, when the token of the caller expires.
pub(crate) fn parts(
    content: Box<dyn BackupContent>,
    time_left: Duration,
) -> impl Stream<Item = Result<Part, Status>> + Send {
    let (sender, receiver) = mpsc::channel(1);
    let sending = tokio::spawn(async move {
        let sent = timeout(time_left, send(content, sender)).await;
        sent.unwrap_or_else(|_| Err(error_status(ErrorCode::Unauthorized, "the token has expired")))
    });
    let state = Some((receiver, AbortOnDropHandle::new(sending)));
    stream::unfold(state, |state| async {
        let (mut receiver, sending) = state?;
        if let Some(part) = receiver.recv().await {
            return Some((Ok(part), Some((receiver, sending))));
        }
        let sent = sending.await.unwrap_or_else(|error| Err(Status::internal(error.to_string())));
        sent.err().map(|status| (Err(status), None))
    })
}

/// Sends the data and the trailer.
async fn send(
    mut content: Box<dyn BackupContent>,
    sender: mpsc::Sender<Part>,
) -> Result<(), Status> {
    let mut digest = Sha256::new();
    loop {
        let free = timeout(STALL_TIMEOUT, sender.reserve()).await.map_err(|_| {
            let seconds = STALL_TIMEOUT.as_secs();
            let message = format!("slow consumer: the client has read no data for {seconds} s");
            error_status(ErrorCode::Timeout, message)
        })?;
        // The client has disconnected.
        let Ok(free) = free else { return Ok(()) };
        let data = content.next(CHUNK_BYTES).await.map_err(|error| store_status(&error))?;
        if data.is_empty() {
            let sha256 = digest.finalize().to_vec().into();
            free.send(Part::Trailer(BackupTrailer { sha256 }));
            return Ok(());
        }
        digest.update(&data);
        free.send(Part::Data(data));
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, pin::pin};

    use bytes::Bytes;
    use futures_util::StreamExt;
    use streamer_store::StoreError;
    use tokio::{sync::oneshot, time::Instant};
    use tonic::Code;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// Content that consists of zeros.
    struct Zeros {
        /// Sizes of the parts, the last one first; `None` stands for an error.
        sizes: Vec<Option<usize>>,
        /// Channel that is closed when the content is dropped.
        _dropped: Option<oneshot::Sender<Infallible>>,
    }

    #[tonic::async_trait]
    impl BackupContent for Zeros {
        async fn next(&mut self, max_bytes: usize) -> Result<Bytes, StoreError> {
            let Some(next) = self.sizes.pop() else { return Ok(Bytes::new()) };
            let size = next.ok_or_else(|| StoreError::Unavailable {
                doing: "reading",
                reason: "the disk failed".into(),
            })?;
            assert!(size <= max_bytes);
            Ok(vec![0; size].into())
        }
    }

    async fn collect(mut sizes: Vec<Option<usize>>) -> Vec<Result<Part, Status>> {
        sizes.reverse();
        parts(Box::new(Zeros { sizes, _dropped: None }), HOUR).collect().await
    }

    /// Returns the messages of a large backup, and a receiver that completes when its content is dropped.
    fn large(
        time_left: Duration,
    ) -> (impl Stream<Item = Result<Part, Status>>, oneshot::Receiver<Infallible>) {
        let (sender, dropped) = oneshot::channel();
        let content = Zeros { sizes: vec![Some(1); 1000], _dropped: Some(sender) };
        (parts(Box::new(content), time_left), dropped)
    }

    /// Waits until the content is dropped; returns how long it took.
    async fn dropped_after(dropped: oneshot::Receiver<Infallible>) -> Duration {
        let start = Instant::now();
        assert!(timeout(2 * HOUR, dropped).await.expect("the content is dropped").is_err());
        start.elapsed()
    }

    #[tokio::test]
    async fn the_trailer_contains_the_checksum_of_all_data() {
        let parts = collect(vec![Some(CHUNK_BYTES), Some(1)]).await;
        assert_eq!(parts.len(), 3);
        let Ok(Part::Trailer(trailer)) = &parts[2] else { panic!("{parts:?}") };
        assert_eq!(trailer.sha256, Sha256::digest(vec![0; CHUNK_BYTES + 1]).to_vec());
    }

    #[tokio::test]
    async fn a_backup_that_cannot_be_read_has_no_trailer() {
        let parts = collect(vec![Some(1), None, Some(1)]).await;
        assert_eq!(parts.len(), 2);
        assert_eq!(parts[1].as_ref().unwrap_err().code(), Code::Unavailable);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_nothing_loses_the_backup() {
        let (parts, dropped) = large(HOUR);
        let mut parts = pin!(parts);
        parts.next().await.unwrap().unwrap();
        // The stream is not polled.
        assert_eq!(dropped_after(dropped).await, STALL_TIMEOUT);
        let mut rest: Vec<_> = parts.collect().await;
        let status = rest.pop().unwrap().unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert!(status.message().contains("60 s"), "{status}");
        assert!(rest.iter().all(|part| matches!(part, Ok(Part::Data(_)))), "{rest:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_keeps_the_backup_until_its_token_expires() {
        let (parts, _dropped) = large(HOUR);
        let mut parts = pin!(parts);
        let start = Instant::now();
        let status = loop {
            tokio::time::sleep(STALL_TIMEOUT / 2).await;
            match parts.next().await.unwrap() {
                Ok(part) => assert!(matches!(part, Part::Data(_))),
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), Code::Unauthenticated);
        assert!(start.elapsed() >= HOUR);
        assert!(parts.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn an_unread_backup_ends_when_the_token_expires() {
        let (parts, dropped) = large(Duration::from_secs(10));
        assert_eq!(dropped_after(dropped).await, Duration::from_secs(10));
        let last = parts.collect::<Vec<_>>().await.pop().unwrap();
        assert_eq!(last.unwrap_err().code(), Code::Unauthenticated);
    }

    #[tokio::test(start_paused = true)]
    async fn the_backup_of_a_disconnected_client_is_dropped() {
        let (parts, dropped) = large(HOUR);
        drop(parts);
        assert_eq!(dropped_after(dropped).await, Duration::ZERO);
    }
}
