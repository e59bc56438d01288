//! Families of metrics whose series are found without hashing their labels.

use std::{fmt, hash::Hash, sync::OnceLock};

use prometheus_client::{encoding::EncodeLabelSet, metrics::family::Family, registry::Metric};

use crate::Metrics;

/// Family of metrics whose label sets have indices. A series exists after its first use.
pub struct IndexedFamily<L, M> {
    family: Family<L, M>,
    /// Series that were used, by the index of their labels.
    series: Box<[OnceLock<M>]>,
}

impl<L, M> IndexedFamily<L, M>
where
    L: Clone + fmt::Debug + Eq + Hash + EncodeLabelSet + Send + Sync + 'static,
    M: Metric + Clone + Default,
    Family<L, M>: Metric,
{
    /// Registers a family in which the indices of the label sets are below `size`.
    pub fn register(metrics: &Metrics, name: &str, help: &str, size: usize) -> Self {
        let family = metrics.register(name, help, Family::default());
        Self { family, series: (0..size).map(|_| OnceLock::new()).collect() }
    }

    /// Calls `record` with the series that has the given index and labels.
    pub fn with(&self, index: usize, labels: impl FnOnce() -> L, record: impl FnOnce(&M)) {
        match self.series.get(index) {
            Some(series) => {
                record(series.get_or_init(|| self.family.get_or_create_owned(&labels())));
            }
            None => record(&self.family.get_or_create(&labels())),
        }
    }
}
