//! Creates the files of the store with access for their owner only, and detects their removal or replacement.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    path::{Path, PathBuf},
};

#[cfg(unix)]
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};

use super::error::io_error;
use streamer_store::StoreError;

/// Name of the database in the data folder.
pub(crate) const DATABASE: &str = "streamer.db";

/// Operation of this module, for error messages.
pub(super) const OPENING: &str = "opening the data folder";
/// Name of the lock file in the data folder.
pub(super) const LOCK: &str = "lock";
/// Suffixes of the files that SQLite keeps next to a database, and applies to a database with the same name.
const SQLITE_SUFFIXES: [&str; 3] = ["-journal", "-wal", "-shm"];
/// Mode of files: read and write access for the owner, no access for other users. SQLite creates its other files with
/// the same mode.
#[cfg(unix)]
const PRIVATE_FILE: u32 = 0o600;
/// Mode of folders: full access for the owner, no access for other users.
#[cfg(unix)]
const PRIVATE_FOLDER: u32 = 0o700;

/// Creates the data folder if it does not exist.
pub(super) fn create_folder(data: &Path) -> io::Result<()> {
    if data.is_dir() {
        return Ok(());
    }
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    builder.mode(PRIVATE_FOLDER);
    builder.create(data)?;
    // The directory entry of the folder must also survive a crash.
    sync_folder(match data.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    })
}

/// Makes the entries of a folder durable.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Locks the data folder. The operating system releases the lock when the returned file is closed.
pub(super) fn lock(data: &Path) -> Result<File, StoreError> {
    let failed = |error| io_error(OPENING, data, &error);
    let locked = || StoreError::Locked { path: data.display().to_string() };
    let path = data.join(LOCK);
    let lock = open_private(&path).map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(locked()),
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    // A failed restore removes its lock file while it holds the lock. A lock on a removed file excludes no process.
    let is_current = lock.metadata().is_ok_and(|metadata| {
        identity(&path).is_ok_and(|current| current == identity_of(&metadata))
    });
    if is_current { Ok(lock) } else { Err(locked()) }
}

/// Opens a file that only its owner can access, and creates it if it does not exist. Removes the permissions of other
/// users from a file that an earlier version created.
pub(super) fn open_private(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false);
    #[cfg(unix)]
    options.mode(PRIVATE_FILE);
    let file = options.open(path)?;
    #[cfg(unix)]
    if file.metadata()?.permissions().mode() & 0o077 != 0
        && let Err(error) = file.set_permissions(fs::Permissions::from_mode(PRIVATE_FILE))
    {
        // Only the owner of a file can change its mode; the store works without the change.
        tracing::warn!(
            path = %path.display(),
            %error,
            "a store file is readable by other users; its mode should be 600"
        );
    }
    Ok(file)
}

/// Temporary file of a database, which is removed when it is dropped, together with the other files of the database.
pub(super) struct TemporaryFile {
    path: PathBuf,
    file: File,
}

impl TemporaryFile {
    /// Creates an empty file that only its owner can access. Replaces the file of a process that was killed.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        remove_temporary(path)?;
        Ok(Self { path: path.to_owned(), file: open_private(path)? })
    }

    /// Returns the file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Removes the file. Returns an error if it cannot be removed.
    pub(super) fn remove(self) -> io::Result<()> {
        remove_temporary(&self.path)
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if let Err(error) = remove_temporary(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "failed to remove a temporary file");
        }
    }
}

/// Removes the temporary file of a database and the other files of the database, if they exist.
pub(super) fn remove_temporary(path: &Path) -> io::Result<()> {
    for path in [path.to_owned()].into_iter().chain(companions(path)) {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// Returns the paths of the files that SQLite keeps next to a database.
pub(super) fn companions(database: &Path) -> impl Iterator<Item = PathBuf> {
    SQLITE_SUFFIXES.into_iter().map(move |suffix| {
        let mut path = database.as_os_str().to_owned();
        path.push(suffix);
        path.into()
    })
}

/// Identities of the database and its write-ahead log when the store was opened. Data written to a removed file is lost
/// when the process exits.
pub(super) struct FileIdentities(Vec<(PathBuf, Identity)>);

#[cfg(unix)]
type Identity = (u64, u64);
#[cfg(not(unix))]
type Identity = ();

impl FileIdentities {
    /// Reads the identities of the files of `database`, which must be open and must have been written to.
    pub(super) fn read(database: &Path) -> io::Result<Self> {
        let mut log = database.as_os_str().to_owned();
        log.push("-wal");
        let paths = [database.to_owned(), log.into()];
        let files = paths.into_iter().map(|path| identity(&path).map(|found| (path, found)));
        files.collect::<io::Result<_>>().map(Self)
    }

    /// Returns an error with the reason if one of the files was removed or replaced.
    pub(super) fn check(&self) -> Result<(), String> {
        for (path, expected) in &self.0 {
            match identity(path) {
                Ok(found) if found == *expected => {}
                Ok(_) => return Err(format!("{} was replaced", path.display())),
                Err(error) => return Err(format!("{} is missing: {error}", path.display())),
            }
        }
        Ok(())
    }
}

fn identity(path: &Path) -> io::Result<Identity> {
    fs::metadata(path).map(|metadata| identity_of(&metadata))
}

#[cfg(unix)]
fn identity_of(metadata: &fs::Metadata) -> Identity {
    (metadata.dev(), metadata.ino())
}

#[cfg(not(unix))]
fn identity_of(_metadata: &fs::Metadata) -> Identity {}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_new_folder_is_private_and_an_existing_one_keeps_its_mode() {
        let base = std::env::temp_dir().join(format!("streamer-folder-{}", std::process::id()));
        let (old, created) = (base.join("old"), base.join("a/b"));
        fs::create_dir_all(&old).unwrap();
        fs::set_permissions(&old, fs::Permissions::from_mode(0o750)).unwrap();
        create_folder(&old).unwrap();
        create_folder(&created).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&old), mode(&created)), (0o750, 0o700));
        fs::remove_dir_all(&base).unwrap();
    }
}
