//! What the suites share: a real server in a process of its own, and clients that check what they
//! are told.

mod client;
mod server;

pub use client::{Client, Log};
pub use server::{Server, binary, tool};
