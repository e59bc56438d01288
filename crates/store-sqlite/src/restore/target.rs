//! Data folder of a restore.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use super::{
    error::{RestoreError, file_error},
    files,
};

/// Data folder of a restore, locked. Unless the restore is complete, dropping it removes the folders and the lock file
/// that did not exist before.
pub(super) struct Target {
    /// Folders that did not exist, innermost first.
    new_folders: Vec<PathBuf>,
    /// Lock file, if it did not exist.
    new_lock: Option<PathBuf>,
    lock: Option<File>,
}

impl Target {
    /// Creates the folder if it does not exist, and locks it.
    pub(super) fn open(data: &Path) -> Result<Self, RestoreError> {
        let folders = data.ancestors().filter(|folder| !folder.as_os_str().is_empty());
        let new_folders =
            folders.take_while(|folder| !folder.exists()).map(Path::to_owned).collect();
        let mut target = Self { new_folders, new_lock: None, lock: None };
        files::create_folder(data).map_err(|error| file_error(data, error))?;
        let path = data.join(files::LOCK);
        let is_new = !path.exists();
        target.lock = Some(files::lock(data)?);
        target.new_lock = is_new.then_some(path);
        Ok(target)
    }

    /// Keeps the folder, and unlocks it.
    pub(super) fn complete(mut self) {
        self.new_folders.clear();
        self.new_lock = None;
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // Before the lock is released, so that no other process uses the folder at the same time.
        if let Some(path) = &self.new_lock
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "failed to remove the lock file");
        }
        for folder in &self.new_folders {
            // A folder that a different process uses is not empty, and remains.
            drop(fs::remove_dir(folder));
        }
    }
}
