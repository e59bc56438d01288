//! Code that all gRPC servers and clients of Streamer share: status mapping, payload conversion,
//! channels. Used by all services; has no state.

mod action;
mod channel;
mod compact;
mod completion;
mod ended_body;
mod payload;
mod proto_conversions;
mod rpc_metrics;
mod spans;
mod status;
mod token_source;
mod validation;

pub use action::{action_from_proto, action_to_proto};
pub use channel::{
    AFTER_UID, CLIENT_ADDRESS, Connection, FORWARDED, NOT_ADMITTED, PREVIOUS_ATTEMPTS, Peer,
    REQUEST_UID, SERVICE_TOKEN, WATCH_COUNTED, local, remote, with_authorization,
};
pub use compact::{compact_bytes, compact_event, compact_received, compact_request};
pub use completion::run_to_completion;
pub use ended_body::{end_response_when, end_when};
pub use payload::{
    JSON, empty_object, encode_event, encode_payload, json_payload, payload_bytes,
    payload_into_parts,
};
pub use proto_conversions::{
    apply_event, completed, error_from_proto, error_to_proto, is_terminal, request_to_proto,
    state_from_proto, state_to_proto,
};
pub use rpc_metrics::{RpcMetrics, RpcTimer, response_code};
pub use spans::{Untraced, code_name, enter, is_server_error, recorded, trace_context};
pub use status::{
    error_status, map_message_too_large, not_found, request_error, status, store_status,
    validation_status, violation_status, violations_details,
};
pub use streamer_proto::seam::{Channel, Responses};
pub use token_source::{TokenError, TokenFile, TokenSource};
pub use validation::{ensure_valid, parse_uid, read_page_size, read_page_token};
