//! The one thread that writes, and its group commit.

use std::thread::{self, JoinHandle};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::{files::Files, sqlite_error};
use crate::StoreError;

/// Operations beyond this wait before they are queued.
const QUEUE: usize = 4096;
/// Operations of one commit at most: bounds how long the first of them waits.
const GROUP: usize = 512;

/// An operation that waits for its turn.
trait Operation: Send {
    /// Applies it inside the open transaction. May be called again after a rollback.
    fn apply(&mut self, db: &Connection) -> rusqlite::Result<()>;
    /// Answers the caller, after the commit or its failure.
    fn answer(self: Box<Self>, committed: Result<(), StoreError>);
    /// What it does, for errors.
    fn doing(&self) -> &'static str;
}

struct Pending<F, T> {
    doing: &'static str,
    run: F,
    output: Option<T>,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<F, T> Operation for Pending<F, T>
where
    F: FnMut(&Connection) -> rusqlite::Result<T> + Send,
    T: Send,
{
    fn apply(&mut self, db: &Connection) -> rusqlite::Result<()> {
        self.output = Some((self.run)(db)?);
        Ok(())
    }

    fn answer(self: Box<Self>, committed: Result<(), StoreError>) {
        let Self { doing, output, reply, .. } = *self;
        let answer = committed.and_then(|()| {
            output.ok_or_else(|| StoreError::Unavailable {
                doing,
                reason: "the operation was not applied".into(),
            })
        });
        // A caller that has gone away needs no answer; the change stands either way.
        drop(reply.send(answer));
    }

    fn doing(&self) -> &'static str {
        self.doing
    }
}

/// The writer thread. Dropping it lets it finish what is queued, then ends it.
pub(super) struct WriterThread {
    queue: Option<mpsc::Sender<Box<dyn Operation>>>,
    thread: Option<JoinHandle<()>>,
}

impl WriterThread {
    pub(super) fn start(connection: Connection, files: Files) -> Result<Self, StoreError> {
        let (queue, operations) = mpsc::channel(QUEUE);
        let thread = thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || write_until_closed(&connection, &files, operations))
            .map_err(|error| StoreError::Unavailable {
                doing: "starting the writer",
                reason: error.to_string(),
            })?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    /// Runs one operation; answers once it is on disk. `run` must read before it writes, and write
    /// nothing when what it read forbids it: what it did before an error is undone by rolling back
    /// the group, and the others are then applied anew.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        doing: &'static str,
        run: impl FnMut(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let closed = || StoreError::Unavailable { doing, reason: "it is closed".into() };
        let queue = self.queue.as_ref().ok_or_else(closed)?;
        let (reply, answer) = oneshot::channel();
        let operation = Box::new(Pending { doing, run, output: None, reply });
        queue.send(operation).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }
}

impl Drop for WriterThread {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the store's writer thread had panicked");
        }
    }
}

fn write_until_closed(
    db: &Connection,
    files: &Files,
    mut operations: mpsc::Receiver<Box<dyn Operation>>,
) {
    let mut group = Vec::with_capacity(GROUP);
    while operations.blocking_recv_many(&mut group, GROUP) > 0 {
        match commit(db, &mut group) {
            Ok(()) => answer(files, &mut group),
            Err(_) => group.drain(..).for_each(|operation| commit_alone(db, files, operation)),
        }
    }
    if let Err(error) = db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)") {
        tracing::warn!(%error, "could not fold the write-ahead log into the store file");
    }
}

/// Applies the group in one transaction; nothing of it stands when this fails.
fn commit(db: &Connection, group: &mut [Box<dyn Operation>]) -> rusqlite::Result<()> {
    db.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
    let applied = group.iter_mut().try_for_each(|operation| operation.apply(db));
    let committed = applied.and_then(|()| db.prepare_cached("COMMIT")?.execute([]).map(drop));
    if committed.is_err() && !db.is_autocommit() {
        db.execute_batch("ROLLBACK")?;
    }
    committed
}

/// After a failed group: each operation gets a transaction of its own, so that one that cannot be
/// applied fails alone.
fn commit_alone(db: &Connection, files: &Files, operation: Box<dyn Operation>) {
    let mut group = vec![operation];
    match commit(db, &mut group) {
        Ok(()) => answer(files, &mut group),
        Err(error) => group.drain(..).for_each(|operation| {
            let doing = operation.doing();
            operation.answer(Err(sqlite_error(doing, &error)));
        }),
    }
}

/// Answers what was committed, unless that is to files which the next process will not find. A look at
/// them costs microseconds, and a commit milliseconds.
fn answer(files: &Files, group: &mut Vec<Box<dyn Operation>>) {
    let lost = files.check().err();
    for operation in group.drain(..) {
        let doing = operation.doing();
        let unavailable = |reason| StoreError::Unavailable { doing, reason };
        operation.answer(lost.clone().map(unavailable).map_or(Ok(()), Err));
    }
}
