//! DynamoDB engine of the store. It works with any endpoint that implements the DynamoDB API, and any number of
//! processes can share the tables.
//!
//! A request is one item that contains its state and the latest events of its log, so that a state change and its event
//! are one conditional write. When the events become too large for the item, they are moved to parts, in the same
//! transaction as the change. Values that are too large for an item are stored in an object store. Queued, running,
//! delayed and expiring requests are in sparse indexes, which are distributed over shards. `tables` is the single
//! definition of the tables; `docs/dynamodb.md` describes the access patterns and their costs.

mod actions;
mod admission;
mod claim_jitter;
mod client;
mod conditional_update;
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
mod queue_counts;
mod quota;
mod requests;
mod spans;
mod store;
mod stream;
pub mod tables;

pub use error::OpenError;
pub use options::DynamoOptions;
pub use store::DynamoStore;
