//! What the operator sets.

use std::time::Duration;

/// Where the tables are and how they are used.
#[derive(Clone, Debug)]
pub struct DynamoOptions {
    /// URL of the service; `None` for AWS's own of the region.
    pub endpoint: Option<String>,
    /// AWS region; `None` for what the environment says.
    pub region: Option<String>,
    /// What the names of all tables begin with.
    pub table_prefix: String,
    /// Over how many shards the queue is spread, 1 to 64: each takes about 500 requests a second.
    pub queue_shards: u32,
    /// How many operations of the store are under way at once; others wait for their turn.
    pub max_concurrent_operations: usize,
    /// How long requests are kept after they ended; `None` for ever.
    pub retention: Option<Duration>,
    /// Whether the stream of the requests table wakes processors.
    pub stream: bool,
    /// URL of an object store for large values: `s3://bucket/prefix` or `file:///folder`.
    pub objects: Option<String>,
}

impl Default for DynamoOptions {
    fn default() -> Self {
        Self {
            endpoint: None,
            region: None,
            table_prefix: "streamer-".into(),
            queue_shards: 4,
            max_concurrent_operations: 128,
            retention: None,
            stream: true,
            objects: None,
        }
    }
}
