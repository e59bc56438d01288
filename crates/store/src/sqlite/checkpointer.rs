//! Moves what was committed from the write-ahead log into the database file, beside the writer: doing that in
//! a commit would make everything that waits for it wait for the database file as well.

use std::{
    path::Path,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::{self, JoinHandle},
};

use rusqlite::Connection;

use super::{schema, sqlite_error};
use crate::StoreError;

/// Pages of the log after which they are moved, as SQLite's own default.
const PAGES: usize = 1000;
/// Bytes of a page.
const PAGE_BYTES: usize = 4096;
/// An estimate of the pages that an operation writes beside its values: of tables and of indexes.
const PAGES_OF_EACH: usize = 4;

/// The thread that does it. Dropping it waits for its end.
pub(super) struct Checkpointer {
    /// An estimate of the pages that were written since the thread was woken.
    written: usize,
    wake: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Checkpointer {
    /// Starts it for the database at this path.
    pub(super) fn start(path: &Path) -> Result<Self, StoreError> {
        let connection = schema::open_for_checkpoints(path)
            .map_err(|error| sqlite_error("opening for checkpoints", &error))?;
        let (wake, wanted) = sync_channel(1);
        let thread = thread::Builder::new()
            .name("store-checkpointer".into())
            .spawn(move || checkpoint_when_wanted(&connection, &wanted))
            .map_err(|error| StoreError::Unavailable {
                doing: "starting the checkpointer",
                reason: error.to_string(),
            })?;
        Ok(Self { written: 0, wake: Some(wake), thread: Some(thread) })
    }

    /// Notes that operations with these bytes of values were committed.
    pub(super) fn note_written(&mut self, operations: usize, bytes: usize) {
        self.written += operations * PAGES_OF_EACH + bytes / PAGE_BYTES;
        if self.written >= PAGES
            && let Some(wake) = &self.wake
        {
            self.written = 0;
            // Full: it is awake, or about to be.
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
            tracing::error!("the store's checkpointer had panicked");
        }
    }
}

fn checkpoint_when_wanted(db: &Connection, wanted: &Receiver<()>) {
    while wanted.recv().is_ok() {
        // Passive: it neither waits for readers nor blocks the writer. What it leaves is moved the next time, or
        // by a commit once the log is several times as long.
        if let Err(error) = db.execute_batch("PRAGMA wal_checkpoint(PASSIVE)") {
            tracing::debug!(%error, "could not move the write-ahead log into the store file");
        }
    }
}
