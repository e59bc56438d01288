//! Domain types of Streamer: IDs, states, errors, limits, retry policy and clock.
//!
//! All other crates use this crate. It performs no I/O and starts no tasks. Time comes from a [`Clock`] or an argument,
//! so that a test can call any function directly.

pub mod action;
pub mod attempt_number;
pub mod attempt_retry;
pub mod backoff;
pub mod clock;
pub mod close_code;
pub mod error;
pub mod fair_tags;
mod hex;
pub mod host;
pub mod id;
pub mod limits;
pub mod open_watches;
pub mod output;
pub mod rate;
pub mod saturate;
pub mod seq;
pub mod state;
pub mod tenant_limits;
pub mod trace_parent;
pub mod validate;

pub use action::{ActionSpec, DEFAULT_SYNC_THRESHOLD};
pub use attempt_number::{AttemptNumber, InvalidAttemptNumber};
pub use attempt_retry::RetryPolicy;
pub use backoff::Backoff;
pub use clock::{Clock, ManualClock, SystemClock, Timestamp};
pub use close_code::CloseCode;
pub use error::{ErrorCode, ErrorCodes, RequestError};
pub use fair_tags::FairTags;
pub use hex::hex;
pub use host::{is_loopback_host, rate_limit_key};
pub use id::Uid;
pub use limits::Limits;
pub use open_watches::{OpenWatches, UserWatches, WatchPermit};
pub use output::OutputDigest;
pub use rate::RateLimiter;
pub use seq::{InvalidSeq, Seq};
pub use state::RequestState;
pub use tenant_limits::{LimitsByTenant, TenantLimit, TenantLimits};
pub use trace_parent::TraceParent;
pub use validate::{Violation, Violations};
