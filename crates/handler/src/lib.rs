//! How an action is written: the [`Handler`] trait, the [`Context`] it works with, and the
//! [`Handlers`] that a processor runs.
//!
//! A handler takes a typed payload and returns a typed result; through its context it reports
//! progress, puts out chunks of the result, leaves checkpoints and notices cancellation. It does
//! not know where it runs. Execution is at least once: an attempt that died is followed by another,
//! which sees its number and the last checkpoint.
//!
//! ```
//! use streamer_handler::{ActionSpec, Context, Handler, HandlerError, Handlers, async_trait};
//!
//! struct Double;
//!
//! #[async_trait]
//! impl Handler for Double {
//!     type Input = i64;
//!     type Output = i64;
//!
//!     fn spec(&self) -> ActionSpec {
//!         ActionSpec::new("double").describe("Doubles a number")
//!     }
//!
//!     async fn handle(&self, context: &Context, number: i64) -> Result<i64, HandlerError> {
//!         context.progress(50.0, "multiplying").await?;
//!         number.checked_mul(2).ok_or_else(|| HandlerError::invalid("payload", "is too large"))
//!     }
//! }
//!
//! let handlers = Handlers::new().with(Double);
//! assert!(handlers.get("double").is_some());
//! ```

mod budget;
mod context;
mod error;
mod handler;
mod handlers;
mod report;

pub use async_trait::async_trait;
pub use budget::{OutputBudget, Reservation};
pub use context::{AttemptInfo, Context, RequestHistory, RequestSummary};
pub use error::HandlerError;
pub use handler::{DynHandler, Handler};
pub use handlers::Handlers;
pub use report::{PausedSource, Report, ReportBatch, ReportQueue, ReportSource};
pub use streamer_core::{ActionSpec, RetryPolicy};
