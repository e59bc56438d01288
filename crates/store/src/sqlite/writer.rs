//! The one thread that writes, and its group commit. `schedule.rs` decides what is committed next.

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
    files::Files,
    requests, sqlite_error,
    usage::{Db, Usage},
};
use crate::StoreError;

/// Operations beyond this wait before they are queued.
const QUEUE: usize = 4096;
/// Operations that write more bytes than this are large.
const LARGE_BYTES: usize = 16 * 1024;

/// How much an operation writes, and for whom.
#[derive(Clone, Debug)]
pub(super) struct Cost {
    /// An estimate.
    pub(super) bytes: usize,
    pub(super) payer: Payer,
}

/// For whom an operation writes: large operations of different tenants take turns.
#[derive(Clone, Debug)]
pub(super) enum Payer {
    /// For all tenants.
    Server,
    Tenant(String),
    /// For the tenant of this request.
    OwnerOf(Uid),
}

impl Cost {
    /// Of an operation that holds nothing from outside.
    pub(super) const SMALL: Self = Self { bytes: 512, payer: Payer::Server };

    pub(super) fn new(bytes: usize, payer: Payer) -> Self {
        Self { bytes, payer }
    }
}

/// An operation that waits for its turn.
trait Operation: Send {
    /// Applies it inside the open transaction. May be called again after a rollback.
    fn apply(&mut self, db: &Db<'_>) -> rusqlite::Result<()>;
    /// Answers the caller, after the commit or its failure.
    fn answer(self: Box<Self>, committed: Result<(), StoreError>);
    /// What it does, for errors.
    fn doing(&self) -> &'static str;
    fn cost(&self) -> &Cost;
}

type Boxed = Box<dyn Operation>;

struct Pending<F, T> {
    cost: Cost,
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

    fn cost(&self) -> &Cost {
        &self.cost
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
        let (large, large_operations) = mpsc::channel(QUEUE);
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

    /// Runs one operation of this cost; answers once it is on disk. `run` must read
    /// before it writes, and write nothing when what it read forbids it: what it did before an error is
    /// undone by rolling back the group, and the others are then applied anew.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        doing: &'static str,
        cost: Cost,
        run: impl FnMut(&Db<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let closed = || StoreError::Unavailable { doing, reason: "it is closed".into() };
        let queues = self.queues.as_ref().ok_or_else(closed)?;
        let (reply, answer) = oneshot::channel();
        let queue = if cost.bytes > LARGE_BYTES { &queues.large } else { &queues.small };
        let operation = Box::new(Pending { cost, doing, run, output: None, reply });
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
    schedule: Schedule<Boxed>,
}

impl Waiting {
    fn new(small: mpsc::Receiver<Boxed>, large: mpsc::Receiver<Boxed>) -> Self {
        Self { small, large, schedule: Schedule::default() }
    }

    /// Moves the next group into `group`; waits until there is one. Leaves it empty when none will come.
    fn next(&mut self, db: &Connection, group: &mut Vec<Boxed>) {
        loop {
            let is_open = self.receive(db);
            match self.schedule.next(Instant::now(), group) {
                Next::Group => return,
                Next::Nothing if !is_open => return,
                // A call that queues an operation unparks this thread afterwards; when it did before these
                // lines, the thread goes on at once.
                Next::Nothing => thread::park(),
                Next::Wait(time) => thread::park_timeout(time),
            }
        }
    }

    /// Adds what was queued to the schedule, up to its bound. Whether more may come.
    fn receive(&mut self, db: &Connection) -> bool {
        let schedule = &mut self.schedule;
        let small = receive_while(&mut self.small, |operation| {
            schedule.add_small(operation.cost().bytes, operation);
            schedule.small() < QUEUE
        });
        let large = receive_while(&mut self.large, |operation| {
            let Cost { bytes, payer } = operation.cost().clone();
            let tenant = match payer {
                Payer::Server => String::new(),
                Payer::Tenant(tenant) => tenant,
                // Of a request that does not exist, the operation has nothing to write.
                Payer::OwnerOf(uid) => requests::tenant(db, uid).ok().flatten().unwrap_or_default(),
            };
            schedule.add_large(tenant, bytes, operation);
            schedule.large() < QUEUE
        });
        small || large
    }
}

/// Receives operations while `add` wants more. Whether more may come.
fn receive_while(queue: &mut mpsc::Receiver<Boxed>, mut add: impl FnMut(Boxed) -> bool) -> bool {
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
    files: &Files,
    mut checkpointer: Checkpointer,
    mut waiting: Waiting,
) {
    let usage = Usage::default();
    let db = &Db { connection, usage: &usage };
    let mut group = Vec::new();
    loop {
        waiting.next(db, &mut group);
        if group.is_empty() {
            break;
        }
        let (operations, bytes) =
            (group.len(), group.iter().map(|operation| operation.cost().bytes).sum());
        match commit(db, &mut group) {
            Ok(()) => answer(files, &mut group),
            Err(_) => group.drain(..).for_each(|operation| commit_alone(db, files, operation)),
        }
        waiting.schedule.finished(Instant::now());
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
