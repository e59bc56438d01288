//! Numbers in the messages of a log: conversion between protobuf fields and the types of the core.

use crate::StoreError;
use streamer_core::{AttemptNumber, Seq, Timestamp};
use streamer_proto::{
    common::v1::{Event, Request, event::Kind},
    timestamp,
};

/// Creates an event of a log.
#[must_use]
pub fn log_event(seq: Seq, attempt: AttemptNumber, time: Timestamp, kind: Kind) -> Event {
    Event {
        seq: seq.as_i64(),
        attempt: attempt.as_i32(),
        time: Some(timestamp(time.as_millis())),
        kind: Some(kind),
    }
}

/// Numbers of an event, as types. An event is checked once, where it enters the process or leaves the store. The other
/// methods are for checked events.
pub trait EventNumbers {
    /// Checks that all numbers are in range.
    ///
    /// # Errors
    /// Returns the first field that is out of range.
    fn check_numbers(&self) -> Result<(), InvalidNumber>;

    /// Returns the position of the event in its log.
    fn seq(&self) -> Seq;

    /// Returns the number of the attempt that the event belongs to.
    fn attempt_number(&self) -> AttemptNumber;
}

impl EventNumbers for Event {
    fn check_numbers(&self) -> Result<(), InvalidNumber> {
        seq("event.seq", self.seq)?;
        attempt("event.attempt", self.attempt)?;
        match &self.kind {
            Some(Kind::Retrying(retrying)) => {
                seq("event.retrying.rewind_to_seq", retrying.rewind_to_seq)?;
            }
            Some(Kind::Failed(failed)) => seq("event.failed.rewind_to_seq", failed.rewind_to_seq)?,
            _ => {}
        }
        Ok(())
    }

    fn seq(&self) -> Seq {
        checked(Seq::from_i64(self.seq))
    }

    fn attempt_number(&self) -> AttemptNumber {
        checked(AttemptNumber::from_i32(self.attempt))
    }
}

/// Numbers of a request, as types. A request is checked once, where it enters the process. The other methods are for
/// checked requests.
pub trait RequestNumbers {
    /// Checks that all numbers are in range.
    ///
    /// # Errors
    /// Returns the first field that is out of range.
    fn check_numbers(&self) -> Result<(), InvalidNumber>;

    /// Returns the position of the latest event.
    fn last_seq(&self) -> Seq;
}

impl RequestNumbers for Request {
    fn check_numbers(&self) -> Result<(), InvalidNumber> {
        seq("request.last_seq", self.last_seq)?;
        attempt("request.attempt", self.attempt)
    }

    fn last_seq(&self) -> Seq {
        checked(Seq::from_i64(self.last_seq))
    }
}

/// Checks that all numbers of the events are in range.
///
/// # Errors
/// Returns the first field that is out of range.
pub fn check_events(events: &[Event]) -> Result<(), InvalidNumber> {
    events.iter().try_for_each(EventNumbers::check_numbers)
}

/// Checks the events of an append, which both engines do before anything else: an event with a number out of range
/// could not be read again.
///
/// # Errors
/// Returns [`StoreError::Rejected`] with the first field that is out of range.
pub fn check_appended(events: &[Event]) -> Result<(), StoreError> {
    let rejected = |error: InvalidNumber| StoreError::Rejected {
        doing: "storing an event",
        reason: error.to_string(),
    };
    check_events(events).map_err(rejected)
}

/// Error returned for a field of a message that is out of range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {rule}")]
pub struct InvalidNumber {
    /// Name of the field.
    pub field: &'static str,
    /// Violated rule, and the actual number.
    pub rule: String,
}

fn seq(field: &'static str, number: i64) -> Result<(), InvalidNumber> {
    let checked = Seq::from_i64(number).map(drop);
    checked.map_err(|rule| InvalidNumber { field, rule: rule.to_string() })
}

fn attempt(field: &'static str, number: i32) -> Result<(), InvalidNumber> {
    let checked = AttemptNumber::from_i32(number).map(drop);
    checked.map_err(|rule| InvalidNumber { field, rule: rule.to_string() })
}

/// Returns a number of a checked message.
fn checked<T: Default, E: std::fmt::Display>(number: Result<T, E>) -> T {
    number.unwrap_or_else(|error| {
        debug_assert!(false, "the message was not checked: a number {error}");
        T::default()
    })
}

#[cfg(test)]
mod tests {
    use streamer_proto::common::v1::{Failed, Retrying};

    use super::*;

    #[test]
    fn an_event_has_the_numbers_with_which_it_was_created() {
        let kind = Kind::Retrying(Retrying::default());
        let event = log_event(Seq::from(7), AttemptNumber::from(2), Timestamp::default(), kind);
        assert_eq!(event.check_numbers(), Ok(()));
        assert_eq!((event.seq(), event.attempt_number()), (Seq::from(7), AttemptNumber::from(2)));
    }

    #[test]
    fn a_number_out_of_range_is_reported_with_its_field() {
        let retrying = Kind::Retrying(Retrying { rewind_to_seq: -3, ..Retrying::default() });
        let failed = Kind::Failed(Failed { rewind_to_seq: -4, ..Failed::default() });
        for (event, field) in [
            (Event { seq: -1, ..Event::default() }, "event.seq"),
            (Event { attempt: -2, ..Event::default() }, "event.attempt"),
            (Event { kind: Some(retrying), ..Event::default() }, "event.retrying.rewind_to_seq"),
            (Event { kind: Some(failed), ..Event::default() }, "event.failed.rewind_to_seq"),
        ] {
            let events = [Event::default(), event];
            assert_eq!(check_events(&events).unwrap_err().field, field);
        }
        let request = Request { last_seq: -1, ..Request::default() };
        assert_eq!(
            request.check_numbers().unwrap_err().to_string(),
            "request.last_seq: must be 0 to 9223372036854775807, is -1"
        );
        let request = Request { attempt: -1, ..Request::default() };
        assert_eq!(request.check_numbers().unwrap_err().field, "request.attempt");
    }
}
