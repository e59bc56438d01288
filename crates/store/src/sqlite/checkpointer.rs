//! Checkpoints the write-ahead log on a separate thread: a checkpoint in a commit would make all
//! waiting operations wait for the database file as well.

use std::{
    path::Path,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::{self, JoinHandle},
};

use rusqlite::Connection;

use super::{schema, sqlite_error};
use crate::StoreError;

/// Pages in the log after which to checkpoint, SQLite's own default.
const CHECKPOINT_PAGES: usize = 1000;
/// Bytes of a page.
const PAGE_BYTES: usize = 4096;
/// Estimate of the table and index pages that an operation writes in addition to its values.
const PAGES_PER_OPERATION: usize = 4;

/// The checkpointer thread. Dropping it waits until the thread has exited.
pub(super) struct Checkpointer {
    /// Estimate of the pages written since the last wakeup of the thread.
    pages_written: usize,
    wake: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Checkpointer {
    /// Starts the thread for the database at this path.
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

    /// Records that operations with this many bytes of values were committed.
    pub(super) fn record_written(&mut self, operations: usize, bytes: usize) {
        self.pages_written += operations * PAGES_PER_OPERATION + bytes / PAGE_BYTES;
        if self.pages_written >= CHECKPOINT_PAGES
            && let Some(wake) = &self.wake
        {
            self.pages_written = 0;
            // A full channel means that the thread is awake, or about to be.
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
        // Passive: neither waits for readers nor blocks the writer. The next checkpoint moves the
        // remainder, or a commit does once the log is several times as long.
        if let Err(error) = db.execute_batch("PRAGMA wal_checkpoint(PASSIVE)") {
            tracing::debug!(%error, "checkpointing the write-ahead log failed");
        }
    }
}
