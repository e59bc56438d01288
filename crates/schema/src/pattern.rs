//! What a regular expression may cost.

use std::collections::HashMap;

use regex_automata::nfa::thompson;

use crate::SchemaError;

/// Longest pattern, in bytes.
const MAX_PATTERN_BYTES: usize = 2048;
/// All patterns of one schema, in bytes at most: what it takes to compile them.
const MAX_TOTAL_BYTES: usize = 16 << 10;
/// Largest compiled pattern, in bytes.
pub(crate) const MAX_SIZE: usize = 512 << 10;
/// All compiled patterns of one schema, in bytes at most.
const MAX_TOTAL_SIZE: usize = 2 << 20;
/// Classes of Unicode characters (`\p{…}`) in the patterns of one schema at most: each takes as long to
/// compile as thousands of other characters.
const MAX_UNICODE_CLASSES: usize = 64;
/// A state of a compiled pattern takes about this many bytes.
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
    /// Sixteenths of a step that matching takes for each byte of a text, in the worst case.
    ///
    /// The engine takes time in proportion to the text times the states of the pattern. That all states
    /// are active at once is rare, but can be arranged.
    pub(crate) fn byte_cost(&mut self, pattern: &str, location: &str) -> Result<u64, SchemaError> {
        if let Some(cost) = self.costs.get(pattern) {
            return Ok(*cost);
        }
        let wrong = |rule: String| SchemaError::Pattern { location: location.to_owned(), rule };
        if pattern.len() > MAX_PATTERN_BYTES {
            let length = pattern.len();
            return Err(wrong(format!("is {length} bytes long, {MAX_PATTERN_BYTES} are allowed")));
        }
        self.total_bytes += pattern.len();
        if self.total_bytes > MAX_TOTAL_BYTES {
            let rule = format!("and those before it are longer than {MAX_TOTAL_BYTES} bytes");
            return Err(wrong(rule));
        }
        check_groups(pattern).map_err(wrong)?;
        let classes = pattern.matches("\\p").count() + pattern.matches("\\P").count();
        self.unicode_classes += classes;
        if self.unicode_classes > MAX_UNICODE_CLASSES {
            return Err(wrong(format!(
                "and those before it have more than {MAX_UNICODE_CLASSES} classes of Unicode \
                 characters"
            )));
        }
        let translated = jsonschema_regex::to_rust_regex(pattern)
            .map_err(|()| wrong("is not a regular expression".into()))?;
        let config = thompson::Config::new().nfa_size_limit(Some(MAX_SIZE));
        let compiled = thompson::Compiler::new().configure(config).build(&translated);
        let size = match compiled {
            Ok(nfa) => nfa.memory_usage(),
            Err(error) if error.size_limit().is_some() => {
                let allowed = MAX_SIZE >> 10;
                return Err(wrong(format!("takes more than {allowed} KiB when compiled")));
            }
            Err(error) => {
                // The last line says why; those before it show the pattern.
                let text = std::error::Error::source(&error)
                    .map_or_else(|| error.to_string(), ToString::to_string);
                let reason = text.lines().last().unwrap_or_default();
                let reason = reason.trim_start_matches("error: ");
                return Err(wrong(format!("is not a regular expression: {reason}")));
            }
        };
        self.total_size += size;
        if self.total_size > MAX_TOTAL_SIZE {
            let allowed = MAX_TOTAL_SIZE >> 10;
            return Err(wrong(format!("and those before it take more than {allowed} KiB")));
        }
        let cost = (size as u64 / STATE_BYTES).max(1);
        self.costs.insert(pattern.to_owned(), cost);
        Ok(cost)
    }
}

/// Refuses groups that ECMA-262 did not have for long, and that cost much: flags (`(?i)`), which fold
/// the case of whole classes, and look-around.
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
