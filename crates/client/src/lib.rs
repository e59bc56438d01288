//! Client library: submit, watch and manage requests.
//!
//! [`Session`] is one WebSocket connection. [`Follower`] follows one request to its end over WebSocket; it
//! reconnects when a connection is lost, and resumes after the last event that it received. [`Api`] is the gRPC
//! client: submit, [`Watch`], wait, cancel and all other calls. `Follower` and `Watch` verify a request's output
//! against its checksum.

mod api;
mod error;
mod follower;
mod output;
pub mod server_message;
mod session;
mod watch;

pub use api::Api;
pub use error::ClientError;
pub use follower::{Follower, Target};
pub use output::{OutputMismatch, OutputVerifier};
pub use server_message::{ReceivedMessage, ServerMessage};
pub use session::Session;
pub use streamer_rpc::{TokenError, TokenFile, TokenSource};
pub use watch::{Watch, json};
