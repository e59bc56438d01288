//! Writer thread with group commit. `schedule.rs` decides which operations are committed next.

mod schedule;

use std::{
    sync::Arc,
    thread::{self, JoinHandle, Thread},
    time::Instant,
};

use rusqlite::Connection;
use streamer_core::{Uid, saturate};
use tokio::sync::{
    OwnedSemaphorePermit, Semaphore,
    mpsc::{self, error::TryRecvError},
    oneshot,
};

use self::schedule::{Next, Schedule};
use super::{
    checkpointer::Checkpointer,
    error::sqlite_error,
    files::FileIdentities,
    requests,
    usage::{Db, Usage},
};
use streamer_store::StoreError;

/// Capacity of each channel to the writer, which empties the channels between two commits.
const CHANNEL_CAPACITY: usize = 4096;
/// Maximum total size of queued operations, in KiB; beyond it, callers wait in order of arrival. It is more than the
/// budgets that tenants share fairly (changes in a router, reports in a processor), so that these apply first.
const MAX_QUEUED_KIB: u32 = 512 * 1024;
/// Size above which an operation is large, in bytes.
const LARGE_BYTES: usize = 16 * 1024;

/// Cost of an operation, and the tenant that it is charged to.
#[derive(Clone, Debug)]
pub(super) struct Cost {
    /// Estimated number of bytes that the operation writes.
    pub(super) bytes: usize,
    /// Tenant that the operation is charged to.
    pub(super) payer: Payer,
}

/// Tenant that an operation is charged to. Large operations of different tenants take turns.
#[derive(Clone, Debug)]
pub(super) enum Payer {
    /// The server, on behalf of all tenants.
    Server,
    /// Tenant with the given name.
    Tenant(String),
    /// Tenant of the owner of the given request.
    OwnerOf(Uid),
}

/// Estimated number of bytes that an operation writes in addition to its values, for columns, keys and index entries.
const BASE_BYTES: usize = 512;

impl Cost {
    /// Cost of an operation of the server without values.
    pub(super) const SERVER: Self = Self { bytes: BASE_BYTES, payer: Payer::Server };

    /// Cost of an operation that writes values of `bytes` bytes in total.
    pub(super) fn new(bytes: usize, payer: Payer) -> Self {
        Self { bytes: BASE_BYTES + bytes, payer }
    }

    /// Cost of an operation on a request, without values.
    pub(super) fn of_request(uid: Uid) -> Self {
        Self::new(0, Payer::OwnerOf(uid))
    }
}

/// Queued operation.
trait Operation: Send {
    /// Applies the operation in the open transaction. May be called again after a rollback.
    fn apply(&mut self, db: &Db<'_>) -> rusqlite::Result<()>;
    /// Sends the result to the caller, after the commit succeeded or failed.
    fn complete(self: Box<Self>, committed: Result<(), StoreError>);
    /// Returns a description of the operation, for error messages.
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
    /// Share of [`MAX_QUEUED_KIB`]. The caller may disconnect; the operation is queued until it is committed.
    _permit: OwnedSemaphorePermit,
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
        // A caller that no longer waits does not need the result; the change is kept in either case.
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
    capacity: Arc<Semaphore>,
    writer: Thread,
}

impl WriterThread {
    pub(super) fn start(
        connection: Connection,
        files: FileIdentities,
        checkpointer: Checkpointer,
    ) -> Result<Self, StoreError> {
        let (small, small_operations) = mpsc::channel(CHANNEL_CAPACITY);
        let (large, large_operations) = mpsc::channel(CHANNEL_CAPACITY);
        let queue = OperationQueue::new(small_operations, large_operations);
        let thread = thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || write_until_closed(&connection, &files, checkpointer, queue))
            .map_err(|error| StoreError::Unavailable {
                doing: "starting the writer",
                reason: error.to_string(),
            })?;
        let capacity = Arc::new(Semaphore::new(MAX_QUEUED_KIB as usize));
        let queues = QueueSenders { small, large, capacity, writer: thread.thread().clone() };
        Ok(Self { queues: Some(queues), thread: Some(thread) })
    }

