//! SQLite engine of the store. It uses one database file, which only one process can open at a time, in write-ahead log
//! (WAL) mode with `synchronous=FULL`.
//!
//! A single thread performs all writes. It applies all queued operations in one transaction and returns their results
//! after the commit, which requires only one fsync (group commit). Reads use separate connections and see the last
//! commit.

mod actions;
mod backup;
mod checkpointer;
mod checksum;
mod connections;
mod error;
mod files;
mod large_values;
mod queue;
mod requests;
mod restore;
mod row;
mod schema;
mod usage;
mod writer;

use std::{fs::File, path::Path, sync::Arc};

use async_trait::async_trait;
use parking_lot::Mutex;
use prost::Message;
use rusqlite::Connection;
use streamer_core::{Seq, Timestamp, Uid};

use backup::Backups;
use checkpointer::Checkpointer;
use error::{io_error, sqlite_error};
use files::{DATABASE, FileIdentities, OPENING};
pub use restore::{RestoreError, RestoreStep, Restored, restore};
use streamer_store::{
    Adopt, Append, AppendOutcome, BackupOutcome, CancelOutcome, Claim, ClaimOutcome,
    ConnectionPage, ConnectionRecord, CreateOutcome, DeclaredAction, DeleteOutcome, DuePage,
    DueQuery, EventPage, Lease, LeaseRenewal, ListRequests, NewRequest, Owner, QueueAhead,
    QueueStats, ReleasedRequests, RequestPage, RequestRecord, Store, StoreError, StoredPayload,
    check_appended,
};
use writer::{Cost, Payer, WriterThread};

/// Maximum number of reader connections; further reads wait for a free connection.
const MAX_READERS: usize = 4;
/// Maximum number of reader connections for pages of events, payloads and lists. The other reader connections are
/// reserved for execution and for reads of single requests.
const MAX_PAGE_READERS: usize = 3;
/// Estimated number of bytes that a deletion writes; a deletion frees a whole log.
const DELETION_BYTES: usize = 128 * 1024;
/// Estimated number of bytes that the registration of a connection writes.
const CONNECTION_BYTES: usize = 512;

/// Opens the store in the folder `data`, and creates the folder and its files if they do not exist.
///
/// # Errors
/// Returns an error if the folder is not writable, another process has the store open, or the file
/// is corrupt or has a newer schema version.
pub fn open(data: &Path) -> Result<Arc<dyn Store>, StoreError> {
    Ok(Arc::new(SqliteStore::open(data)?))
}

/// SQLite store in a data folder.
struct SqliteStore {
    writer: WriterThread,
    readers: Arc<Readers>,
    backups: Backups,
    /// Lock file, which is locked while the store is open; the operating system releases the lock when the process
    /// exits.
    _lock: File,
}

struct Readers {
    idle: Mutex<Vec<Connection>>,
    permits: tokio::sync::Semaphore,
    page_permits: tokio::sync::Semaphore,
    path: std::path::PathBuf,
}

impl SqliteStore {
    fn open(data: &Path) -> Result<Self, StoreError> {
        files::create_folder(data).map_err(|error| io_error(OPENING, data, &error))?;
        let lock = files::lock(data)?;
        for name in [backup::FILE, restore::FILE] {
            let path = data.join(name);
            files::remove_temporary(&path).map_err(|error| io_error(OPENING, &path, &error))?;
        }
        let path = data.join(DATABASE);
        files::open_private(&path).map_err(|error| io_error(OPENING, &path, &error))?;
        let connection = schema::open_for_writing(&path)
            .map_err(|error| sqlite_error("opening the database", &error))?;
        schema::check_size(&connection, &path)?;
        schema::migrate(&connection)?;
        schema::reset_after_restart(&connection)
            .map_err(|error| sqlite_error("opening the database", &error))?;
        let checkpointer = Checkpointer::start(&path)?;
        let files =
            FileIdentities::read(&path).map_err(|error| io_error(OPENING, &path, &error))?;
        let readers = Readers {
            idle: Mutex::new(Vec::new()),
            permits: tokio::sync::Semaphore::new(MAX_READERS),
            page_permits: tokio::sync::Semaphore::new(MAX_PAGE_READERS),
            path,
        };
        Ok(Self {
            writer: WriterThread::start(connection, files, checkpointer)?,
            readers: Arc::new(readers),
            backups: Backups::new(data),
            _lock: lock,
        })
    }

