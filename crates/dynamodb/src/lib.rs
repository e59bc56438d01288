//! The store over DynamoDB: any endpoint that speaks its protocol, shared by as many processes as
//! wanted.
//!
//! A request is one item that holds its state and the latest events of its log, so that a change of
//! state and the event that tells of it are one conditional write. When those events outgrow the
//! item they move to parts of their own, in one transaction with the change. Values too large for
//! an item go to an object store. Everything that waits, runs, is delayed or may expire stands in a
//! sparse index, spread over shards. `tables` is the one place that says which tables there are;
//! the access patterns and their costs are in `docs/dynamodb.md`.

mod actions;
mod admission;
mod calls;
mod client;
mod connections;
mod credentials;
mod crowd;
mod error;
mod expression;
mod holders;
mod item;
mod log;
mod objects;
mod options;
mod queue;
mod quota;
mod requests;
mod spans;
mod store;
mod stream;
pub mod tables;

pub use error::OpenError;
pub use options::DynamoOptions;
pub use store::DynamoStore;
