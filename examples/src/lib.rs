//! Handlers that people can copy: five small actions, each in a file of its own.
//!
//! | Action | Kind | Shows |
//! |---|---|---|
//! | [`echo`] | sync | the smallest handler; JSON that passes untouched |
//! | [`health`] | sync | what a handler knows about who asks |
//! | [`echo_async`] | async | progress, output, cancellation, retries; a load generator for tests |
//! | [`process_data`] | async | computing at length without holding up others; precise refusals |
//! | [`generate_report`] | async | streaming a file; reading the user's own requests |
//!
//! The all-in-one server runs [`all`] of them, so that there is something to call at once.

pub mod echo;
pub mod echo_async;
pub mod generate_report;
pub mod health;
pub mod process_data;

mod day;
mod statistics;
#[cfg(test)]
mod testing;

pub use echo::Echo;
pub use echo_async::EchoAsync;
pub use generate_report::GenerateReport;
pub use health::Health;
pub use process_data::ProcessData;
use streamer_handler::Handlers;

/// Measurements of 344 penguins as CSV, to try [`ProcessData`] on; see `data/README.md`.
pub const PENGUINS: &str = include_str!("../data/penguins.csv");

/// Every handler of this crate.
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
    fn all_five_are_there_and_are_sync_or_async_as_meant() {
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
    fn what_they_declare_is_well_formed() {
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
