//! Built-in actions of the server: five small handlers, each in its own file.
//!
//! | Action | Kind | Shows |
//! |---|---|---|
//! | [`echo`] | sync | the smallest handler; JSON that is passed through unchanged |
//! | [`health`] | sync | the information about the caller that a handler receives |
//! | [`echo_async`] | async | progress, output, cancellation, retries; a load generator for tests |
//! | [`process_data`] | async | long computation without blocking other tasks; precise validation errors |
//! | [`generate_report`] | async | streaming a file; reading the user's own requests |
//!
//! A server runs [`all`] of them by default (`execution.builtin_actions`), so that actions are available
//! immediately.

pub mod echo;
pub mod echo_async;
pub mod generate_report;
pub mod health;
pub mod process_data;

mod date;
mod statistics;
#[cfg(test)]
mod testing;

pub use echo::Echo;
pub use echo_async::EchoAsync;
pub use generate_report::GenerateReport;
pub use health::Health;
pub use process_data::ProcessData;
use streamer_handler::Handlers;

/// Measurements of 344 penguins as CSV, for use as sample input of [`ProcessData`]; see `data/README.md`.
pub const PENGUINS: &str = include_str!("../data/penguins.csv");

/// Returns every handler of this crate.
#[must_use]
pub fn all() -> Handlers {
    Handlers::new().with(Echo).with(Health).with(EchoAsync).with(ProcessData).with(GenerateReport)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, time::Duration};

    use streamer_core::{DEFAULT_SYNC_THRESHOLD, validate};

    use super::*;

    #[test]
    fn the_five_actions_are_sync_or_async_as_intended() {
        let handlers = all();
        let sync: BTreeSet<_> = handlers
            .specs()
            .filter(|spec| spec.is_sync(DEFAULT_SYNC_THRESHOLD))
            .map(|spec| spec.name.as_str())
            .collect();
        assert_eq!(sync, BTreeSet::from(["echo", "health"]));
        assert_eq!(handlers.specs().count(), 5);
    }

    #[test]
    fn declarations_are_well_formed() {
        for spec in all().specs() {
            assert_eq!(validate::action_name(&spec.name), Ok(()));
            assert!(!spec.description.is_empty(), "{}", spec.name);
            assert!(spec.estimated_duration > Duration::ZERO, "{}", spec.name);
            if let Some(schema) = &spec.payload_schema {
                let schema: serde_json::Value = serde_json::from_str(schema).unwrap();
                assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
                assert_eq!(schema["type"], "object");
            }
        }
    }
}
