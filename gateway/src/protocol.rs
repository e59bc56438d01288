//! Messages of the subprotocol `streamer.v1.json`.

pub(crate) mod client_message;
pub(crate) mod json_writer;
pub(crate) mod server_message;
