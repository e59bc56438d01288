//! DynamoDB engine of the store, for any endpoint that implements its API, shared by any number of
//! processes.
//!
//! A request is one item with its state and the latest events of its log, so that a state change
//! and its event are one conditional write. When the events outgrow the item, they move to parts in
//! one transaction with the change. Values too large for an item go to an object store. Queued,
//! running, delayed and expiring requests are in sparse indexes, spread over shards. `tables` is
//! the single definition of the tables; the access patterns and their costs are in
//! `docs/dynamodb.md`.

mod actions;
mod admission;
mod claim_jitter;
mod client;
mod connections;
mod credentials;
mod error;
mod expression;
mod item;
mod item_ops;
mod large_objects;
mod lease_holders;
mod log;
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
