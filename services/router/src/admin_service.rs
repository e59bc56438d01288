//! Implementation of `streamer.admin.v1.AdminService`.

use std::sync::Arc;

use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use streamer_auth::{AuthLayer, Caller, permissions};
use streamer_core::{Clock, RequestError};
use streamer_proto::{
    admin::v1::{
        BackupHeader, BackupRequest, BackupResponse, admin_service_server::AdminService,
        backup_response::Part,
    },
    timestamp,
};
use streamer_rpc::{status, store_status};
use streamer_store::{BackupOutcome, Store};
use tonic::{Request, Response, Status};

use crate::{backup_stream::parts, error::failed_precondition};

/// Implements the API for operators.
pub struct AdminApi {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    auth: AuthLayer,
}

impl AdminApi {
    pub(crate) fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>, auth: AuthLayer) -> Self {
        Self { store, clock, auth }
    }
}

#[tonic::async_trait]
impl AdminService for AdminApi {
    type BackupStream = BoxStream<'static, Result<BackupResponse, Status>>;

    async fn backup(
        &self,
        request: Request<BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        let caller = Caller::of(&request)?;
        caller.require(permissions::OPERATOR)?;
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
        let header = stream::once(std::future::ready(Ok(Part::Header(header))));
        let parts = header.chain(parts(backup.content, self.auth.time_left(&caller)));
        let responses = parts.map(|part| part.map(|part| BackupResponse { part: Some(part) }));
        Ok(Response::new(responses.boxed()))
    }
}
