//! Implementation of `google.longrunning.Operations` (AIP-151): each request is represented as a long-running
//! operation.

use std::{sync::Arc, time::Duration};

use prost::Message;
use prost_types::Any;
use streamer_auth::Caller;
use streamer_core::{RequestState, Violations, limits};
use streamer_proto::{
    common::v1::PayloadEncoding,
    longrunning::{
        CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
        ListOperationsResponse, Operation, WaitOperationRequest, operation,
        operations_server::Operations,
    },
    router::v1::{OperationMetadata, OperationResponse},
    rpc,
};
use streamer_rpc::{
    encode_payload, ensure_valid, error_from_proto, read_page_size, read_page_token,
    request_to_proto, status, violation_status,
};
use streamer_store::{ListRequests, RequestRecord};
use tonic::{Request, Response, Status};

use crate::{
    await_outcome,
    request_service::{Access, RequestService},
    router_service::{DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, PageBytes, list_scope, next_page_token},
};

const COLLECTION: &str = "operations";

/// Implements the public operations API.
pub struct OperationsApi {
    service: Arc<RequestService>,
}

impl OperationsApi {
    pub(crate) fn new(service: Arc<RequestService>) -> Self {
        Self { service }
    }

    async fn operation(&self, record: &RequestRecord) -> Result<Operation, Status> {
        let request = request_to_proto(record);
        let result = match (record.state, &request.error) {
            (RequestState::Succeeded, _) => {
                let mut result = self.service.result(record).await?;
                if let Some(result) = &mut result {
                    encode_payload(result, PayloadEncoding::JsonValue);
                }
                let response = OperationResponse { result, output: request.output.clone() };
                Some(operation::Result::Response(pack_any(
                    "streamer.router.v1.OperationResponse",
                    &response,
                )))
            }
            (RequestState::Failed | RequestState::Cancelled, Some(error)) => {
                let status = status(&error_from_proto(error));
                let details = rpc::Status::decode(status.details()).unwrap_or_default().details;
                Some(operation::Result::Error(rpc::Status {
                    code: status.code().into(),
                    message: status.message().to_owned(),
                    details,
                }))
            }
            _ => None,
        };
        let metadata = OperationMetadata { request: Some(request) };
        Ok(Operation {
            name: format!("{COLLECTION}/{}", record.uid),
            metadata: Some(pack_any("streamer.router.v1.OperationMetadata", &metadata)),
            done: record.state.is_terminal(),
            result,
        })
    }
}

#[tonic::async_trait]
impl Operations for OperationsApi {
    async fn list_operations(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut violations = Violations::default();
        if !matches!(request.name.as_str(), "" | COLLECTION) {
            violations.push("name", "must be empty or \"operations\"");
        }
        let in_filter = |state: &RequestState| match request.filter.as_str() {
            "done=true" => state.is_terminal(),
            "done=false" => !state.is_terminal(),
            _ => true,
        };
        if !matches!(request.filter.as_str(), "" | "done=true" | "done=false") {
            violations.push("filter", "must be empty, \"done=true\" or \"done=false\"");
        }
        let states = RequestState::ALL.iter().copied().filter(in_filter).collect();
        let before = read_page_token(&request.page_token, &mut violations);
        let limit =
            read_page_size(request.page_size, MAX_PAGE_SIZE, DEFAULT_PAGE_SIZE, &mut violations);
        ensure_valid(&violations)?;
        let (tenant, user) = list_scope(&caller, String::new())?;
        let query = ListRequests { tenant, user, states, action: None, before, limit };
        let page = self.service.list(query).await?;
        let mut page_bytes = PageBytes::default();
        let mut operations = Vec::with_capacity(page.requests.len());
        for record in &page.requests {
            let operation = self.operation(record).await?;
            if !page_bytes.try_add(&operation) {
                break;
            }
            operations.push(operation);
        }
        let next_page_token = next_page_token(&page, operations.len());
        Ok(Response::new(ListOperationsResponse { operations, next_page_token }))
    }

    async fn get_operation(
        &self,
        request: Request<GetOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let caller = Caller::of(&request)?;
        let name = request_id_of_name(&request.get_ref().name)?;
        let record = self.service.find(&caller, name, Access::Read).await?;
        Ok(Response::new(self.operation(&record).await?))
    }

    async fn delete_operation(
        &self,
        request: Request<DeleteOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let caller = Caller::of(&request)?;
        self.service.delete(&caller, request_id_of_name(&request.get_ref().name)?).await?;
        Ok(Response::new(()))
    }

    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let caller = Caller::of(&request)?;
        let name = request_id_of_name(&request.get_ref().name)?;
        self.service.cancel(&caller, name, String::new()).await?;
        Ok(Response::new(()))
    }

    async fn wait_operation(
        &self,
        request: Request<WaitOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let name = request_id_of_name(&request.name)?;
        let record = self.service.find(&caller, name, Access::Read).await?;
        let limit = wait_timeout(request.timeout.as_ref())?;
        if !record.state.is_terminal() {
            let service = &self.service;
            await_outcome::terminal_event(&service.upstreams, &caller, record.uid, limit).await?;
        }
        let uid = record.uid.to_string();
        let record = self.service.find(&caller, &uid, Access::Read).await?;
        Ok(Response::new(self.operation(&record).await?))
    }
}

fn wait_timeout(timeout: Option<&prost_types::Duration>) -> Result<Duration, Status> {
    let max_wait = Duration::from_millis(limits::MAX_WAIT_MS.unsigned_abs());
    let Some(timeout) = timeout else { return Ok(max_wait) };
    // The sign is checked before the conversion, which overflows for the minimum number of seconds.
    let is_negative = timeout.seconds < 0 || timeout.nanos < 0;
    let timeout = (!is_negative).then(|| Duration::try_from(*timeout).ok()).flatten();
    match timeout {
        Some(timeout) => Ok(timeout.min(max_wait)),
        None => Err(violation_status("timeout", "must not be negative")),
    }
}

/// Returns the request ID or `uid` in an operation name.
fn request_id_of_name(name: &str) -> Result<&str, Status> {
    let request = name.strip_prefix(COLLECTION).and_then(|rest| rest.strip_prefix('/'));
    let rule = "must be \"operations/\" followed by the uid or id of a request";
    request.ok_or_else(|| violation_status("name", rule))
}

fn pack_any(type_name: &str, message: &impl Message) -> Any {
    Any { type_url: format!("type.googleapis.com/{type_name}"), value: message.encode_to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_timeout_is_rejected_and_a_long_one_is_capped() {
        let wait =
            |seconds, nanos| wait_timeout(Some(&prost_types::Duration { seconds, nanos })).ok();
        assert_eq!(wait(1, 5), Some(Duration::new(1, 5)));
        let max_wait = Duration::from_millis(limits::MAX_WAIT_MS.unsigned_abs());
        assert_eq!((wait(i64::MAX, 0), wait_timeout(None).ok()), (Some(max_wait), Some(max_wait)));
        for (seconds, nanos) in [(-1, 0), (0, -1), (i64::MIN, 0), (i64::MIN, i32::MIN)] {
            assert_eq!(wait(seconds, nanos), None, "{seconds} {nanos}");
        }
    }
}
