//! Statistics of numbers that are all at hand: pure functions, no I/O.

use serde::{Deserialize, Serialize};

/// Bins of a [`Histogram`].
pub(crate) const BINS: usize = 20;

/// How many values lie in each of some equally wide bins.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Histogram {
    /// Lower edge of the first bin.
    pub from: f64,
    /// Upper edge of the last bin.
    pub to: f64,
    /// Values per bin. A bin holds its lower edge but not its upper one; the last holds both.
    pub counts: Vec<u64>,
}

/// What is told of a column of numbers.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct NumericSummary {
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// The arithmetic mean.
    pub mean: f64,
    /// Of a sample (divided by n - 1); absent for a single value.
    pub standard_deviation: Option<f64>,
    /// A quarter of the values lie below.
    pub p25: f64,
    /// The median.
    pub p50: f64,
    /// A quarter of the values lie above.
    pub p75: f64,
    /// How they are spread.
    pub histogram: Histogram,
}

impl NumericSummary {
    /// The summary of these values, in any order; `None` of none. All must be finite, and their
    /// squares as well.
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
    /// The histogram of values in ascending order; `None` of none.
    fn of(sorted: &[f64]) -> Option<Self> {
        let (mut from, mut to) = (*sorted.first()?, *sorted.last()?);
        if from == to {
            // Bins need a width; these put the one value in the middle, as NumPy does.
            (from, to) = (from - 0.5, to + 0.5);
        }
        let mut counts = vec![0; BINS];
        for value in sorted {
            // The largest value would fall beyond the last bin. (Where the width is lost to
            // rounding this is NaN, which becomes the first bin.)
            let bin = (value - from) / (to - from) * BINS as f64;
            counts[(bin as usize).min(BINS - 1)] += 1;
        }
        Some(Self { from, to, counts })
    }
}

/// Mean and variance in one pass, by Welford's method: a sum of squares would lose the digits that
/// matter when the values are large and close together.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moments {
    count: u64,
    mean: f64,
    squared_distances: f64,
}

impl Moments {
    /// Takes one more value in.
    pub(crate) fn add(&mut self, value: f64) {
        self.count += 1;
        let distance = value - self.mean;
        self.mean += distance / self.count as f64;
        self.squared_distances += distance * (value - self.mean);
    }

    /// `None` of no values.
    pub(crate) fn mean(&self) -> Option<f64> {
        (self.count > 0).then_some(self.mean)
    }

    /// Of a sample; `None` of fewer than two values.
    pub(crate) fn standard_deviation(&self) -> Option<f64> {
        (self.count > 1).then(|| (self.squared_distances / (self.count - 1) as f64).sqrt())
    }
}

/// The value below which this share of the values lies, interpolated linearly between neighbours
/// (Hyndman and Fan's type 7, as R and NumPy do by default). The values are in ascending order;
/// `None` of none.
pub(crate) fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let position = sorted.len().checked_sub(1)? as f64 * share;
    let (below, part) = (position.floor() as usize, position.fract());
    let low = *sorted.get(below)?;
    let high = sorted.get(below + 1).copied().unwrap_or(low);
    Some(low + part * (high - low))
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
    fn mean_and_deviation_are_those_worked_out_by_hand() {
        // Mean 5; squared distances 9+1+1+1+0+0+4+16 = 32; 32 / 7.
        let eight = moments(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
        assert_eq!(eight.mean(), Some(5.0));
        assert!((eight.standard_deviation().unwrap() - (32.0_f64 / 7.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn large_values_close_together_keep_their_deviation() {
        // Squares of these need more digits than there are: 4, 7, 13, 16 above a thousand millions.
        let far = moments(&[4.0, 7.0, 13.0, 16.0].map(|value| value + 1e9));
        assert_eq!(far.mean(), Some(1e9 + 10.0));
        assert!((far.standard_deviation().unwrap() - 30.0_f64.sqrt()).abs() < 1e-9);
    }

    #[test]
    fn too_few_values_have_no_deviation_and_none_no_mean() {
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
    fn histograms_count_every_value_once_edges_included() {
        // 0 to 20 in bins of width 1: each whole number opens its bin, 20 joins 19 in the last.
        let values: Vec<f64> = (0..=20).map(f64::from).collect();
        let histogram = Histogram::of(&values).unwrap();
        assert_eq!((histogram.from, histogram.to), (0.0, 20.0));
        let mut expected = vec![1; BINS];
        expected[BINS - 1] = 2;
        assert_eq!(histogram.counts, expected);
    }

    #[test]
    fn a_single_value_lies_in_the_middle_of_its_histogram() {
        let histogram = Histogram::of(&[3.0, 3.0]).unwrap();
        assert_eq!((histogram.from, histogram.to), (2.5, 3.5));
        assert_eq!(histogram.counts[10], 2);
        // So large that half more or less makes no difference.
        assert_eq!(Histogram::of(&[1e30]).unwrap().counts.iter().sum::<u64>(), 1);
    }

    #[test]
    fn a_summary_puts_them_together_whatever_the_order() {
        let summary = NumericSummary::of(vec![3.0, -1.0, 4.0, 2.0]).unwrap();
        assert_eq!((summary.min, summary.max, summary.mean), (-1.0, 4.0, 2.0));
        assert_eq!((summary.p25, summary.p50, summary.p75), (1.25, 2.5, 3.25));
        // Squared distances 1 + 9 + 4 + 0 = 14; 14 / 3.
        let deviation = summary.standard_deviation.unwrap();
        assert!((deviation - (14.0_f64 / 3.0).sqrt()).abs() < 1e-12);
    }
}
