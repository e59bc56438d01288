//! Checks of the fields of a call.

use std::str::FromStr;

use streamer_core::{ErrorCode, Uid, Violations, validate};
use tonic::Status;

use crate::status::{error_status, validation_status};

/// Returns a validation error if `violations` is not empty.
///
/// # Errors
/// Returns `INVALID_ARGUMENT` with all violations.
pub fn ensure_valid(violations: &Violations) -> Result<(), Status> {
    if violations.is_empty() { Ok(()) } else { Err(validation_status(violations)) }
}

/// Parses the UID in a call between services.
///
/// # Errors
/// Returns `INVALID_ARGUMENT` if it does not have the length of a UID.
pub fn parse_uid(bytes: &[u8]) -> Result<Uid, Status> {
    Uid::from_slice(bytes)
        .ok_or_else(|| error_status(ErrorCode::ValidationError, "uid must be 16 bytes"))
}

/// Reads field `page_size`, which is 0 for the default and at most `max`.
pub fn read_page_size(size: i32, max: i32, default: usize, violations: &mut Violations) -> usize {
    violations.check("page_size", validate::in_range(size.into(), 0, max.into(), ""));
    match usize::try_from(size) {
        Ok(size) if size > 0 => size,
        _ => default,
    }
}

/// Reads field `page_token`, which is empty for the first page.
pub fn read_page_token<T: FromStr>(token: &str, violations: &mut Violations) -> Option<T> {
    let position = token.parse().ok();
    if position.is_none() && !token.is_empty() {
        violations.push("page_token", "must be the next_page_token of an earlier response");
    }
    position
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sizes_outside_of_the_range_are_violations() {
        for (size, expected, is_valid) in [(0, 50, true), (1, 1, true), (100, 100, true)]
            .into_iter()
            .chain([(101, 101, false), (-1, 50, false)])
        {
            let mut violations = Violations::default();
            assert_eq!(read_page_size(size, 100, 50, &mut violations), expected);
            assert_eq!(violations.is_empty(), is_valid, "{size}");
        }
    }

    #[test]
    fn only_a_malformed_page_token_is_a_violation() {
        for (token, is_valid) in [("", true), ("01ARZ3NDEKTSV4RRFFQ69G5FAV", true), ("x", false)] {
            let mut violations = Violations::default();
            let position: Option<Uid> = read_page_token(token, &mut violations);
            assert_eq!((position.is_some(), violations.is_empty()), (token.len() > 1, is_valid));
        }
    }

    #[test]
    fn a_uid_of_the_wrong_length_is_rejected() {
        assert!(parse_uid(&[7; 16]).is_ok());
        assert_eq!(parse_uid(&[7; 15]).unwrap_err().code(), tonic::Code::InvalidArgument);
    }
}
