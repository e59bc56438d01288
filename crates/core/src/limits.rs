//! The sizes that bound everything a caller or handler can hand in.

/// Largest `id` of a request, in characters.
pub const MAX_REQUEST_ID_CHARS: usize = 128;
/// Largest name of an action, in characters.
pub const MAX_ACTION_CHARS: usize = 64;
/// Largest metadata of a request, in bytes.
pub const MAX_METADATA_BYTES: usize = 16 * 1024;
/// Largest reason of a cancellation, in bytes.
pub const MAX_REASON_BYTES: usize = 1024;
/// Largest content type, in bytes.
pub const MAX_CONTENT_TYPE_BYTES: usize = 255;
/// Highest priority.
pub const MAX_PRIORITY: i32 = 9;
/// Longest `delay`, in milliseconds: 30 days.
pub const MAX_DELAY_MS: i64 = 30 * 24 * 3600 * 1000;
/// Longest `wait`, in milliseconds: 5 minutes.
pub const MAX_WAIT_MS: i64 = 300 * 1000;
/// Largest message of a progress event, in bytes.
pub const MAX_PROGRESS_MESSAGE_BYTES: usize = 4096;
/// Largest metadata of a progress event, in bytes.
pub const MAX_PROGRESS_METADATA_BYTES: usize = 64 * 1024;
/// Largest checkpoint, in bytes.
pub const MAX_CHECKPOINT_BYTES: usize = 256 * 1024;
/// Largest data of a pushed message, in bytes.
pub const MAX_PUSH_BYTES: usize = 128 * 1024;
/// Largest topic of a pushed message, in bytes.
pub const MAX_TOPIC_BYTES: usize = 128;
/// Reports that wait between a handler and the log at most, in bytes; a larger one waits alone. As many
/// may be on their way at the same time, in several copies, and are stored in one commit, which others wait for.
pub const MAX_WAITING_REPORT_BYTES: usize = 256 * 1024;
/// Reports that wait between a handler and the log at most.
pub const MAX_WAITING_REPORTS: usize = 1024;
/// Largest message of an error, in bytes; more is cut off.
pub const MAX_ERROR_MESSAGE_BYTES: usize = 4096;
/// Largest details of an error, in bytes; larger ones are left out.
pub const MAX_ERROR_DETAILS_BYTES: usize = 64 * 1024;
/// What a message needs beside its payload, in bytes.
pub const ENVELOPE_BYTES: usize = 64 * 1024;

/// What a message of a worker needs beside its payload, in bytes: a checkpoint, or the schemas of
/// what it declares.
pub const WORKER_ENVELOPE_BYTES: usize = 1024 * 1024;

/// By how much a result may be larger than the largest payload, in bytes: one that wraps its payload is.
pub const RESULT_ROOM_BYTES: usize = 1024;

/// The limits that an operator sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest payload, in bytes.
    pub max_payload_bytes: usize,
    /// Largest chunk of output, in bytes.
    pub max_output_chunk_bytes: usize,
    /// What sets the first of these, for those who go beyond it.
    pub payload_rule: &'static str,
}

/// The option that sets the largest payload.
pub const PAYLOAD_OPTION: &str = "limits.max_payload_bytes";

impl Limits {
    /// Largest result, in bytes.
    #[must_use]
    pub const fn max_result_bytes(&self) -> usize {
        self.max_payload_bytes.saturating_add(RESULT_ROOM_BYTES)
    }

    /// Says which rule a result of this many bytes breaks, if it is too large.
    ///
    /// # Errors
    /// The rule, and how it is broken.
    pub fn check_result(&self, bytes: usize) -> Result<(), String> {
        let limit = self.max_result_bytes();
        if bytes <= limit {
            return Ok(());
        }
        let rule = self.payload_rule;
        Err(format!(
            "the result must be at most {limit} bytes ({RESULT_ROOM_BYTES} more than {rule} allows), is {bytes}"
        ))
    }

    /// Largest message between a worker and a processor, in bytes: a payload or a chunk, and
    /// whatever else a message may hold.
    #[must_use]
    pub const fn max_worker_message_bytes(&self) -> usize {
        self.max_message_bytes().saturating_add(WORKER_ENVELOPE_BYTES)
    }

    /// Largest batch of events that an attempt publishes, in bytes: what waited, what came while
    /// the handler ended, its checkpoint and its result.
    #[must_use]
    pub const fn max_batch_bytes(&self) -> usize {
        /// An event with all its numbers, beside what is counted as its report.
        const EVENT_BYTES: usize = 512;
        let reports = MAX_WAITING_REPORT_BYTES
            .saturating_add(self.max_output_chunk_bytes)
            .saturating_add(MAX_WAITING_REPORTS * EVENT_BYTES);
        reports
            .saturating_mul(2)
            .saturating_add(self.max_result_bytes())
            .saturating_add(MAX_CHECKPOINT_BYTES)
            .saturating_add(MAX_ERROR_DETAILS_BYTES + ENVELOPE_BYTES)
    }

    /// Largest message that carries a payload, in bytes.
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
            payload_rule: PAYLOAD_OPTION,
        }
    }
}
