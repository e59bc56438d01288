//! Limits on the cost of regular expressions.

use std::collections::HashMap;

use regex_automata::nfa::thompson;

use crate::SchemaError;

/// Maximum length of a pattern, in bytes.
const MAX_PATTERN_BYTES: usize = 2048;
/// Maximum total length of the patterns of one schema, in bytes, which bounds the time to compile them.
const MAX_TOTAL_BYTES: usize = 16 << 10;
/// Maximum size of a compiled pattern, in bytes.
pub(crate) const MAX_SIZE: usize = 512 << 10;
/// Maximum total size of the compiled patterns of one schema, in bytes.
const MAX_TOTAL_SIZE: usize = 2 << 20;
/// Maximum number of Unicode classes (`\p{…}`) in the patterns of one schema: the compilation of each takes as
/// long as that of thousands of other characters.
const MAX_UNICODE_CLASSES: usize = 64;
/// Approximate size of a state of a compiled pattern, in bytes.
const STATE_BYTES: u64 = 32;

/// Patterns of one schema.
#[derive(Default)]
pub(crate) struct Patterns {
    costs: HashMap<String, u64>,
    total_bytes: usize,
    total_size: usize,
    unicode_classes: usize,
}

impl Patterns {
    /// Returns the cost of matching each byte of a text in the worst case, in sixteenths of a step.
    ///
    /// The time is proportional to the length of the text times the number of active states of the pattern. All
    /// states are rarely active at once, but an attacker can construct such a case.
    pub(crate) fn byte_cost(&mut self, pattern: &str, location: &str) -> Result<u64, SchemaError> {
        if let Some(cost) = self.costs.get(pattern) {
            return Ok(*cost);
        }
        let invalid = |rule: String| SchemaError::Pattern { location: location.to_owned(), rule };
        if pattern.len() > MAX_PATTERN_BYTES {
            let length = pattern.len();
            return Err(invalid(format!(
                "is {length} bytes long, {MAX_PATTERN_BYTES} are allowed"
            )));
        }
        self.total_bytes += pattern.len();
        if self.total_bytes > MAX_TOTAL_BYTES {
            let rule = format!("and those before it are longer than {MAX_TOTAL_BYTES} bytes");
            return Err(invalid(rule));
        }
        check_groups(pattern).map_err(invalid)?;
        let classes = pattern.matches("\\p").count() + pattern.matches("\\P").count();
        self.unicode_classes += classes;
        if self.unicode_classes > MAX_UNICODE_CLASSES {
            return Err(invalid(format!(
                "and those before it have more than {MAX_UNICODE_CLASSES} Unicode classes"
            )));
        }
        let translated = jsonschema_regex::to_rust_regex(pattern)
            .map_err(|()| invalid("is not a regular expression".into()))?;
        let config = thompson::Config::new().nfa_size_limit(Some(MAX_SIZE));
        let compiled = thompson::Compiler::new().configure(config).build(&translated);
        let size = match compiled {
            Ok(nfa) => nfa.memory_usage(),
            Err(error) if error.size_limit().is_some() => {
                let allowed = MAX_SIZE >> 10;
                return Err(invalid(format!("takes more than {allowed} KiB when compiled")));
            }
            Err(error) => {
                // The last line is the reason; the lines before it show the pattern.
                let text = std::error::Error::source(&error)
                    .map_or_else(|| error.to_string(), ToString::to_string);
                let reason = text.lines().last().unwrap_or_default();
                let reason = reason.trim_start_matches("error: ");
                return Err(invalid(format!("is not a regular expression: {reason}")));
            }
        };
        self.total_size += size;
        if self.total_size > MAX_TOTAL_SIZE {
            let allowed = MAX_TOTAL_SIZE >> 10;
            return Err(invalid(format!("and those before it take more than {allowed} KiB")));
        }
        let cost = (size as u64 / STATE_BYTES).max(1);
        self.costs.insert(pattern.to_owned(), cost);
        Ok(cost)
    }
}

/// Rejects expensive groups that only recent editions of ECMA-262 define: flags (`(?i)`), which fold the
/// case of entire classes, and look-around.
fn check_groups(pattern: &str) -> Result<(), String> {
    let mut rest = pattern;
    let mut is_in_class = false;
    while let Some(letter) = rest.chars().next() {
        rest = &rest[letter.len_utf8()..];
        match letter {
            '\\' => {
                rest = rest.chars().next().map_or("", |escaped| &rest[escaped.len_utf8()..]);
            }
            '[' => is_in_class = true,
            ']' => is_in_class = false,
            '(' if !is_in_class => {
                let Some(kind) = rest.strip_prefix('?') else { continue };
                let is_named = kind.starts_with('<');
                let is_look_behind = kind.starts_with("<=") || kind.starts_with("<!");
                if is_look_behind || kind.starts_with(['=', '!']) {
                    return Err("has look-around, which is not supported".into());
                }
                if !kind.starts_with(':') && !is_named {
                    return Err("has flags in a group, which are not supported".into());
                }
            }
            _ => {}
        }
    }
    Ok(())
}
