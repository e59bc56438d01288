//! Copies the database while the store is in use.
//!
//! `VACUUM INTO` copies the state of one moment, in a read transaction on a separate connection, so that the writer
//! continues. The copy contains no free pages, and therefore no deleted data. Until the copy is complete, checkpoints
//! cannot empty the write-ahead log.
//!
//! The copy is removed from its folder before it is read. The system frees its disk space when it is closed, even if
//! the process is killed.

use std::{
    fs::File,
    io::{self, Read},
    os::raw::c_int,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use rusqlite::ErrorCode;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
};

use super::{
    error::{io_error, sqlite_error},
    files, schema,
};
use streamer_store::{Backup, BackupContent, BackupOutcome, StoreError};

/// Name of the copy in the data folder while it is incomplete.
pub(super) const FILE: &str = "backup.tmp";
/// Disk space that a backup leaves to the store, in bytes.
const RESERVED_BYTES: u64 = 64 * 1024 * 1024;
/// Number of steps of SQLite's virtual machine between checks of the disk space and of cancellation. A row takes about
/// three steps.
const STEPS_PER_CHECK: c_int = 100;
const DOING: &str = "making a backup";

/// Makes the backups of a store, one at a time.
pub(super) struct Backups {
    data: PathBuf,
    slot: Arc<Semaphore>,
}

impl Backups {
    /// Creates the backups of the store in the folder `data`.
    pub(super) fn new(data: &Path) -> Self {
        Self { data: data.to_owned(), slot: Arc::new(Semaphore::new(1)) }
    }

    /// Copies the database. Dropping the future cancels the copy.
    pub(super) async fn create(&self, database: PathBuf) -> Result<BackupOutcome, StoreError> {
        let Ok(slot) = self.slot.clone().try_acquire_owned() else {
            return Ok(BackupOutcome::InProgress);
        };
        let cancelled = CancelOnDrop::default();
        let (data, is_cancelled) = (self.data.clone(), cancelled.0.clone());
        let copy = spawn_blocking(move || {
            let folder = data.clone();
            let copy = Copy {
                database,
                target: data.join(FILE),
                is_cancelled,
                available: move || available_bytes(&folder),
            };
            match copy.create()? {
                Copied::File(file, size) => Ok(BackupOutcome::Created(Backup {
                    schema_version: schema::VERSION,
                    size,
                    content: Box::new(Content { file: Arc::new(file), _slot: slot }),
                })),
                Copied::OutOfSpace { required, available } => {
                    Ok(BackupOutcome::OutOfSpace { required, available })
                }
            }
        });
        copy.await.unwrap_or_else(|_| Err(unavailable("the task failed")))
    }
}

#[derive(Default)]
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Creation of a copy.
struct Copy<A> {
    database: PathBuf,
    target: PathBuf,
    is_cancelled: Arc<AtomicBool>,
    /// Returns the available disk space in bytes.
    available: A,
}

enum Copied {
    /// Complete copy, which has no name, and its size in bytes.
    File(File, u64),
    OutOfSpace {
        required: u64,
        available: u64,
    },
}

impl<A: FnMut() -> io::Result<u64> + Send + 'static> Copy<A> {
    fn create(self) -> Result<Copied, StoreError> {
        let Self { database, target, is_cancelled, mut available } = self;
        let failed = |error: &rusqlite::Error| sqlite_error(DOING, error);
        let file_failed = |error: &io::Error| io_error(DOING, &target, error);
        let mut db = schema::open_for_reading(&database).map_err(|e| failed(&e))?;
        let required = schema::size(&db).map_err(|e| failed(&e))?.saturating_add(RESERVED_BYTES);
        let before = available().map_err(|e| file_failed(&e))?;
        if before < required {
            return Ok(Copied::OutOfSpace { required, available: before });
        }
        let name = target.to_str().ok_or_else(|| unavailable("the path is not valid UTF-8"))?;
        let temporary = files::TemporaryFile::create(&target).map_err(|e| file_failed(&e))?;
        // A copy that does not survive this process need not survive a crash of the system.
        db.execute_batch("PRAGMA synchronous = OFF").map_err(|e| failed(&e))?;
        let last_available = Arc::new(AtomicU64::new(before));
        let latest = last_available.clone();
        let must_stop = move || {
            // If the space is unknown, a full disk is still reported by the write that fails.
            let found = available().unwrap_or(u64::MAX);
            latest.store(found, Ordering::Relaxed);
            found < RESERVED_BYTES || is_cancelled.load(Ordering::Relaxed)
        };
        db.progress_handler(STEPS_PER_CHECK, Some(must_stop)).map_err(|e| failed(&e))?;
        if let Err(error) = db.execute("VACUUM INTO ?1", [name]) {
            let available = last_available.load(Ordering::Relaxed);
            let is_full = error.sqlite_error_code() == Some(ErrorCode::DiskFull);
            if is_full || available < RESERVED_BYTES {
                return Ok(Copied::OutOfSpace { required, available });
            }
            return Err(failed(&error));
        }
        drop(db);
        let file = File::open(&target).map_err(|e| file_failed(&e))?;
        let size = file.metadata().map_err(|e| file_failed(&e))?.len();
        temporary.remove().map_err(|e| file_failed(&e))?;
        Ok(Copied::File(file, size))
    }
}

