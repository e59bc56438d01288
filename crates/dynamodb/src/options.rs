//! Options of the engine.

use std::time::Duration;

/// Location and use of the tables.
#[derive(Clone, Debug)]
pub struct DynamoOptions {
    /// URL of the endpoint; `None` for the AWS endpoint of the region.
    pub endpoint: Option<String>,
    /// AWS region; `None` for the region of the environment.
    pub region: Option<String>,
    /// Prefix of all table names.
    pub table_prefix: String,
    /// Number of shards of the queue, 1 to 64: each handles about 500 requests a second.
    pub queue_shards: u32,
    /// Maximum number of concurrent operations of the store; others wait.
    pub max_concurrent_operations: usize,
    /// How long requests are kept after they ended; `None` to keep them forever.
    pub retention: Option<Duration>,
    /// Whether the stream of the requests table notifies processors.
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
