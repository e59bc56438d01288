//! Client library: submit, watch and manage requests.
//!
//! [`Session`] is one WebSocket; [`Follower`] sees one request to its end over as many of them as
//! it takes, resuming after the last event it saw; [`Api`] is gRPC, for everything else.

mod api;
mod error;
mod follower;
mod session;

pub use api::Api;
pub use error::ClientError;
pub use follower::{Follower, Target};
pub use session::{Message, Session};
