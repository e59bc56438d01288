//! Handler API: the [`Handler`] trait, the [`Context`] of a run, and the [`Handlers`] of a
//! processor or worker.
//!
//! A handler receives a typed payload and returns a typed result. It uses its context to report progress, output chunks
//! of the result, save checkpoints and detect cancellation. It does not depend on the process in which it runs.
//! Execution is at least once: after a failed attempt, the next attempt receives its attempt number and the last
//! checkpoint.
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
mod registry;
mod report;

pub use async_trait::async_trait;
pub use budget::{MemoryBudget, Reservation};
pub use context::{AttemptInfo, Context, RequestHistory, RequestSummary};
pub use error::HandlerError;
pub use handler::{DynHandler, Handler};
pub use registry::Handlers;
pub use report::{PauseGuard, Report, ReportBatch, ReportQueue, ReportSource};
pub use streamer_core::{ActionSpec, RetryPolicy};
