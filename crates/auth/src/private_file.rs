//! Files that contain secrets, in the data folder.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    path::Path,
    process,
    sync::atomic::{AtomicU32, Ordering},
};

/// Atomically creates a file that only its owner can read, unless it exists: if several processes call this
/// function at the same time, one process creates the file and the others find it.
///
/// # Errors
/// Returns an error if the file cannot be written.
pub fn create_private_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static TEMPORARY_FILES: AtomicU32 = AtomicU32::new(0);
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(folder)?;
    let number = TEMPORARY_FILES.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{}-{number}.new", process::id()));
    let written = write(&temporary, bytes).and_then(|()| match fs::hard_link(&temporary, path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        linked => linked,
    });
    let removed = fs::remove_file(&temporary);
    written.and(removed)?;
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

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn concurrent_creators_all_read_the_same_file() {
        let folder = std::env::temp_dir().join(format!("streamer-private-{}", process::id()));
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
        fs::remove_dir_all(&folder).unwrap();
    }
}
