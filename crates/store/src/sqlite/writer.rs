//! The one thread that writes, and its group commit.
//!
//! Large operations wait in a queue of their own and are committed a few at a time, in turn with groups
//! of small ones: what is small, such as the renewal of a lease, waits for one such group and not for all that
//! others write.

use std::thread::{self, JoinHandle, Thread};

use rusqlite::Connection;
use tokio::sync::{
    mpsc::{self, error::TryRecvError},
    oneshot,
};

use super::{
    checkpointer::Checkpointer,
    files::Files,
    sqlite_error,
    usage::{Db, Usage},
};
use crate::StoreError;

/// Operations beyond this wait before they are queued.
const QUEUE: usize = 4096;
/// Operations of one commit at most: bounds how long the first of them waits.
const GROUP: usize = 512;
/// Operations that write more bytes than this are large.
const LARGE_BYTES: usize = 16 * 1024;
/// Large operations beyond this wait before they are queued.
const LARGE_QUEUE: usize = 64;
/// Bytes of the operations of one commit, but for the last of them.
const GROUP_BYTES: usize = 256 * 1024;

/// An operation that waits for its turn.
trait Operation: Send {
    /// Applies it inside the open transaction. May be called again after a rollback.
    fn apply(&mut self, db: &Db<'_>) -> rusqlite::Result<()>;
    /// Answers the caller, after the commit or its failure.
    fn answer(self: Box<Self>, committed: Result<(), StoreError>);
    /// What it does, for errors.
    fn doing(&self) -> &'static str;
    /// An estimate of how much it writes.
    fn bytes(&self) -> usize;
}

type Boxed = Box<dyn Operation>;

struct Pending<F, T> {
    bytes: usize,
    doing: &'static str,
    run: F,
    output: Option<T>,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<F, T> Operation for Pending<F, T>
where
    F: FnMut(&Db<'_>) -> rusqlite::Result<T> + Send,
    T: Send,
{
    fn apply(&mut self, db: &Db<'_>) -> rusqlite::Result<()> {
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

    fn bytes(&self) -> usize {
        self.bytes
    }
}

/// The writer thread. Dropping it lets it finish what is queued, then ends it.
pub(super) struct WriterThread {
    queues: Option<Queues>,
    thread: Option<JoinHandle<()>>,
}

struct Queues {
    small: mpsc::Sender<Boxed>,
    large: mpsc::Sender<Boxed>,
    writer: Thread,
}

impl WriterThread {
    pub(super) fn start(
        connection: Connection,
        files: Files,
        checkpointer: Checkpointer,
    ) -> Result<Self, StoreError> {
        let (small, small_operations) = mpsc::channel(QUEUE);
        let (large, large_operations) = mpsc::channel(LARGE_QUEUE);
        let waiting = Waiting::new(small_operations, large_operations);
        let thread = thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || write_until_closed(&connection, &files, checkpointer, waiting))
            .map_err(|error| StoreError::Unavailable {
                doing: "starting the writer",
                reason: error.to_string(),
            })?;
        let queues = Queues { small, large, writer: thread.thread().clone() };
        Ok(Self { queues: Some(queues), thread: Some(thread) })
    }

    /// Runs one operation that writes about `bytes` bytes; answers once it is on disk. `run` must read
    /// before it writes, and write nothing when what it read forbids it: what it did before an error is
    /// undone by rolling back the group, and the others are then applied anew.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        doing: &'static str,
        bytes: usize,
        run: impl FnMut(&Db<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let closed = || StoreError::Unavailable { doing, reason: "it is closed".into() };
        let queues = self.queues.as_ref().ok_or_else(closed)?;
        let (reply, answer) = oneshot::channel();
        let operation = Box::new(Pending { bytes, doing, run, output: None, reply });
        let queue = if bytes > LARGE_BYTES { &queues.large } else { &queues.small };
        queue.send(operation).await.map_err(|_| closed())?;
        queues.writer.unpark();
        answer.await.map_err(|_| closed())?
    }
}

impl Drop for WriterThread {
    fn drop(&mut self) {
        if let Some(Queues { small, large, writer }) = self.queues.take() {
            drop((small, large));
            writer.unpark();
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the store's writer thread had panicked");
        }
    }
}

/// Operations that wait for the writer.
struct Waiting {
    small: mpsc::Receiver<Boxed>,
    large: mpsc::Receiver<Boxed>,
    /// The last group was of small operations.
    large_is_next: bool,
}

impl Waiting {
    fn new(small: mpsc::Receiver<Boxed>, large: mpsc::Receiver<Boxed>) -> Self {
        Self { small, large, large_is_next: false }
    }

    /// Moves the next group into `group`, of small and large operations in turn; waits until there is one.
    /// Leaves it empty when none will come.
    fn next(&mut self, group: &mut Vec<Boxed>) {
        loop {
            let mut is_open = false;
            for _ in 0..2 {
                let queue = if self.large_is_next { &mut self.large } else { &mut self.small };
                is_open |= take(queue, group);
                self.large_is_next = !self.large_is_next;
                if !group.is_empty() {
                    return;
                }
            }
            if !is_open {
                return;
            }
            // A call that queues an operation unparks this thread afterwards; when it did before this line,
            // the thread goes on at once.
            thread::park();
        }
    }
}

/// Takes operations from a queue until they are a group. Whether there may be more.
fn take(queue: &mut mpsc::Receiver<Boxed>, group: &mut Vec<Boxed>) -> bool {
    let mut bytes = 0;
    while group.len() < GROUP && bytes < GROUP_BYTES {
        match queue.try_recv() {
            Ok(operation) => {
                bytes += operation.bytes();
                group.push(operation);
            }
            Err(TryRecvError::Empty) => return true,
            Err(TryRecvError::Disconnected) => return false,
        }
    }
    true
}

fn write_until_closed(
    connection: &Connection,
    files: &Files,
    mut checkpointer: Checkpointer,
    mut waiting: Waiting,
) {
    let usage = Usage::default();
    let db = &Db { connection, usage: &usage };
    let mut group = Vec::with_capacity(GROUP);
    loop {
        waiting.next(&mut group);
        if group.is_empty() {
            break;
        }
        let (operations, bytes) =
            (group.len(), group.iter().map(|operation| operation.bytes()).sum());
        match commit(db, &mut group) {
            Ok(()) => answer(files, &mut group),
            Err(_) => group.drain(..).for_each(|operation| commit_alone(db, files, operation)),
        }
        checkpointer.note_written(operations, bytes);
    }
    drop(checkpointer);
    if let Err(error) = db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)") {
        tracing::warn!(%error, "could not fold the write-ahead log into the store file");
    }
}

/// Applies the group in one transaction; nothing of it stands when this fails.
fn commit(db: &Db<'_>, group: &mut [Boxed]) -> rusqlite::Result<()> {
    db.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
    let applied = group.iter_mut().try_for_each(|operation| operation.apply(db));
    let committed = applied
        .and_then(|()| db.usage.store(db))
        .and_then(|()| db.prepare_cached("COMMIT")?.execute([]).map(drop));
    if committed.is_err() {
        db.usage.forget();
        if !db.is_autocommit() {
            db.execute_batch("ROLLBACK")?;
        }
    }
    committed
}

/// After a failed group: each operation gets a transaction of its own, so that one that cannot be
/// applied fails alone.
fn commit_alone(db: &Db<'_>, files: &Files, operation: Boxed) {
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
fn answer(files: &Files, group: &mut Vec<Boxed>) {
    let lost = files.check().err();
    for operation in group.drain(..) {
        let doing = operation.doing();
        let unavailable = |reason| StoreError::Unavailable { doing, reason };
        operation.answer(lost.clone().map(unavailable).map_or(Ok(()), Err));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(bytes: usize) -> Boxed {
        let (reply, _) = oneshot::channel();
        Box::new(Pending { bytes, doing: "testing", run: |_: &Db<'_>| Ok(()), output: None, reply })
    }

    #[test]
    fn small_operations_wait_for_one_group_of_large_ones() {
        let (small, small_operations) = mpsc::channel(QUEUE);
        let (large, large_operations) = mpsc::channel(LARGE_QUEUE);
        let mut waiting = Waiting::new(small_operations, large_operations);
        let large_ones = [LARGE_BYTES + 1, GROUP_BYTES, GROUP_BYTES + 1, 100_000];
        for bytes in large_ones {
            large.try_send(operation(bytes)).unwrap();
        }
        small.try_send(operation(1)).unwrap();
        small.try_send(operation(2)).unwrap();
        let mut next = || {
            let mut group = Vec::new();
            waiting.next(&mut group);
            group.iter().map(|operation| operation.bytes()).collect::<Vec<usize>>()
        };
        assert_eq!(next(), [1, 2]);
        small.try_send(operation(3)).unwrap();
        assert_eq!(next(), large_ones[..2]);
        assert_eq!(next(), [3]);
        assert_eq!(next(), large_ones[2..3]);
        drop((small, large));
        assert_eq!(next(), large_ones[3..]);
        assert_eq!(next(), []);
    }
}
