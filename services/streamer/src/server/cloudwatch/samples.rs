//! Reads values from the OpenMetrics text format of this process.

/// Sample: the name of the series, the text of its labels, and its value.
struct Sample<'a> {
    name: &'a str,
    labels: &'a str,
    value: f64,
}

/// Samples of all metrics.
pub(super) struct Samples<'a>(Vec<Sample<'a>>);

impl<'a> Samples<'a> {
    /// Parses the text. Label values must not contain braces, commas or quotes, and thus no name of an action may.
    pub(super) fn parse(text: &'a str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Self(lines.filter_map(parse).collect())
    }

    /// Returns the sum of the series with the given name and one of the given labels, or of all of them if `any` is
    /// empty; `None` if there is no series with the name.
    pub(super) fn sum(&self, name: &str, any: &[(&str, &str)]) -> Option<f64> {
        let mut named = self.0.iter().filter(|sample| sample.name == name).peekable();
        named.peek()?;
        let matches =
            |sample: &&Sample<'_>| any.is_empty() || any.iter().any(|label| sample.has(*label));
        Some(named.filter(matches).map(|sample| sample.value).sum())
    }

    /// Returns the cumulative counts of a histogram by bucket bound, summed over all other labels, in the order of the
    /// bounds.
    pub(super) fn buckets(&self, name: &str) -> Vec<(f64, f64)> {
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        let series = format!("{name}_bucket");
        for sample in self.0.iter().filter(|sample| sample.name == series) {
            let Some(bound) = sample.bound() else { continue };
            match buckets.iter_mut().find(|(known, _)| *known == bound) {
                Some((_, count)) => *count += sample.value,
                None => buckets.push((bound, sample.value)),
            }
        }
        buckets.sort_by(|(left, _), (right, _)| left.total_cmp(right));
        buckets
    }
}

impl Sample<'_> {
    fn has(&self, (name, value): (&str, &str)) -> bool {
        self.labels().any(|label| label == (name, value))
    }

    fn bound(&self) -> Option<f64> {
        let (_, bound) = self.labels().find(|(name, _)| *name == "le")?;
        if bound == "+Inf" { Some(f64::INFINITY) } else { bound.parse().ok() }
    }

    fn labels(&self) -> impl Iterator<Item = (&str, &str)> {
        self.labels.split(',').filter_map(|label| {
            let (name, value) = label.split_once('=')?;
            Some((name, value.trim_matches('"')))
        })
    }
}

fn parse(line: &str) -> Option<Sample<'_>> {
    // An exemplar follows the value.
    let line = line.split(" # ").next()?;
    let (series, value) = line.rsplit_once(' ')?;
    let (name, labels) = series.split_once('{').unwrap_or((series, ""));
    Some(Sample { name, labels: labels.trim_end_matches('}'), value: value.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# TYPE a counter\n\
        a_total{x=\"1\",y=\"2\"} 3\n\
        a_total{x=\"2\",y=\"2\"} 4\n\
        d_bucket{le=\"0.5\",x=\"1\"} 1 # {trace_id=\"t\"} 0.4 1.5\n\
        d_bucket{le=\"+Inf\",x=\"1\"} 2\n\
        d_bucket{le=\"0.5\",x=\"2\"} 3\n\
        d_bucket{le=\"+Inf\",x=\"2\"} 3\n\
        g 1.5\n\
        # EOF\n";

    #[test]
    fn series_are_summed_by_label() {
        let samples = Samples::parse(TEXT);
        assert_eq!(samples.sum("a_total", &[]), Some(7.0));
        assert_eq!(samples.sum("a_total", &[("x", "1")]), Some(3.0));
        assert_eq!(samples.sum("a_total", &[("x", "1"), ("x", "2")]), Some(7.0));
        assert_eq!(samples.sum("a_total", &[("x", "9")]), Some(0.0));
        assert_eq!(samples.sum("g", &[]), Some(1.5));
        assert_eq!(samples.sum("b_total", &[]), None);
    }

    #[test]
    fn buckets_are_summed_over_other_labels() {
        let buckets = Samples::parse(TEXT).buckets("d");
        assert_eq!(buckets, [(0.5, 4.0), (f64::INFINITY, 5.0)]);
    }
}
