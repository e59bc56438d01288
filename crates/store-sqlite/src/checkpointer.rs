//! Checkpoints the write-ahead log on a separate thread. A checkpoint during a commit would delay all waiting
//! operations by the writes to the database file.

use std::{
    path::Path,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::{self, JoinHandle},
};

use rusqlite::Connection;

use super::{error::sqlite_error, schema};
use streamer_store::StoreError;

/// Number of pages in the log that triggers a checkpoint; the same as the default of SQLite.
const CHECKPOINT_PAGES: usize = 1000;
/// Size of a page, in bytes.
const PAGE_BYTES: usize = 4096;
/// Estimated number of table and index pages that an operation writes in addition to its values.
const PAGES_PER_OPERATION: usize = 4;

/// Handle of the checkpointer thread. Dropping the handle waits until the thread has exited.
pub(super) struct Checkpointer {
    /// Estimated number of pages written since the thread was last woken.
    pages_written: usize,
    wake: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Checkpointer {
    /// Starts the thread for the database at `path`.
    pub(super) fn start(path: &Path) -> Result<Self, StoreError> {
        let connection = schema::open_for_checkpoints(path)
            .map_err(|error| sqlite_error("opening the database for checkpoints", &error))?;
        let (wake, requests) = sync_channel(1);
        let thread = thread::Builder::new()
            .name("store-checkpointer".into())
            .spawn(move || checkpoint_on_request(&connection, &requests))
            .map_err(|error| StoreError::Unavailable {
                doing: "starting the checkpointer",
                reason: error.to_string(),
            })?;
        Ok(Self { pages_written: 0, wake: Some(wake), thread: Some(thread) })
    }

    /// Records the commit of `operations` operations, whose values have `bytes` bytes in total.
    pub(super) fn record_written(&mut self, operations: usize, bytes: usize) {
        self.pages_written += operations * PAGES_PER_OPERATION + bytes / PAGE_BYTES;
        if self.pages_written >= CHECKPOINT_PAGES
            && let Some(wake) = &self.wake
        {
            self.pages_written = 0;
            // If the channel is full, the thread is awake or about to wake.
            let _: Result<_, _> = wake.try_send(());
        }
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        self.wake = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the store's checkpointer thread panicked");
        }
    }
}

fn checkpoint_on_request(db: &Connection, requests: &Receiver<()>) {
    while requests.recv().is_ok() {
        // A passive checkpoint neither waits for readers nor blocks the writer. The next checkpoint copies the
        // remaining pages; if the log grows to several times this size, a commit copies them.
        if let Err(error) = db.execute_batch("PRAGMA wal_checkpoint(PASSIVE)") {
            tracing::debug!(%error, "failed to checkpoint the write-ahead log");
        }
    }
}
