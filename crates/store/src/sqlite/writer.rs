//! The writer thread and its group commit. `schedule.rs` decides what is committed next.

mod schedule;

use std::{
    thread::{self, JoinHandle, Thread},
    time::Instant,
};

use rusqlite::Connection;
use streamer_core::Uid;
use tokio::sync::{
    mpsc::{self, error::TryRecvError},
    oneshot,
};

use self::schedule::{Next, Schedule};
use super::{
    checkpointer::Checkpointer,
    files::FileIdentities,
    requests, sqlite_error,
    usage::{Db, Usage},
};
use crate::StoreError;

/// Capacity of each queue of operations; further operations wait before they are queued.
const QUEUE_CAPACITY: usize = 4096;
/// Operations that write more bytes than this are large.
const LARGE_BYTES: usize = 16 * 1024;

/// Cost of an operation, and who pays for it.
#[derive(Clone, Debug)]
pub(super) struct Cost {
    /// Estimate of the bytes that it writes.
    pub(super) bytes: usize,
    pub(super) payer: Payer,
}

/// Tenant that an operation writes for: large operations of different tenants take turns.
#[derive(Clone, Debug)]
pub(super) enum Payer {
    /// All tenants.
    Server,
    Tenant(String),
    /// Tenant of the owner of this request.
    OwnerOf(Uid),
}

impl Cost {
    /// Cost of an operation without data from a caller.
    pub(super) const SMALL: Self = Self { bytes: 512, payer: Payer::Server };

    pub(super) fn new(bytes: usize, payer: Payer) -> Self {
        Self { bytes, payer }
    }
}

/// A queued operation.
trait Operation: Send {
    /// Applies the operation in the open transaction. May be called again after a rollback.
    fn apply(&mut self, db: &Db<'_>) -> rusqlite::Result<()>;
    /// Sends the result to the caller, after the commit or its failure.
    fn complete(self: Box<Self>, committed: Result<(), StoreError>);
    /// Returns a description of the operation, for errors.
    fn doing(&self) -> &'static str;
    fn cost(&self) -> &Cost;
}

type BoxedOperation = Box<dyn Operation>;

struct QueuedOperation<F, T> {
    cost: Cost,
    doing: &'static str,
    run: F,
    output: Option<T>,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<F, T> Operation for QueuedOperation<F, T>
where
    F: FnMut(&Db<'_>) -> rusqlite::Result<T> + Send,
    T: Send,
{
    fn apply(&mut self, db: &Db<'_>) -> rusqlite::Result<()> {
        self.output = Some((self.run)(db)?);
        Ok(())
    }

    fn complete(self: Box<Self>, committed: Result<(), StoreError>) {
        let Self { doing, output, reply, .. } = *self;
        let result = committed.and_then(|()| {
            output.ok_or_else(|| StoreError::Unavailable {
                doing,
                reason: "the operation was not applied".into(),
            })
        });
        // A caller that has disconnected needs no result; the change is kept either way.
        drop(reply.send(result));
    }

    fn doing(&self) -> &'static str {
        self.doing
    }

    fn cost(&self) -> &Cost {
        &self.cost
    }
}

/// Handle of the writer thread. Dropping it waits until the queued operations are finished and the
/// thread has exited.
pub(super) struct WriterThread {
    queues: Option<QueueSenders>,
    thread: Option<JoinHandle<()>>,
}

struct QueueSenders {
    small: mpsc::Sender<BoxedOperation>,
    large: mpsc::Sender<BoxedOperation>,
    writer: Thread,
}

impl WriterThread {
    pub(super) fn start(
        connection: Connection,
        files: FileIdentities,
        checkpointer: Checkpointer,
    ) -> Result<Self, StoreError> {
        let (small, small_operations) = mpsc::channel(QUEUE_CAPACITY);
        let (large, large_operations) = mpsc::channel(QUEUE_CAPACITY);
        let queue = OperationQueue::new(small_operations, large_operations);
        let thread = thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || write_until_closed(&connection, &files, checkpointer, queue))
            .map_err(|error| StoreError::Unavailable {
                doing: "starting the writer",
                reason: error.to_string(),
            })?;
        let queues = QueueSenders { small, large, writer: thread.thread().clone() };
        Ok(Self { queues: Some(queues), thread: Some(thread) })
    }

    /// Runs one operation of this cost and returns once its change is on disk. `run` must read
    /// before it writes, and write nothing if the state that it read forbids it: an error rolls the
    /// group back, and its operations are then applied one by one.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        doing: &'static str,
        cost: Cost,
        run: impl FnMut(&Db<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let closed = || StoreError::Unavailable { doing, reason: "the store is closed".into() };
        let queues = self.queues.as_ref().ok_or_else(closed)?;
        let (reply, result) = oneshot::channel();
        let queue = if cost.bytes > LARGE_BYTES { &queues.large } else { &queues.small };
        let operation = Box::new(QueuedOperation { cost, doing, run, output: None, reply });
        queue.send(operation).await.map_err(|_| closed())?;
        queues.writer.unpark();
        result.await.map_err(|_| closed())?
    }
}

impl Drop for WriterThread {
    fn drop(&mut self) {
        if let Some(QueueSenders { small, large, writer }) = self.queues.take() {
            drop((small, large));
            writer.unpark();
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the store's writer thread panicked");
        }
    }
}

/// Operations waiting for the writer.
struct OperationQueue {
    small: mpsc::Receiver<BoxedOperation>,
    large: mpsc::Receiver<BoxedOperation>,
    schedule: Schedule<BoxedOperation>,
}

impl OperationQueue {
    fn new(small: mpsc::Receiver<BoxedOperation>, large: mpsc::Receiver<BoxedOperation>) -> Self {
        Self { small, large, schedule: Schedule::default() }
    }

