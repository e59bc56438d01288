//! Commands of the `streamer` binary, with their arguments.

pub(crate) mod actions;
pub(crate) mod bench;
pub(crate) mod config;
pub(crate) mod connections;
pub(crate) mod demo;
pub(crate) mod follow;
pub(crate) mod health;
pub(crate) mod requests;
mod select_handlers;
pub(crate) mod serve;
pub(crate) mod store;
pub(crate) mod tables;
pub(crate) mod token;
pub(crate) mod worker;
