//! Result of `generate_report`.

use serde::Serialize;

/// Result of [`GenerateReport`](super::GenerateReport); the page itself is the output.
#[derive(Debug, PartialEq, Serialize)]
pub struct ReportSummary {
    /// Title of the page.
    pub title: String,
    /// Size of the page in bytes.
    pub bytes: u64,
    /// Number of output chunks.
    pub chunks: u64,
}
