//! What a regular expression may cost.

use std::collections::HashMap;

use regex::RegexBuilder;

use crate::SchemaError;

/// Longest pattern, in bytes.
const MAX_PATTERN_BYTES: usize = 2048;
/// A compiled pattern has one of these sizes at most, in bytes.
const SIZES: [usize; 4] = [8 << 10, 32 << 10, 128 << 10, 512 << 10];
/// Largest compiled pattern, in bytes.
pub(crate) const MAX_SIZE: usize = SIZES[SIZES.len() - 1];
/// All compiled patterns of one schema, in bytes at most.
const MAX_TOTAL_SIZE: usize = 2 << 20;

/// Patterns of one schema.
#[derive(Default)]
pub(crate) struct Patterns {
    costs: HashMap<String, u64>,
    total_size: usize,
}

impl Patterns {
    /// Sixteenths of a step that matching takes for each byte of a text, in the worst case.
    ///
    /// The engine takes time in proportion to the text times the states of the pattern. A state
    /// takes about 32 bytes; that all of them are active at once is rare, but can be arranged.
    pub(crate) fn byte_cost(&mut self, pattern: &str, location: &str) -> Result<u64, SchemaError> {
        if let Some(cost) = self.costs.get(pattern) {
            return Ok(*cost);
        }
        let wrong = |rule: String| SchemaError::Pattern { location: location.to_owned(), rule };
        if pattern.len() > MAX_PATTERN_BYTES {
            let length = pattern.len();
            return Err(wrong(format!("is {length} bytes long, {MAX_PATTERN_BYTES} are allowed")));
        }
        let translated = jsonschema_regex::to_rust_regex(pattern)
            .map_err(|()| wrong("is not a regular expression".into()))?;
        let mut fitting = None;
        for size in SIZES {
            match RegexBuilder::new(&translated).size_limit(size).build() {
                Ok(_) => {
                    fitting = Some(size);
                    break;
                }
                Err(regex::Error::CompiledTooBig(_)) => {}
                Err(error) => {
                    // The last line says why; those before it show the pattern.
                    let text = error.to_string();
                    let reason = text.lines().last().unwrap_or_default();
                    let reason = reason.trim_start_matches("error: ");
                    return Err(wrong(format!("is not a regular expression: {reason}")));
                }
            }
        }
        let size = fitting.ok_or_else(|| {
            wrong(format!("takes more than {} KiB when compiled", MAX_SIZE >> 10))
        })?;
        self.total_size += size;
        if self.total_size > MAX_TOTAL_SIZE {
            let allowed = MAX_TOTAL_SIZE >> 10;
            return Err(wrong(format!("and those before it take more than {allowed} KiB")));
        }
        let cost = size as u64 / 32;
        self.costs.insert(pattern.to_owned(), cost);
        Ok(cost)
    }
}
