//! Validation rules for input, and violations of these rules.

use std::fmt;

use crate::limits;

/// Violation of a rule by a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field, such as `payload` or `payload.rows[3]`.
    pub field: String,
    /// Description of the rule and the actual value.
    pub description: String,
}

/// Maximum number of violations that are kept; further violations are only counted.
const MAX_KEPT: usize = 100;
/// Maximum size of the text of the violations, in bytes. A gRPC status is sent in headers, and many clients accept at
/// most 8 KiB of headers.
const MAX_TEXT_BYTES: usize = 3 * 1024;
/// Maximum size of the field path and of the description of a violation, in bytes each.
const MAX_DESCRIPTION_BYTES: usize = 512;

/// Violations of the rules for an input, collected so that all of them are reported together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Violations {
    kept: Vec<Violation>,
    text_bytes: usize,
    omitted: usize,
}

impl Violations {
    /// Adds a violation.
    pub fn push(&mut self, field: impl Into<String>, description: impl Into<String>) {
        let violation = Violation {
            field: cut(field.into(), MAX_DESCRIPTION_BYTES),
            description: cut(description.into(), MAX_DESCRIPTION_BYTES),
        };
        let bytes = violation.field.len() + violation.description.len();
        if self.kept.len() >= MAX_KEPT || self.text_bytes + bytes > MAX_TEXT_BYTES {
            self.omitted += 1;
            return;
        }
        self.text_bytes += bytes;
        self.kept.push(violation);
    }

    /// Adds a violation if `outcome` is an error.
    pub fn check(&mut self, field: &str, outcome: Result<(), String>) {
        if let Err(description) = outcome {
            self.push(field, description);
        }
    }

    /// Returns the value of `outcome`. If it is an error, adds a violation, and returns `None`.
    pub fn accept<T>(&mut self, field: &str, outcome: Result<T, impl fmt::Display>) -> Option<T> {
        outcome.map_err(|rule| self.push(field, rule.to_string())).ok()
    }

    /// Returns whether no rule is violated.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Returns the violations in the order in which they were added, without those that were only counted.
    pub fn iter(&self) -> impl Iterator<Item = &Violation> {
        self.kept.iter()
    }
}

impl fmt::Display for Violations {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, violation) in self.kept.iter().enumerate() {
            let separator = if position == 0 { "" } else { "; " };
            write!(formatter, "{separator}{}: {}", violation.field, violation.description)?;
        }
        if self.omitted > 0 {
            write!(formatter, "; and {} more", self.omitted)?;
        }
        Ok(())
    }
}

/// Returns `text`, truncated if it is longer than `max_bytes`.
#[must_use]
pub fn cut(mut text: String, max_bytes: usize) -> String {
    const ELLIPSIS: &str = "…";
    if text.len() > max_bytes {
        let end = text.floor_char_boundary(max_bytes.saturating_sub(ELLIPSIS.len()));
        text.truncate(end);
        text.push_str(ELLIPSIS);
    }
    text
}

/// Returns text of a client, handler or worker for a log line: truncated, so that its author cannot fill the log.
#[must_use]
pub fn logged_text(text: &str) -> String {
    cut(text.to_owned(), limits::MAX_LOGGED_TEXT_BYTES)
}

/// Checks the ID of a request: 1 to 128 characters from `[A-Za-z0-9._:@/+=-]`.
///
/// # Errors
/// Returns the violated rule and the actual value.
pub fn request_id(id: &str) -> Result<(), String> {
    let length = id.chars().count();
    if length == 0 || length > limits::MAX_REQUEST_ID_CHARS {
        return Err(format!(
            "must have 1 to {} characters, has {length}",
            limits::MAX_REQUEST_ID_CHARS
        ));
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._:@/+=-".contains(c);
    match id.chars().find(|c| !allowed(*c)) {
        None => Ok(()),
        Some(c) => Err(format!(
            "must consist of letters, digits and ._:@/+=- only, has {}",
            c.escape_debug()
        )),
    }
}

/// Checks the name of an action: `[a-z][a-z0-9_.-]{0,63}`.
///
/// # Errors
/// Returns the violated rule.
pub fn action_name(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("is required".into());
    }
    let rest_allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_.-".contains(c);
    let well_formed = name.chars().count() <= limits::MAX_ACTION_CHARS
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(rest_allowed);
    if well_formed { Ok(()) } else { Err("must match [a-z][a-z0-9_.-]{0,63}".into()) }
}

