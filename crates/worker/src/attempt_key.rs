//! Key of an attempt.

use streamer_core::{AttemptNumber, Uid};

/// Key of an attempt: the `uid` of its request, and the attempt number, which is the fencing token.
pub(crate) type AttemptKey = (Uid, AttemptNumber);