    /// Like [`Self::read`], for queries that may read large amounts of data.
    async fn read_page<T: Send + 'static>(
        &self,
        doing: &'static str,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = self.readers.page_permits.acquire().await;
        let _permit = permit
            .map_err(|_| StoreError::Unavailable { doing, reason: "the store is closed".into() })?;
        self.read(doing, query).await
    }

    async fn read<T: Send + 'static>(
        &self,
        doing: &'static str,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let unavailable =
            |reason: &str| StoreError::Unavailable { doing, reason: reason.to_owned() };
        let _permit =
            self.readers.permits.acquire().await.map_err(|_| unavailable("the store is closed"))?;
        let readers = self.readers.clone();
        let result = tokio::task::spawn_blocking(move || {
            let idle = readers.idle.lock().pop();
            let connection = match idle {
                Some(connection) => connection,
                None => schema::open_for_reading(&readers.path)?,
            };
            let output = query(&connection);
            readers.idle.lock().push(connection);
            output
        });
        match result.await {
            Ok(output) => output.map_err(|error| sqlite_error(doing, &error)),
            Err(_) => Err(unavailable("the reader task failed")),
        }
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn create_request(&self, new: NewRequest) -> Result<CreateOutcome, StoreError> {
        let payer = Payer::Tenant(new.owner.tenant.clone());
        let metadata = new.metadata.as_ref().map_or(0, bytes::Bytes::len);
        let cost = Cost::new(new.payload.data.len() + metadata, payer);
        self.writer.run("creating a request", cost, move |db| requests::create(db, &new)).await
    }

    async fn get_request(&self, uid: Uid) -> Result<Option<RequestRecord>, StoreError> {
        self.read("reading a request", move |db| requests::get(db, uid)).await
    }

    async fn find_request(
        &self,
        owner: Owner,
        client_id: String,
    ) -> Result<Option<RequestRecord>, StoreError> {
        self.read("finding a request", move |db| requests::find(db, &owner, &client_id)).await
    }

    async fn list_requests(&self, query: ListRequests) -> Result<RequestPage, StoreError> {
        self.read_page("listing requests", move |db| requests::list(db, &query)).await
    }

    async fn read_payload(&self, uid: Uid) -> Result<Option<StoredPayload>, StoreError> {
        self.read_page("reading a payload", move |db| requests::payload(db, uid)).await
    }

    async fn delete_request(&self, uid: Uid) -> Result<DeleteOutcome, StoreError> {
        let cost = Cost::new(DELETION_BYTES, Payer::OwnerOf(uid));
        self.writer.run("deleting a request", cost, move |db| requests::delete(db, uid)).await
    }

    async fn claim(&self, claim: Claim) -> Result<ClaimOutcome, StoreError> {
        self.writer
            .run("claiming a request", Cost::of_request(claim.uid), move |db| {
                requests::claim(db, &claim)
            })
            .await
    }

    async fn append(&self, append: Append) -> Result<AppendOutcome, StoreError> {
        check_appended(&append.events)?;
        let checkpoint = append.checkpoint.as_ref().map_or(0, bytes::Bytes::len);
        let bytes = checkpoint + append.events.iter().map(Message::encoded_len).sum::<usize>();
        let cost = Cost::new(bytes, Payer::OwnerOf(append.uid));
        self.writer.run("appending events", cost, move |db| requests::append(db, &append)).await
    }

    async fn cancel(
        &self,
        uid: Uid,
        reason: String,
        now: Timestamp,
    ) -> Result<CancelOutcome, StoreError> {
        self.writer
            .run("cancelling a request", Cost::of_request(uid), move |db| {
                requests::cancel(db, uid, &reason, now)
            })
            .await
    }

    async fn renew_leases(
        &self,
        holder: String,
        leases: Vec<Lease>,
        until: Timestamp,
        _now: Timestamp,
    ) -> Result<Vec<LeaseRenewal>, StoreError> {
        self.writer
            .run("renewing leases", Cost::SERVER, move |db| {
                requests::renew(db, &holder, &leases, until)
            })
            .await
    }

    async fn expired_leases(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestRecord>, StoreError> {
        self.read("reading expired leases", move |db| requests::expired(db, now, limit)).await
    }

    async fn adopt(&self, adopt: Adopt) -> Result<Option<RequestRecord>, StoreError> {
        self.writer
            .run("adopting an attempt", Cost::of_request(adopt.lease.uid), move |db| {
                requests::adopt(db, &adopt)
            })
            .await
    }

    async fn overdue_requests(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<Vec<RequestRecord>, StoreError> {
        self.read("reading overdue requests", move |db| queue::overdue(db, now, limit)).await
    }

    async fn due_requests(&self, query: DueQuery) -> Result<DuePage, StoreError> {
        self.read("reading the queue", move |db| queue::due(db, &query)).await
    }

    async fn queue_ahead(
        &self,
        record: RequestRecord,
        limit: usize,
    ) -> Result<QueueAhead, StoreError> {
        self.read("reading the queue", move |db| queue::ahead(db, &record, limit)).await
    }

    async fn release_delayed(
        &self,
        now: Timestamp,
        limit: usize,
    ) -> Result<ReleasedRequests, StoreError> {
        let next_due = self.read("reading the queue", queue::next_delayed).await?;
        if next_due.is_none_or(|due| due > now) {
            return Ok(ReleasedRequests { count: 0, next_due });
        }
        self.writer
            .run("releasing delayed requests", Cost::SERVER, move |db| {
                queue::release_delayed(db, now, limit)
            })
            .await
    }

    async fn queue_stats(&self) -> Result<QueueStats, StoreError> {
        self.read("reading queue statistics", queue::stats).await
    }

    async fn read_events(
        &self,
        uid: Uid,
        after_seq: Seq,
        max_events: usize,
        max_bytes: usize,
    ) -> Result<EventPage, StoreError> {
        self.read_page("reading events", move |db| {
            requests::events(db, uid, after_seq, max_events, max_bytes)
        })
        .await
    }

    async fn update_connections(
        &self,
        opened: Vec<ConnectionRecord>,
        closed: Vec<Uid>,
    ) -> Result<(), StoreError> {
        let bytes = CONNECTION_BYTES * (opened.len() + closed.len());
        let cost = Cost::new(bytes, Payer::Server);
        self.writer
            .run("updating connections", cost, move |db| connections::update(db, &opened, &closed))
            .await
    }

    async fn renew_gateway(&self, gateway: String, until: Timestamp) -> Result<(), StoreError> {
        self.writer
            .run("renewing a gateway", Cost::SERVER, move |db| {
                connections::renew_gateway(db, &gateway, until)
            })
            .await
    }

    async fn list_connections(
        &self,
        tenant: String,
        user: Option<String>,
        after: Option<Uid>,
        limit: usize,
        now: Timestamp,
    ) -> Result<ConnectionPage, StoreError> {
        self.read_page("listing connections", move |db| {
            connections::list(db, &tenant, user.as_deref(), after, limit, now)
        })
        .await
    }

    async fn save_actions(
        &self,
        actions: Vec<DeclaredAction>,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let bytes = actions.iter().map(|declared| declared.action.encoded_len()).sum();
        let cost = Cost::new(bytes, Payer::Server);
        self.writer.run("saving actions", cost, move |db| actions::save(db, &actions, now)).await
    }

    async fn list_actions(&self, since: Timestamp) -> Result<Vec<DeclaredAction>, StoreError> {
        self.read("reading actions", move |db| actions::list(db, since)).await
    }

    async fn back_up(&self) -> Result<BackupOutcome, StoreError> {
        self.backups.create(self.readers.path.clone()).await
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.writer.run("checking the store", Cost::SERVER, |db| schema::write_probe(db)).await
    }
}
