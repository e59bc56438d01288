//! The files of the store in the file system: made for their owner only, and found again where they were.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

#[cfg(unix)]
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};

/// Read and write for the owner, nothing for others. SQLite gives the same to the files beside it.
#[cfg(unix)]
const PRIVATE_FILE: u32 = 0o600;
#[cfg(unix)]
const PRIVATE_FOLDER: u32 = 0o700;

/// Makes the data folder if it does not exist.
pub(super) fn make_folder(data: &Path) -> io::Result<()> {
    if data.is_dir() {
        return Ok(());
    }
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    builder.mode(PRIVATE_FOLDER);
    builder.create(data)?;
    // The folder's own entry must survive a crash too.
    let parent = match data.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)?.sync_all()
}

/// Opens a file that only its owner can read, and creates it if it does not exist. Removes the
/// permissions of others from a file of an earlier version.
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
        // Only the owner of a file can change its mode; the store works all the same.
        tracing::warn!(path = %path.display(), %error, "others can read a file of the store");
    }
    Ok(file)
}

/// The database and its write-ahead log, as they were when the store was opened. What is written to a file
/// that was removed is gone when the process ends.
pub(super) struct Files(Vec<(PathBuf, Identity)>);

#[cfg(unix)]
type Identity = (u64, u64);
#[cfg(not(unix))]
type Identity = ();

impl Files {
    /// Of this database, which is open and has been written to.
    pub(super) fn of(database: &Path) -> io::Result<Self> {
        let mut log = database.as_os_str().to_owned();
        log.push("-wal");
        let paths = [database.to_owned(), log.into()];
        let files = paths.into_iter().map(|path| identity(&path).map(|found| (path, found)));
        files.collect::<io::Result<_>>().map(Self)
    }

    /// Fails with the reason when one of them was removed or replaced.
    pub(super) fn check(&self) -> Result<(), String> {
        for (path, expected) in &self.0 {
            match identity(path) {
                Ok(found) if found == *expected => {}
                Ok(_) => return Err(format!("{} was replaced", path.display())),
                Err(error) => return Err(format!("{} is gone: {error}", path.display())),
            }
        }
        Ok(())
    }
}

fn identity(path: &Path) -> io::Result<Identity> {
    let metadata = fs::metadata(path)?;
    #[cfg(unix)]
    return Ok((metadata.dev(), metadata.ino()));
    #[cfg(not(unix))]
    return Ok(drop(metadata));
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_made_for_its_owner_and_an_existing_one_stays() {
        let base = std::env::temp_dir().join(format!("streamer-folder-{}", std::process::id()));
        let (old, made) = (base.join("old"), base.join("a/b"));
        fs::create_dir_all(&old).unwrap();
        fs::set_permissions(&old, fs::Permissions::from_mode(0o750)).unwrap();
        make_folder(&old).unwrap();
        make_folder(&made).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&old), mode(&made)), (0o750, 0o700));
        fs::remove_dir_all(&base).unwrap();
    }
}
