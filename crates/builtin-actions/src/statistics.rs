//! Statistics of numbers in memory: pure functions, no I/O.

use serde::{Deserialize, Serialize};

/// Number of bins of a [`Histogram`].
pub(crate) const BINS: usize = 20;

/// Histogram: the number of values in each of several bins of equal width.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Histogram {
    /// Lower edge of the first bin.
    pub from: f64,
    /// Upper edge of the last bin.
    pub to: f64,
    /// Number of values per bin. A bin includes its lower edge but not its upper edge; the last bin includes
    /// both.
    pub counts: Vec<u64>,
}

/// Statistics of a numeric column.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct NumericSummary {
    /// Minimum.
    pub min: f64,
    /// Maximum.
    pub max: f64,
    /// Arithmetic mean.
    pub mean: f64,
    /// Sample standard deviation (divided by n - 1); absent for a single value.
    pub standard_deviation: Option<f64>,
    /// First quartile.
    pub p25: f64,
    /// Median.
    pub p50: f64,
    /// Third quartile.
    pub p75: f64,
    /// Distribution of the values.
    pub histogram: Histogram,
}

impl NumericSummary {
    /// Returns the statistics of the given values, in any order; `None` if there are no values. All values and
    /// their squares must be finite.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        let mut moments = Moments::default();
        for value in &values {
            moments.add(*value);
        }
        values.sort_unstable_by(f64::total_cmp);
        Some(Self {
            min: *values.first()?,
            max: *values.last()?,
            mean: moments.mean()?,
            standard_deviation: moments.standard_deviation(),
            p25: quantile(&values, 0.25)?,
            p50: quantile(&values, 0.5)?,
            p75: quantile(&values, 0.75)?,
            histogram: Histogram::of(&values)?,
        })
    }
}

impl Histogram {
    /// Returns the histogram of values in ascending order; `None` if there are no values.
    fn of(sorted: &[f64]) -> Option<Self> {
        let (mut from, mut to) = (*sorted.first()?, *sorted.last()?);
        if from == to {
            // Bins require a width; the new range centers the single value, as in NumPy.
            (from, to) = (from - 0.5, to + 0.5);
        }
        let mut counts = vec![0; BINS];
        for value in sorted {
            // The maximum would be beyond the last bin. (If the width is lost to rounding, the bin is
            // NaN, which is converted to the first bin.)
            let bin = (value - from) / (to - from) * BINS as f64;
            counts[(bin as usize).min(BINS - 1)] += 1;
        }
        Some(Self { from, to, counts })
    }
}

/// Computes mean and variance in one pass with Welford's method: a sum of squares would lose the significant
/// digits of values that are large and close together.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moments {
    count: u64,
    mean: f64,
    squared_distances: f64,
}

impl Moments {
    /// Adds a value.
    pub(crate) fn add(&mut self, value: f64) {
        self.count += 1;
        let distance = value - self.mean;
        self.mean += distance / self.count as f64;
        self.squared_distances += distance * (value - self.mean);
    }

    /// Returns the mean; `None` if there are no values.
    pub(crate) fn mean(&self) -> Option<f64> {
        (self.count > 0).then_some(self.mean)
    }

    /// Returns the sample standard deviation; `None` for fewer than two values.
    pub(crate) fn standard_deviation(&self) -> Option<f64> {
        (self.count > 1).then(|| (self.squared_distances / (self.count - 1) as f64).sqrt())
    }
}

/// Returns the value below which the given share of the values lies, interpolated linearly between neighbors
/// (Hyndman and Fan's type 7, the default of R and NumPy); `None` if there are no values. The values must be in
/// ascending order.
pub(crate) fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let position = sorted.len().checked_sub(1)? as f64 * share;
    let (below, fraction) = (position.floor() as usize, position.fract());
    let low = *sorted.get(below)?;
    let high = sorted.get(below + 1).copied().unwrap_or(low);
    Some(low + fraction * (high - low))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(values: &[f64]) -> Moments {
        let mut moments = Moments::default();
        values.iter().for_each(|value| moments.add(*value));
        moments
    }

    #[test]
    fn mean_and_deviation_match_a_manual_calculation() {
        // Mean 5; squared distances 9+1+1+1+0+0+4+16 = 32; 32 / 7.
        let eight = moments(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
        assert_eq!(eight.mean(), Some(5.0));
        assert!((eight.standard_deviation().unwrap() - (32.0_f64 / 7.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn the_deviation_of_large_values_close_together_is_accurate() {
        // The squares of 4, 7, 13 and 16 above 1e9 have more digits than a double.
        let large = moments(&[4.0, 7.0, 13.0, 16.0].map(|value| value + 1e9));
        assert_eq!(large.mean(), Some(1e9 + 10.0));
        assert!((large.standard_deviation().unwrap() - 30.0_f64.sqrt()).abs() < 1e-9);
    }

    #[test]
    fn a_single_value_has_no_deviation_and_no_values_have_no_mean() {
        assert_eq!(moments(&[]).mean(), None);
        assert_eq!(moments(&[3.0]).mean(), Some(3.0));
        assert_eq!(moments(&[3.0]).standard_deviation(), None);
        assert_eq!(NumericSummary::of(Vec::new()), None);
    }

    #[test]
    fn quantiles_are_interpolated() {
        let four = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(quantile(&four, 0.25), Some(1.75));
        assert_eq!(quantile(&four, 0.5), Some(2.5));
        assert_eq!(quantile(&four, 0.75), Some(3.25));
        assert_eq!(quantile(&[1.0, 2.0, 9.0], 0.5), Some(2.0));
        assert_eq!(quantile(&four, 0.0), Some(1.0));
        assert_eq!(quantile(&four, 1.0), Some(4.0));
        assert_eq!(quantile(&[7.0], 0.95), Some(7.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn histograms_count_every_value_once_including_edges() {
        // 0 to 20 in bins of width 1: each integer is the lower edge of a bin; 20 is in the last one, with 19.
        let values: Vec<f64> = (0..=20).map(f64::from).collect();
        let histogram = Histogram::of(&values).unwrap();
        assert_eq!((histogram.from, histogram.to), (0.0, 20.0));
        let mut expected = vec![1; BINS];
        expected[BINS - 1] = 2;
        assert_eq!(histogram.counts, expected);
    }

    #[test]
    fn a_single_value_is_in_the_middle_of_its_histogram() {
        let histogram = Histogram::of(&[3.0, 3.0]).unwrap();
        assert_eq!((histogram.from, histogram.to), (2.5, 3.5));
        assert_eq!(histogram.counts[10], 2);
        // The value is so large that adding 0.5 has no effect.
        assert_eq!(Histogram::of(&[1e30]).unwrap().counts.iter().sum::<u64>(), 1);
    }

    #[test]
    fn a_summary_is_independent_of_the_order() {
        let summary = NumericSummary::of(vec![3.0, -1.0, 4.0, 2.0]).unwrap();
        assert_eq!((summary.min, summary.max, summary.mean), (-1.0, 4.0, 2.0));
        assert_eq!((summary.p25, summary.p50, summary.p75), (1.25, 2.5, 3.25));
        // Squared distances 1 + 9 + 4 + 0 = 14; 14 / 3.
        let deviation = summary.standard_deviation.unwrap();
        assert!((deviation - (14.0_f64 / 3.0).sqrt()).abs() < 1e-12);
    }
}
