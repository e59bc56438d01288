//! Page that is streamed in chunks.

use streamer_handler::{Context, HandlerError};

use super::{html, summary::ReportSummary};

const CONTENT_TYPE: &str = "text/html; charset=utf-8";

/// Page whose head has been written.
pub(super) struct Page<'a> {
    context: &'a Context,
    title: String,
    sections: u64,
    chunks: u64,
    bytes: u64,
}

impl<'a> Page<'a> {
    /// Writes the head of a page with the given number of sections.
    pub(super) async fn begin(
        context: &'a Context,
        title: String,
        lead: &str,
        sections: u64,
    ) -> Result<Self, HandlerError> {
        let head = html::head(&title, lead);
        let mut page = Self { context, title, sections, chunks: 0, bytes: 0 };
        page.emit(head, "head").await?;
        Ok(page)
    }

    /// Writes the next section, which is HTML.
    pub(super) async fn section(&mut self, section: String) -> Result<(), HandlerError> {
        // The head is also a chunk, so the number of chunks so far is the number of the section.
        let message = format!("section {} of {}", self.chunks, self.sections);
        self.emit(section, &message).await
    }

    /// Writes the foot of the page.
    pub(super) async fn end(mut self) -> Result<ReportSummary, HandlerError> {
        self.emit(html::foot(), "foot").await?;
        Ok(ReportSummary { title: self.title, bytes: self.bytes, chunks: self.chunks })
    }

    async fn emit(&mut self, chunk: String, message: &str) -> Result<(), HandlerError> {
        if self.context.is_cancelled() {
            return Err(HandlerError::cancelled());
        }
        self.bytes += chunk.len() as u64;
        self.chunks += 1;
        self.context.output_bytes(CONTENT_TYPE, chunk).await?;
        let total = self.sections + 2;
        self.context.progress(100.0 * self.chunks as f64 / total as f64, message).await?;
        // Rendering is CPU-bound: yields to other tasks after each chunk.
        tokio::task::yield_now().await;
        Ok(())
    }
}
