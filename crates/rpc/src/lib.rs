//! What every gRPC server and client of Streamer shares: status mapping, payload conversion,
//! channels. Used by all services; holds no state.

mod action;
mod channel;
mod compact;
mod completion;
mod convert;
mod ended_body;
mod members;
mod payload;
mod spans;
mod status;
mod token;

pub use action::{action_from_proto, action_to_proto};
pub use channel::{
    CLIENT_ADDRESS, Channel, Connection, FORWARDED, NOT_TAKEN, Peer, REPEATED, REQUEST_UID,
    SERVICE_TOKEN, WATCH_COUNTED, local, remote, with_authorization,
};
pub use compact::{compact_bytes, compact_event, compact_request};
pub use completion::run_to_completion;
pub use convert::{
    apply_event, completed, error_from_proto, error_to_proto, is_terminal, request_to_proto,
    state_from_proto, state_to_proto,
};
pub use ended_body::end_when;
pub use members::{Member, Members, RouteKey, is_unsent, with_route};
pub use payload::{
    JSON, empty_object, encode_event, encode_payload, json_payload, payload_bytes,
    payload_into_parts,
};
pub use spans::{Untraced, code_name, enter, is_server_error, recorded, trace_context};
pub use status::{
    name_message_limit, not_found, request_error, status, store_status, validation_status,
    violations_details,
};
pub use token::{TokenError, TokenFile, TokenSource};
