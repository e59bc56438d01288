//! Options of the engine.

use std::time::Duration;

/// Location of the tables, and limits on their use.
#[derive(Clone, Debug)]
pub struct DynamoOptions {
    /// URL of the endpoint; `None` for the AWS endpoint of the region.
    pub endpoint: Option<String>,
    /// AWS region; `None` for the region from the environment.
    pub region: Option<String>,
    /// Prefix of all table names.
    pub table_prefix: String,
    /// Number of shards of the queue, from 1 to 64. Each shard supports about 500 requests per second.
    pub queue_shards: u32,
    /// Maximum number of concurrent operations of the store; further operations wait.
    pub max_concurrent_operations: usize,
    /// Time for which requests are kept after they end; `None` to keep them forever.
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
