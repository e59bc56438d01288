//! Files that contain secrets, in the data folder.

use std::{
    fs::{self, DirBuilder},
    io::{self, Write},
    path::Path,
};

use tempfile::NamedTempFile;

/// Atomically creates a file that only its owner can read, unless it exists: if several processes call this
/// function at the same time, one process creates the file and the others find it.
///
/// # Errors
/// Returns an error if the file cannot be written.
pub fn create_private_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(folder)?;
    // Only its owner can access the temporary file.
    let mut file = NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    match file.persist_noclobber(path) {
        Err(failed) if failed.error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(failed.error);
        }
        Ok(_) | Err(_) => {}
    }
    fs::File::open(folder)?.sync_all()
}

/// Logs a warning if users other than the owner can read a file that contains a secret.
pub fn warn_if_readable_by_others(path: &Path) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The caller reads the file next, which reports the error.
        let Ok(metadata) = fs::metadata(path) else { return };
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            let mode = format!("{mode:03o}");
            tracing::warn!(
                path = %path.display(),
                mode,
                "a file that contains a secret is readable by other users; set its mode to 600"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn concurrent_creators_all_read_the_same_file() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("data");
        let path = folder.join("secret");
        let create = |number: u8| {
            create_private_file(&path, &[number; 32]).unwrap();
            fs::read(&path).unwrap()
        };
        let found: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|n| scope.spawn(move || create(n))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(found.iter().all(|one| *one == found[0] && one.len() == 32));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "no temporary file is left");
    }
}
