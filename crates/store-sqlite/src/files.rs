//! Creates the files of the store with access for their owner only, and detects their removal or replacement.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

#[cfg(unix)]
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};

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
    let parent = match data.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)?.sync_all()
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