/// Checks the ID of a worker, which has the same format as the ID of a request.
///
/// # Errors
/// Returns the violated rule and the actual value.
pub fn worker_id(id: &str) -> Result<(), String> {
    request_id(id)
}

/// Checks that `value` is between `low` and `high`, inclusive.
///
/// # Errors
/// Returns the violated rule and the actual value.
pub fn in_range(value: i64, low: i64, high: i64, unit: &str) -> Result<(), String> {
    if (low..=high).contains(&value) {
        Ok(())
    } else {
        Err(format!("must be {low} to {high}{unit}, is {value}"))
    }
}

/// Checks that a size does not exceed a limit.
///
/// # Errors
/// Returns the violated rule, with the name of the limit, and the actual size.
pub fn at_most(bytes: usize, limit: usize, limit_name: &str) -> Result<(), String> {
    if bytes <= limit {
        Ok(())
    } else {
        Err(format!("must be at most {limit} bytes ({limit_name}), is {bytes}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Seq;

    #[test]
    fn ids_are_checked_for_length_and_characters() {
        assert!(request_id("req-1:user@host/x+y=z.w_").is_ok());
        assert!(request_id(&"x".repeat(128)).is_ok());
        assert_eq!(request_id("").unwrap_err(), "must have 1 to 128 characters, has 0");
        assert_eq!(
            request_id(&"x".repeat(129)).unwrap_err(),
            "must have 1 to 128 characters, has 129"
        );
        assert!(request_id("a b").is_err());
        assert!(request_id("a\n").unwrap_err().ends_with("has \\n"));
    }

    #[test]
    fn logged_text_is_truncated_at_a_character_boundary() {
        assert_eq!(logged_text("short"), "short");
        let text = logged_text(&"é".repeat(4096));
        assert_eq!((text.len(), text.chars().last()), (255, Some('…')));
    }

    #[test]
    fn action_names_must_match_the_pattern() {
        for good in ["a", "generate_report", "a.b-c_9"] {
            assert!(action_name(good).is_ok(), "{good}");
        }
        for bad in ["", "A", "9a", "a b", "é", &"a".repeat(65)] {
            assert!(action_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_the_first_of_too_many_violations_are_reported() {
        let mut violations = Violations::default();
        (0..1_000_000).for_each(|_| violations.push("states", "9 is no state"));
        assert_eq!(violations.iter().count(), 100);
        assert!(violations.to_string().ends_with("; and 999900 more"));
        violations = Violations::default();
        (0..100).for_each(|_| violations.push("payload", "é".repeat(100_000)));
        assert!(violations.to_string().len() < 4096);
    }

    #[test]
    fn a_value_is_accepted_or_its_error_is_a_violation() {
        let mut violations = Violations::default();
        assert_eq!(violations.accept("after_seq", Seq::from_i64(7)), Some(Seq::from(7)));
        assert!(violations.is_empty());
        assert_eq!(violations.accept("after_seq", Seq::from_i64(-1)), None);
        assert_eq!(violations.to_string(), "after_seq: must be 0 to 9223372036854775807, is -1");
    }

    #[test]
    fn all_violations_are_reported_together() {
        let mut violations = Violations::default();
        violations.check("id", request_id(""));
        violations.check("priority", in_range(10, 0, 9, ""));
        violations.check("payload", at_most(3, 2, "limits.max_payload_bytes"));
        assert_eq!(
            violations.to_string(),
            "id: must have 1 to 128 characters, has 0; priority: must be 0 to 9, is 10; \
             payload: must be at most 2 bytes (limits.max_payload_bytes), is 3"
        );
    }
}
