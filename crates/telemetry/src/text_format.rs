//! The text format of Prometheus, version 0.0.4, which most tools read.

use std::{collections::HashSet, fmt::Write};

/// Converts metrics from the OpenMetrics text format: the metadata of a counter has the name of its series, which ends
/// with `_total`, there are no exemplars, and there is no end marker.
pub(crate) fn from_open_metrics(text: &str) -> String {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let counters: HashSet<&str> = types.filter_map(|line| line.strip_suffix(" counter")).collect();
    let mut converted = String::with_capacity(text.len());
    for line in text.lines().filter(|line| !line.starts_with("# EOF")) {
        let metadata = ["# HELP ", "# TYPE "]
            .into_iter()
            .find_map(|prefix| Some((prefix, line.strip_prefix(prefix)?.split_once(' ')?)));
        // Writing to a string cannot fail.
        let written = match metadata {
            Some((prefix, (name, rest))) if counters.contains(name) => {
                writeln!(converted, "{prefix}{name}_total {rest}")
            }
            Some(_) => writeln!(converted, "{line}"),
            // No label value contains the separator of an exemplar.
            None => writeln!(converted, "{}", line.split(" # {").next().unwrap_or(line)),
        };
        debug_assert!(written.is_ok());
    }
    converted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_named_like_their_series() {
        let text = "# HELP a Things.\n# TYPE a counter\na_total{b=\"c\"} 1\n# HELP d Depth.\n# TYPE d gauge\nd 2\n# EOF\n";
        let expected = "# HELP a_total Things.\n# TYPE a_total counter\na_total{b=\"c\"} 1\n# HELP d Depth.\n# TYPE d gauge\nd 2\n";
        assert_eq!(from_open_metrics(text), expected);
    }
}
