//! What an action declares about itself.

use std::time::Duration;

use crate::RetryPolicy;

/// Actions that take less than this are sync, unless the operator says otherwise.
pub const DEFAULT_SYNC_THRESHOLD: Duration = Duration::from_secs(5);

/// The declaration of an action.
#[derive(Clone, Debug, PartialEq)]
pub struct ActionSpec {
    /// `[a-z][a-z0-9_.-]{0,63}`
    pub name: String,
    /// What it does, for people.
    pub description: String,
    /// How long it usually takes: decides between sync and async.
    pub estimated_duration: Duration,
    /// How failed attempts are repeated; async only.
    pub retry: RetryPolicy,
    /// Longest run of one attempt; `None` for no limit. A sync action without one is held to the
    /// processor's own limit.
    pub start_to_close: Option<Duration>,
    /// Longest wait for the first attempt, from when the request is due; `None` for no limit.
    pub schedule_to_start: Option<Duration>,
    /// Longest time for all attempts and the waits between them, from when the request is due;
    /// `None` for no limit.
    pub schedule_to_close: Option<Duration>,
    /// Longest silence of a running handler: without a report for so long, the attempt fails;
    /// `None` for no limit.
    pub heartbeat_timeout: Option<Duration>,
    /// What the caller must be permitted; `None` for nothing.
    pub permission: Option<String>,
    /// How many run at once on one processor; `None` for the processor's own limit.
    pub max_concurrency: Option<u32>,
    /// JSON Schema (2020-12) of the payload, as text.
    pub payload_schema: Option<String>,
}

impl ActionSpec {
    /// An async action with the defaults: 3 attempts, no time limit, for everybody.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            estimated_duration: Duration::from_secs(60),
            retry: RetryPolicy::default(),
            start_to_close: None,
            schedule_to_start: None,
            schedule_to_close: None,
            heartbeat_timeout: None,
            permission: None,
            max_concurrency: None,
            payload_schema: None,
        }
    }

    /// A sync action: answered at once, never stored.
    pub fn sync(name: impl Into<String>) -> Self {
        Self {
            estimated_duration: Duration::from_millis(10),
            retry: RetryPolicy::none(),
            ..Self::new(name)
        }
    }

    /// Says what it does.
    #[must_use]
    pub fn describe(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        self
    }

    /// Sets how failed attempts are repeated.
    #[must_use]
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// Sets the longest run of one attempt.
    #[must_use]
    pub fn start_to_close(mut self, limit: Duration) -> Self {
        self.start_to_close = Some(limit);
        self
    }

    /// Sets the longest wait for the first attempt.
    #[must_use]
    pub fn schedule_to_start(mut self, limit: Duration) -> Self {
        self.schedule_to_start = Some(limit);
        self
    }

    /// Sets the longest time for all attempts together.
    #[must_use]
    pub fn schedule_to_close(mut self, limit: Duration) -> Self {
        self.schedule_to_close = Some(limit);
        self
    }

    /// Sets the longest silence of a running handler.
    #[must_use]
    pub fn heartbeat_timeout(mut self, limit: Duration) -> Self {
        self.heartbeat_timeout = Some(limit);
        self
    }

    /// Sets the permission that a caller needs.
    #[must_use]
    pub fn permission(mut self, permission: impl Into<String>) -> Self {
        self.permission = Some(permission.into());
        self
    }

    /// Sets how many run at once on one processor.
    #[must_use]
    pub fn max_concurrency(mut self, limit: u32) -> Self {
        self.max_concurrency = Some(limit);
        self
    }

    /// Sets the JSON Schema of the payload.
    #[must_use]
    pub fn payload_schema(mut self, schema: impl Into<String>) -> Self {
        self.payload_schema = Some(schema.into());
        self
    }

    /// Whether it is answered at once.
    #[must_use]
    pub fn is_sync(&self, threshold: Duration) -> bool {
        self.estimated_duration < threshold
    }
}