    /// Runs one operation and returns once its change is durable. `run` must read before it writes, and must write
    /// nothing if the state that it read does not allow the change. An error rolls the whole group back; its operations
    /// are then applied one by one.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        doing: &'static str,
        cost: Cost,
        run: impl FnMut(&Db<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let closed = || StoreError::Unavailable { doing, reason: "the store is closed".into() };
        let queues = self.queues.as_ref().ok_or_else(closed)?;
        let kib = saturate::to_u32(cost.bytes / 1024 + 1);
        let permit = queues.capacity.clone().acquire_many_owned(kib.min(MAX_QUEUED_KIB));
        let _permit = permit.await.map_err(|_| closed())?;
        let (reply, result) = oneshot::channel();
        let queue = if cost.bytes > LARGE_BYTES { &queues.large } else { &queues.small };
        let operation =
            Box::new(QueuedOperation { cost, doing, run, output: None, reply, _permit });
        queue.send(operation).await.map_err(|_| closed())?;
        queues.writer.unpark();
        result.await.map_err(|_| closed())?
    }
}

impl Drop for WriterThread {
    fn drop(&mut self) {
        if let Some(QueueSenders { small, large, writer, .. }) = self.queues.take() {
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

    /// Waits for the next group of operations and moves it into `group`. Leaves `group` empty if the queue is closed.
    fn next(&mut self, db: &Connection, group: &mut Vec<BoxedOperation>) {
        loop {
            let is_open = self.receive(db);
            match self.schedule.next(Instant::now(), group) {
                Next::Group => return,
                Next::Nothing if !is_open => return,
                // A caller unparks this thread after it queues an operation. If this happens before the next line,
                // `park` returns immediately.
                Next::Nothing => thread::park(),
                Next::Wait(time) => thread::park_timeout(time),
            }
        }
    }

    /// Moves all queued operations to the schedule, so that no operation waits behind operations of a different tenant.
    /// Returns whether more operations can follow.
    fn receive(&mut self, db: &Connection) -> bool {
        let schedule = &mut self.schedule;
        let small = receive_all(&mut self.small, |operation| {
            let (bytes, is_of_server) =
                (operation.cost().bytes, matches!(operation.cost().payer, Payer::Server));
            schedule.add_small(is_of_server, bytes, operation);
        });
        let large = receive_all(&mut self.large, |operation| {
            let Cost { bytes, payer } = operation.cost().clone();
            let tenant = match payer {
                Payer::Server => String::new(),
                Payer::Tenant(tenant) => tenant,
                // An operation on a request that does not exist writes nothing.
                Payer::OwnerOf(uid) => requests::tenant(db, uid).ok().flatten().unwrap_or_default(),
            };
            schedule.add_large(tenant.into(), bytes, operation);
        });
        small || large
    }
}

/// Receives all queued operations. Returns whether more operations can follow.
fn receive_all(
    queue: &mut mpsc::Receiver<BoxedOperation>,
    mut add: impl FnMut(BoxedOperation),
) -> bool {
    loop {
        match queue.try_recv() {
            Ok(operation) => add(operation),
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
        tracing::warn!(%error, "failed to checkpoint the write-ahead log");
    }
}

/// Applies the group in one transaction. If an error occurs, no change is kept.
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

/// Applies an operation of a failed group in a separate transaction, so that an operation that cannot be applied does
/// not affect the others.
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

/// Completes committed operations. They fail if the files that they were committed to were removed or replaced. The
/// check takes microseconds; a commit takes milliseconds.
fn complete_group(files: &FileIdentities, group: &mut Vec<BoxedOperation>) {
    let failure = files.check().err();
    for operation in group.drain(..) {
        let doing = operation.doing();
        let unavailable = |reason| StoreError::Unavailable { doing, reason };
        operation.complete(failure.clone().map(unavailable).map_or(Ok(()), Err));
    }
}