fn unavailable(reason: &str) -> StoreError {
    StoreError::Unavailable { doing: DOING, reason: reason.to_owned() }
}

/// Returns the disk space that is available in a folder, in bytes.
fn available_bytes(folder: &Path) -> io::Result<u64> {
    #[cfg(unix)]
    {
        let found = rustix::fs::statvfs(folder)?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }
    #[cfg(not(unix))]
    std::fs::metadata(folder).map(|_| u64::MAX)
}

/// Content of a copy.
struct Content {
    file: Arc<File>,
    /// Released after the file is closed.
    _slot: OwnedSemaphorePermit,
}

#[async_trait]
impl BackupContent for Content {
    async fn next(&mut self, max_bytes: usize) -> Result<Bytes, StoreError> {
        let file = self.file.clone();
        let read = spawn_blocking(move || {
            let mut bytes = Vec::with_capacity(max_bytes);
            (&*file).take(max_bytes as u64).read_to_end(&mut bytes).map(|_| Bytes::from(bytes))
        });
        match read.await {
            Ok(read) => read.map_err(|error| unavailable(&error.to_string())),
            Err(_) => Err(unavailable("the task failed")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rusqlite::Connection;
    use tempfile::TempDir;

    use super::*;

    /// Returns a folder with a database of more than 100 rows.
    fn database() -> (TempDir, PathBuf) {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("streamer.db");
        let db = schema::open_for_writing(&path).unwrap();
        schema::migrate(&db).unwrap();
        db.execute_batch(
            "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 500)
             INSERT INTO large_values SELECT n, zeroblob(3000) FROM numbers;",
        )
        .unwrap();
        (folder, path)
    }

    fn copy<A>(folder: &TempDir, database: &Path, available: A) -> Copy<A> {
        let (database, target) = (database.to_owned(), folder.path().join(FILE));
        Copy { database, target, is_cancelled: Arc::default(), available }
    }

    fn count(path: &Path) -> i64 {
        let db = Connection::open(path).unwrap();
        db.query_row("SELECT COUNT(*) FROM large_values", [], |row| row.get(0)).unwrap()
    }

    fn has_copy(folder: &TempDir) -> bool {
        let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        names.into_iter().any(|name| name.to_string_lossy().starts_with(FILE))
    }

    #[test]
    fn a_copy_is_complete_and_its_file_has_no_name() {
        let (folder, database) = database();
        // Deleted data is not in the copy.
        let db = Connection::open(&database).unwrap();
        db.execute_batch("DELETE FROM large_values WHERE id > 100").unwrap();
        let copied = copy(&folder, &database, || Ok(u64::MAX)).create().unwrap();
        let Copied::File(mut file, size) = copied else { panic!("no copy was made") };
        assert!(!has_copy(&folder));
        let saved = folder.path().join("saved");
        assert_eq!(io::copy(&mut file, &mut File::create(&saved).unwrap()).unwrap(), size);
        assert_eq!(count(&saved), 100);
        assert!(size < fs::metadata(&database).unwrap().len() / 2);
    }

    #[test]
    fn a_copy_leaves_disk_space_to_the_store() {
        let (folder, database) = database();
        let copied = copy(&folder, &database, || Ok(RESERVED_BYTES)).create().unwrap();
        let Copied::OutOfSpace { required, available } = copied else { panic!("a copy was made") };
        assert!(required > available && available == RESERVED_BYTES);
        // Other files use the space while the copy is made.
        let mut checks = 0;
        let shrinking = move || {
            checks += 1;
            Ok(if checks < 3 { u64::MAX } else { RESERVED_BYTES - 1 })
        };
        let copied = copy(&folder, &database, shrinking).create().unwrap();
        let Copied::OutOfSpace { available, .. } = copied else { panic!("a copy was made") };
        assert_eq!(available, RESERVED_BYTES - 1);
        assert!(!has_copy(&folder));
    }

    #[test]
    fn a_cancelled_copy_is_removed() {
        let (folder, database) = database();
        let copy = copy(&folder, &database, || Ok(u64::MAX));
        copy.is_cancelled.store(true, Ordering::Relaxed);
        assert!(matches!(copy.create(), Err(StoreError::Unavailable { .. })));
        assert!(!has_copy(&folder));
    }

    #[test]
    fn copies_of_a_killed_process_are_removed_when_the_store_is_opened() {
        let folder = TempDir::new().unwrap();
        for name in [FILE.to_owned(), format!("{FILE}-journal")] {
            fs::write(folder.path().join(name), "left").unwrap();
        }
        crate::open(folder.path()).unwrap();
        assert!(!has_copy(&folder));
    }
}
