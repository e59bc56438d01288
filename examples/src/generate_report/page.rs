//! A page on its way out, piece by piece.

use streamer_handler::{Context, HandlerError};

use crate::generate_report::{ReportSummary, html};

const CONTENT_TYPE: &str = "text/html; charset=utf-8";

/// A page of which the head is written.
pub(super) struct Page<'a> {
    context: &'a Context,
    title: String,
    sections: u64,
    chunks: u64,
    bytes: u64,
}

impl<'a> Page<'a> {
    /// Writes the head of a page that will have so many sections.
    pub(super) async fn begin(
        context: &'a Context,
        title: String,
        lead: &str,
        sections: u64,
    ) -> Result<Self, HandlerError> {
        let head = html::head(&title, lead);
        let mut page = Self { context, title, sections, chunks: 0, bytes: 0 };
        page.put_out(head, "head").await?;
        Ok(page)
    }

    /// Writes the next section, which is HTML.
    pub(super) async fn section(&mut self, section: String) -> Result<(), HandlerError> {
        // The head came before the sections, so the chunks so far are the number of this one.
        let doing = format!("section {} of {}", self.chunks, self.sections);
        self.put_out(section, &doing).await
    }

    /// Writes the foot.
    pub(super) async fn end(mut self) -> Result<ReportSummary, HandlerError> {
        self.put_out(html::foot(), "foot").await?;
        Ok(ReportSummary { title: self.title, bytes: self.bytes, chunks: self.chunks })
    }

    async fn put_out(&mut self, chunk: String, doing: &str) -> Result<(), HandlerError> {
        if self.context.is_cancelled() {
            return Err(HandlerError::cancelled());
        }
        self.bytes += chunk.len() as u64;
        self.chunks += 1;
        self.context.output_bytes(CONTENT_TYPE, chunk).await?;
        let total = self.sections + 2;
        self.context.progress(100.0 * self.chunks as f64 / total as f64, doing).await?;
        // Writing a section is computing; others get a turn before the next.
        tokio::task::yield_now().await;
        Ok(())
    }
}
