//! Implementation of `streamer.admin.v1.AdminService`.

use std::sync::Arc;

use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use sha2::{Digest, Sha256};
use streamer_auth::{Caller, permissions};
use streamer_core::{Clock, RequestError};
use streamer_proto::{
    admin::v1::{
        BackupHeader, BackupRequest, BackupResponse, BackupTrailer,
        admin_service_server::AdminService, backup_response::Part,
    },
    timestamp,
};
use streamer_rpc::{status, store_status};
use streamer_store::{BackupContent, BackupOutcome, Store};
use tonic::{Request, Response, Status};

use crate::error::failed_precondition;

/// Maximum size of the data in a message of a backup, in bytes.
const CHUNK_BYTES: usize = 256 * 1024;

/// Implements the API for operators.
pub struct AdminApi {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
}

impl AdminApi {
    pub(crate) fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>) -> Self {
        Self { store, clock }
    }
}

#[tonic::async_trait]
impl AdminService for AdminApi {
    type BackupStream = BoxStream<'static, Result<BackupResponse, Status>>;

    async fn backup(
        &self,
        request: Request<BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        Caller::of(&request)?.require(permissions::OPERATOR)?;
        // All changes that were acknowledged before this time are in the copy.
        let create_time = self.clock.now();
        let backup = match self.store.back_up().await.map_err(|error| store_status(&error))? {
            BackupOutcome::Created(backup) => backup,
            BackupOutcome::InProgress => {
                let message = "a different backup is in progress; only one can run at a time";
                return Err(status(&RequestError::limited("backups", message, None)));
            }
            BackupOutcome::OutOfSpace { required, available } => {
                return Err(failed_precondition(format!(
                    "the data folder has not enough disk space for a backup: {required} bytes are \
                     required, {available} are available"
                )));
            }
            BackupOutcome::NotSupported => {
                return Err(failed_precondition(
                    "store engine dynamodb makes no backups of this kind; use the point-in-time \
                     recovery of the tables (docs/dynamodb.md)"
                        .into(),
                ));
            }
        };
        let header = BackupHeader {
            schema_version: backup.schema_version,
            size_bytes: i64::try_from(backup.size).unwrap_or(i64::MAX),
            create_time: Some(timestamp(create_time.as_millis())),
        };
        let header = stream::once(std::future::ready(Ok(response(Part::Header(header)))));
        Ok(Response::new(header.chain(parts(backup.content)).boxed()))
    }
}

/// Returns the messages after the header. Each is read when it can be sent.
fn parts(
    content: Box<dyn BackupContent>,
) -> impl stream::Stream<Item = Result<BackupResponse, Status>> + Send {
    let unread = Some((content, Sha256::new()));
    stream::try_unfold(unread, |unread| async {
        let Some((mut content, mut digest)) = unread else { return Ok(None) };
        let data = content.next(CHUNK_BYTES).await.map_err(|error| store_status(&error))?;
        if data.is_empty() {
            let sha256 = digest.finalize().to_vec().into();
            return Ok(Some((response(Part::Trailer(BackupTrailer { sha256 })), None)));
        }
        digest.update(&data);
        Ok(Some((response(Part::Data(data)), Some((content, digest)))))
    })
}

fn response(part: Part) -> BackupResponse {
    BackupResponse { part: Some(part) }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use streamer_store::StoreError;

    use super::*;

    /// Content that consists of zeros; `None` stands for an error.
    struct Zeros(Vec<Option<usize>>);

    #[tonic::async_trait]
    impl BackupContent for Zeros {
        async fn next(&mut self, max_bytes: usize) -> Result<Bytes, StoreError> {
            let Some(next) = self.0.pop() else { return Ok(Bytes::new()) };
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
        let parts = parts(Box::new(Zeros(sizes)));
        parts.map(|part| part.map(|response| response.part.unwrap())).collect().await
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
        assert_eq!(parts[1].as_ref().unwrap_err().code(), tonic::Code::Unavailable);
    }
}