    /// Moves the next group into `group`, waiting until one exists. Leaves `group` empty when the
    /// queue is closed.
    fn next(&mut self, db: &Connection, group: &mut Vec<BoxedOperation>) {
        loop {
            let is_open = self.receive(db);
            match self.schedule.next(Instant::now(), group) {
                Next::Group => return,
                Next::Nothing if !is_open => return,
                // A caller that queues an operation unparks this thread afterwards; if it did so
                // before this line, `park` returns at once.
                Next::Nothing => thread::park(),
                Next::Wait(time) => thread::park_timeout(time),
            }
        }
    }

    /// Moves queued operations to the schedule, up to its capacity. Returns whether more can
    /// follow.
    fn receive(&mut self, db: &Connection) -> bool {
        let schedule = &mut self.schedule;
        let small = receive_while(&mut self.small, |operation| {
            schedule.add_small(operation.cost().bytes, operation);
            schedule.small_len() < QUEUE_CAPACITY
        });
        let large = receive_while(&mut self.large, |operation| {
            let Cost { bytes, payer } = operation.cost().clone();
            let tenant = match payer {
                Payer::Server => String::new(),
                Payer::Tenant(tenant) => tenant,
                // The operation on a request that does not exist writes nothing.
                Payer::OwnerOf(uid) => requests::tenant(db, uid).ok().flatten().unwrap_or_default(),
            };
            schedule.add_large(tenant, bytes, operation);
            schedule.large_len() < QUEUE_CAPACITY
        });
        small || large
    }
}

/// Receives operations until `add` returns false. Returns whether more can follow.
fn receive_while(
    queue: &mut mpsc::Receiver<BoxedOperation>,
    mut add: impl FnMut(BoxedOperation) -> bool,
) -> bool {
    loop {
        match queue.try_recv() {
            Ok(operation) => {
                if !add(operation) {
                    return true;
                }
            }
            Err(TryRecvError::Empty) => return true,
            Err(TryRecvError::Disconnected) => return false,
        }
    }
}

fn write_until_closed(
    connection: &Connection,
    files: &FileIdentities,
    mut checkpointer: Checkpointer,
    mut queue: OperationQueue,
) {
    let usage = Usage::default();
    let db = &Db { connection, usage: &usage };
    let mut group = Vec::new();
    loop {
        queue.next(db, &mut group);
        if group.is_empty() {
            break;
        }
        let (operations, bytes) =
            (group.len(), group.iter().map(|operation| operation.cost().bytes).sum());
        match commit(db, &mut group) {
            Ok(()) => complete_group(files, &mut group),
            Err(_) => group.drain(..).for_each(|operation| commit_alone(db, files, operation)),
        }
        queue.schedule.group_committed(Instant::now());
        checkpointer.record_written(operations, bytes);
    }
    drop(checkpointer);
    if let Err(error) = db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)") {
        tracing::warn!(%error, "checkpointing the write-ahead log failed");
    }
}

/// Applies the group in one transaction; on an error, no change is kept.
fn commit(db: &Db<'_>, group: &mut [BoxedOperation]) -> rusqlite::Result<()> {
    db.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
    let applied = group.iter_mut().try_for_each(|operation| operation.apply(db));
    let committed = applied
        .and_then(|()| db.usage.store(db))
        .and_then(|()| db.prepare_cached("COMMIT")?.execute([]).map(drop));
    if committed.is_err() {
        db.usage.clear_cache();
        if !db.is_autocommit() {
            db.execute_batch("ROLLBACK")?;
        }
    }
    committed
}

/// Applies each operation of a failed group in a separate transaction, so that one that cannot be
/// applied fails alone.
fn commit_alone(db: &Db<'_>, files: &FileIdentities, operation: BoxedOperation) {
    let mut group = vec![operation];
    match commit(db, &mut group) {
        Ok(()) => complete_group(files, &mut group),
        Err(error) => group.drain(..).for_each(|operation| {
            let doing = operation.doing();
            operation.complete(Err(sqlite_error(doing, &error)));
        }),
    }
}

/// Completes committed operations, unless the files that they were committed to were removed or
/// replaced. The check costs microseconds, and a commit milliseconds.
fn complete_group(files: &FileIdentities, group: &mut Vec<BoxedOperation>) {
    let failure = files.check().err();
    for operation in group.drain(..) {
        let doing = operation.doing();
        let unavailable = |reason| StoreError::Unavailable { doing, reason };
        operation.complete(failure.clone().map(unavailable).map_or(Ok(()), Err));
    }
}
