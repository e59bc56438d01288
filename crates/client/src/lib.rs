//! Client library: submit, watch and manage requests.
//!
//! [`Session`] is one WebSocket; [`Follower`] sees one request to its end over as many of them as
//! it takes, resuming after the last event it saw; [`Api`] is gRPC: submit, [`Watch`], wait, cancel,
//! and everything else. Both followers compare the output with its proof.

mod api;
mod error;
mod follower;
mod output;
mod session;
mod watch;

pub use api::Api;
pub use error::ClientError;
pub use follower::{Follower, Target};
pub use output::{OutputCheck, OutputMismatch};
pub use session::{Message, Session};
pub use streamer_rpc::{TokenError, TokenFile, TokenSource};
pub use watch::{Watch, json};
