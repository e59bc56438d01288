//! Limits on the size of everything that a caller or handler can send.

/// Maximum length of a request's `id`, in characters.
pub const MAX_REQUEST_ID_CHARS: usize = 128;
/// Maximum length of an action's name, in characters.
pub const MAX_ACTION_CHARS: usize = 64;
/// Maximum size of a request's metadata, in bytes.
pub const MAX_METADATA_BYTES: usize = 16 * 1024;
/// Maximum size of a cancellation's reason, in bytes.
pub const MAX_REASON_BYTES: usize = 1024;
/// Maximum size of a content type, in bytes.
pub const MAX_CONTENT_TYPE_BYTES: usize = 255;
/// Highest priority.
pub const MAX_PRIORITY: i32 = 9;
/// Maximum `delay`, in milliseconds: 30 days.
pub const MAX_DELAY_MS: i64 = 30 * 24 * 3600 * 1000;
/// Maximum `wait`, in milliseconds: 5 minutes.
pub const MAX_WAIT_MS: i64 = 300 * 1000;
/// Maximum size of a progress event's message, in bytes.
pub const MAX_PROGRESS_MESSAGE_BYTES: usize = 4096;
/// Maximum size of a progress event's metadata, in bytes.
pub const MAX_PROGRESS_METADATA_BYTES: usize = 64 * 1024;
/// Maximum size of a checkpoint, in bytes.
pub const MAX_CHECKPOINT_BYTES: usize = 256 * 1024;
/// Maximum size of a pushed message's data, in bytes.
pub const MAX_PUSH_BYTES: usize = 128 * 1024;
/// Maximum size of a pushed message's topic, in bytes.
pub const MAX_TOPIC_BYTES: usize = 128;
/// Maximum total size of the reports that are pending between a handler and the log, in bytes. A larger report is
/// pending alone. The same number of bytes can be in flight at the same time, in several copies, and is stored in one
/// commit, which blocks other commits.
pub const MAX_PENDING_REPORT_BYTES: usize = 256 * 1024;
/// Maximum number of reports that are pending between a handler and the log.
pub const MAX_PENDING_REPORTS: usize = 1024;
/// Maximum size of an error's message, in bytes; a longer message is truncated.
pub const MAX_ERROR_MESSAGE_BYTES: usize = 4096;
/// Maximum size of an error's details, in bytes; larger details are omitted.
pub const MAX_ERROR_DETAILS_BYTES: usize = 64 * 1024;
/// Maximum size of text of a client, handler or worker in a log line, in bytes; longer text is truncated.
pub const MAX_LOGGED_TEXT_BYTES: usize = 256;
/// Allowance for the fields of a message other than its payload, in bytes.
pub const ENVELOPE_BYTES: usize = 64 * 1024;

/// Allowance for the fields of a worker's message other than its payload, in bytes, such as a checkpoint or the schemas
/// of the declared actions.
pub const WORKER_ENVELOPE_BYTES: usize = 1024 * 1024;

/// Number of bytes by which a result may exceed the maximum size of a payload, because a result may wrap its payload.
pub const RESULT_OVERHEAD_BYTES: usize = 1024;

/// Limits that the operator configures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Maximum size of a payload, in bytes.
    pub max_payload_bytes: usize,
    /// Maximum size of an output chunk, in bytes.
    pub max_output_chunk_bytes: usize,
    /// Name of the option that sets `max_payload_bytes`, for error messages.
    pub payload_option: &'static str,
}

/// Name of the option that sets the maximum size of a payload.
pub const PAYLOAD_OPTION: &str = "limits.max_payload_bytes";

impl Limits {
    /// Returns the maximum size of a result, in bytes.
    #[must_use]
    pub const fn max_result_bytes(&self) -> usize {
        self.max_payload_bytes.saturating_add(RESULT_OVERHEAD_BYTES)
    }

    /// Checks that a result of `bytes` bytes does not exceed the maximum size.
    ///
    /// # Errors
    /// Returns the violated rule and the actual size.
    pub fn check_result(&self, bytes: usize) -> Result<(), String> {
        let limit = self.max_result_bytes();
        if bytes <= limit {
            return Ok(());
        }
        let rule = self.payload_option;
        Err(format!(
            "the result must be at most {limit} bytes ({RESULT_OVERHEAD_BYTES} more than {rule} allows), is {bytes}"
        ))
    }

    /// Returns the maximum size of a message between a worker and a processor, in bytes: a payload or a chunk, and the
    /// other fields of the message.
    #[must_use]
    pub const fn max_worker_message_bytes(&self) -> usize {
        self.max_message_bytes().saturating_add(WORKER_ENVELOPE_BYTES)
    }

    /// Returns the maximum size of a batch of events that an attempt publishes, in bytes. The batch contains the
    /// pending reports, the reports that arrive while the handler ends, its checkpoint and its result.
    #[must_use]
    pub const fn max_batch_bytes(&self) -> usize {
        /// Encoded size of the fields of an event that the size of its report does not include, in bytes.
        const EVENT_BYTES: usize = 512;
        let reports = MAX_PENDING_REPORT_BYTES
            .saturating_add(self.max_output_chunk_bytes)
            .saturating_add(MAX_PENDING_REPORTS * EVENT_BYTES);
        reports
            .saturating_mul(2)
            .saturating_add(self.max_result_bytes())
            .saturating_add(MAX_CHECKPOINT_BYTES)
            .saturating_add(MAX_ERROR_DETAILS_BYTES + ENVELOPE_BYTES)
    }

    /// Returns the maximum size of a message that carries a payload, in bytes.
    #[must_use]
    pub const fn max_message_bytes(&self) -> usize {
        let largest = if self.max_payload_bytes > self.max_output_chunk_bytes {
            self.max_payload_bytes
        } else {
            self.max_output_chunk_bytes
        };
        largest.saturating_add(ENVELOPE_BYTES)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_payload_bytes: 4 * 1024 * 1024,
            max_output_chunk_bytes: 1024 * 1024,
            payload_option: PAYLOAD_OPTION,
        }
    }
}
