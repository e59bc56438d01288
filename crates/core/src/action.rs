//! Declaration of an action.

use std::time::Duration;

use crate::RetryPolicy;

/// Default sync threshold: actions with a shorter estimated duration are sync.
pub const DEFAULT_SYNC_THRESHOLD: Duration = Duration::from_secs(5);

/// Declaration of an action.
#[derive(Clone, Debug, PartialEq)]
pub struct ActionSpec {
    /// Name, which must match `[a-z][a-z0-9_.-]{0,63}`.
    pub name: String,
    /// Human-readable description.
    pub description: String,
    /// Typical duration, which determines whether the action is sync or async.
    pub estimated_duration: Duration,
    /// Retry policy for failed attempts; applies only to async actions.
    pub retry: RetryPolicy,
    /// Time limit of one attempt; `None` for no limit. For a sync action without a limit, the
    /// processor's limit applies.
    pub start_to_close: Option<Duration>,
    /// Maximum time between the due time of the request and the start of its first attempt; `None` for no limit.
    pub schedule_to_start: Option<Duration>,
    /// Maximum time for all attempts and the backoff between them, starting at the due time of the request; `None` for
    /// no limit.
    pub schedule_to_close: Option<Duration>,
    /// Heartbeat timeout: an attempt fails if its handler reports nothing for this duration; `None` for no limit.
    pub heartbeat_timeout: Option<Duration>,
    /// Permission that the caller must have; `None` if any caller may submit the action.
    pub permission: Option<String>,
    /// Maximum number of concurrent attempts per processor; `None` for the limit of the processor.
    pub max_concurrency: Option<u32>,
    /// JSON Schema (2020-12) of the payload, as JSON text.
    pub payload_schema: Option<String>,
}

impl ActionSpec {
    /// Returns an async action with the defaults: 3 attempts, no time limits, no required permission.
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

    /// Returns a sync action: the caller waits for the result, and the request is never stored.
    pub fn sync(name: impl Into<String>) -> Self {
        Self {
            estimated_duration: Duration::from_millis(10),
            retry: RetryPolicy::none(),
            ..Self::new(name)
        }
    }

    /// Sets the description.
    #[must_use]
    pub fn describe(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        self
    }

    /// Sets the retry policy.
    #[must_use]
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// Sets the time limit of one attempt.
    #[must_use]
    pub fn start_to_close(mut self, limit: Duration) -> Self {
        self.start_to_close = Some(limit);
        self
    }

    /// Sets the maximum time between the due time of the request and the start of its first attempt.
    #[must_use]
    pub fn schedule_to_start(mut self, limit: Duration) -> Self {
        self.schedule_to_start = Some(limit);
        self
    }

    /// Sets the maximum time for all attempts and the backoff between them.
    #[must_use]
    pub fn schedule_to_close(mut self, limit: Duration) -> Self {
        self.schedule_to_close = Some(limit);
        self
    }

    /// Sets the heartbeat timeout.
    #[must_use]
    pub fn heartbeat_timeout(mut self, limit: Duration) -> Self {
        self.heartbeat_timeout = Some(limit);
        self
    }

    /// Sets the permission that a caller must have.
    #[must_use]
    pub fn permission(mut self, permission: impl Into<String>) -> Self {
        self.permission = Some(permission.into());
        self
    }

    /// Sets the maximum number of concurrent attempts per processor.
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

    /// Returns whether the action is sync: its estimated duration is less than `threshold`.
    #[must_use]
    pub fn is_sync(&self, threshold: Duration) -> bool {
        self.estimated_duration < threshold
    }
}
