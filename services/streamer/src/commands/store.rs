//! `streamer store`: backs up the store of a running server, and restores backups.

use std::{
    fs::{self, File},
    future::poll_fn,
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    task::Poll,
};

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use serde_json::json;
use sha2::{Digest, Sha256};
use streamer_core::{Timestamp, hex};
use streamer_proto::{
    admin::v1::{BackupHeader, BackupRequest, BackupResponse, backup_response::Part},
    millis,
};
use streamer_store_sqlite::{RestoreError, RestoreStep, Restored, restore};
use tempfile::NamedTempFile;
use tokio::signal::unix::{SignalKind, signal};
use tonic::{Status, Streaming};

use crate::{
    Exit, arguments::CommonArguments, exit::UsageError, progress_bar::ProgressBar,
    terminal::print_line,
};

/// Arguments of `streamer store`.
#[derive(Args, Clone, Debug)]
pub(crate) struct StoreArguments {
    /// The command to run.
    #[command(subcommand)]
    pub(crate) command: StoreCommand,
}

/// Commands for the store.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum StoreCommand {
    /// Save a copy of a running server's store to a file.
    ///
    /// The file contains the state of one moment: all requests, payloads, results and event logs of all tenants. The
    /// server continues to work; it needs free disk space of the size of its store while the copy is made. Changes
    /// that are acknowledged after the start of the backup may be missing in it. The file appears only when it is
    /// complete and its checksum is verified. Only its owner can read it; keep it as safe as the data folder.
    ///
    /// The token needs permission `operator` until the end of the transfer. For a server on this machine, such a token
    /// is signed with the development key by default.
    ///
    /// Not in the file: the development key (dev-key.pem) and the service token (service-token) of the data folder, the
    /// configuration, and the audit log. Engine dynamodb has no such backups; use the point-in-time recovery of its
    /// tables.
    #[command(after_help = "Examples:
  streamer store backup monday.streamer
  streamer store backup monday.streamer --server http://10.0.0.7:8080 --token-file operator.jwt
  streamer store backup latest.streamer --force         replace the file, once the new backup is complete

To restore it:
  streamer store restore monday.streamer --data ./restored")]
    Backup {
        /// File to create.
        file: PathBuf,
        /// Replace the file if it exists.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        common: CommonArguments,
    },
    /// Create a data folder from a backup, without a server.
    ///
    /// Copies the file to the folder and checks the copy (structure, schema, checksums of all values, schema version)
    /// before it becomes the store; the folder is unchanged if the file is invalid. The folder is created if it does
    /// not exist; it must not contain a store. Start a server with it afterwards.
    ///
    /// Requests that were queued run; attempts that were running end as interrupted, and are retried if their action
    /// allows it. Requests that were accepted after the backup do not exist: submit them again with the same `id`.
    ///
    /// The folder gets no development key and no service token: a server with development keys creates a new key, and
    /// rejects tokens of the old one. Copy dev-key.pem and service-token from the old data folder to keep them.
    #[command(after_help = "Examples:
  streamer store restore monday.streamer --data ./restored
  streamer up --data ./restored")]
    Restore {
        /// Backup to restore.
        file: PathBuf,
        /// New data folder.
        #[arg(long, env = "STREAMER_DATA", value_name = "DIR")]
        data: PathBuf,
        /// Print one JSON object, even on a terminal.
        #[arg(long)]
        json: bool,
    },
}

pub(crate) async fn run(arguments: StoreArguments) -> anyhow::Result<Exit> {
    match arguments.command {
        StoreCommand::Backup { file, force, common } => {
            let interrupted = interruption()?;
            // Dropping the transfer removes the incomplete file.
            tokio::select! {
                saved = backup(&file, force, &common) => return saved.map(|()| Exit::Done),
                () = interrupted => {}
            }
            // After SIGHUP, the terminal may be closed.
            drop(writeln!(io::stderr(), "Interrupted; no backup was saved."));
            Ok(Exit::Interrupted)
        }
        StoreCommand::Restore { file, data, json } => {
            let prints_json = json || !io::stdout().is_terminal();
            restore_to(file, data, prints_json).await
        }
    }
}

/// Listens for the signals that end a command, and returns a future that completes with the first one.
fn interruption() -> io::Result<impl Future<Output = ()>> {
    let mut kinds = vec![SignalKind::interrupt(), SignalKind::terminate(), SignalKind::quit()];
    // A handler would replace the setting of `nohup`, with which a command survives the end of its terminal.
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    if !is_ignored(SignalKind::hangup(), &status) {
        kinds.push(SignalKind::hangup());
    }
    let mut signals = kinds.into_iter().map(signal).collect::<io::Result<Vec<_>>>()?;
    Ok(poll_fn(move |context| {
        match signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }))
}

/// Returns whether this process ignores a signal. `status` is its file `status` in `/proc`, which only Linux has.
fn is_ignored(kind: SignalKind, status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (kind.as_raw_value() - 1) & 1 == 1
}

async fn backup(path: &Path, force: bool, common: &CommonArguments) -> anyhow::Result<()> {
    if !force && path.exists() {
        let text = format!("{} exists; --force replaces it", path.display());
        return Err(UsageError(text).into());
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let cannot_write = || format!("cannot write {}", path.display());
    // Only its owner can access the file.
    let file = tempfile::Builder::new().prefix(".streamer-backup-").tempfile_in(folder);
    let mut file = file.with_context(cannot_write)?;
    let bar = if common.json { ProgressBar::hidden() } else { ProgressBar::on_stderr() };
    bar.start();
    bar.update(0.0, "the server is copying its store")?;
    let api = common.operator_api().await?;
    let failed = |status: Status| api.error(&status);
    let call = api.call(BackupRequest {});
    let mut parts = Parts(api.admin().backup(call).await.map_err(failed)?.into_inner());
    let Some(Part::Header(header)) = parts.next().await.map_err(failed)? else {
        bail!("unexpected response from the server: a backup begins with a header");
    };
    let mut progress = Progress::new(&header);
    let sha256 = loop {
        match parts.next().await.map_err(failed)? {
            Some(Part::Data(data)) => {
                progress.add(&data)?;
                file.write_all(&data).with_context(cannot_write)?;
                bar.update(progress.percentage(), "")?;
            }
            Some(Part::Trailer(trailer)) => break progress.finish(&trailer.sha256)?,
            Some(Part::Header(_)) | None => bail!("the backup is incomplete: the stream ended"),
        }
    };
    bar.clear();
    save(file, path, folder, force).with_context(cannot_write)?;
    let created = Timestamp::from_millis(header.create_time.as_ref().map_or(0, millis));
    if common.prints_json() {
        return print_line(json!({
            "file": path.display().to_string(), "size_bytes": header.size_bytes, "sha256": sha256,
            "schema_version": header.schema_version, "create_time": created.to_string(),
        }));
    }
    print_line(format!(
        "Saved {}: {} bytes, as of {created}, SHA-256 {sha256}",
        path.display(),
        header.size_bytes
    ))
}

/// Stream of a backup.
struct Parts(Streaming<BackupResponse>);

impl Parts {
    async fn next(&mut self) -> Result<Option<Part>, Status> {
        Ok(self.0.message().await?.and_then(|response| response.part))
    }
}

/// Data that was received, compared with the header and the trailer.
struct Progress {
    size: u64,
    received: u64,
    digest: Sha256,
}

impl Progress {
    fn new(header: &BackupHeader) -> Self {
        let size = u64::try_from(header.size_bytes).unwrap_or_default();
        Self { size, received: 0, digest: Sha256::new() }
    }

    fn add(&mut self, data: &[u8]) -> anyhow::Result<()> {
        self.received += data.len() as u64;
        ensure!(self.received <= self.size, "the backup has more than {} bytes", self.size);
        self.digest.update(data);
        Ok(())
    }

    fn percentage(&self) -> f64 {
        self.received as f64 * 100.0 / self.size.max(1) as f64
    }

    /// Compares the data with its size and checksum; returns the checksum as hexadecimal digits.
    fn finish(self, sha256: &[u8]) -> anyhow::Result<String> {
        let Self { size, received, digest } = self;
        ensure!(received == size, "the backup is incomplete: {received} of {size} bytes");
        let found = digest.finalize();
        ensure!(found[..] == *sha256, "the backup was corrupted in transit: SHA-256 mismatch");
        Ok(hex(sha256))
    }
}

/// Makes the file durable and gives it its name.
fn save(file: NamedTempFile, path: &Path, folder: &Path, force: bool) -> io::Result<()> {
    file.as_file().sync_all()?;
    let saved = if force { file.persist(path) } else { file.persist_noclobber(path) };
    saved.map_err(|failed| failed.error)?;
    File::open(folder)?.sync_all()
}

async fn restore_to(file: PathBuf, data: PathBuf, prints_json: bool) -> anyhow::Result<Exit> {
    let bar = ProgressBar::on_stderr();
    bar.start();
    let (source, target) = (file.clone(), data.clone());
    let restoring = tokio::task::spawn_blocking(move || {
        let restored = restore(&source, &target, |step| {
            let (percentage, message) = match step {
                RestoreStep::Copy => (0.0, "copying the backup"),
                RestoreStep::Check => (50.0, "checking the copy"),
            };
            // Only a bar on standard output can fail.
            drop(bar.update(percentage, message));
        });
        bar.clear();
        restored
    });
    let Restored { schema_version, size } = restoring.await?.map_err(|error| match error {
        RestoreError::HasStore(_) => UsageError(error.to_string()).into(),
        other => anyhow::Error::from(other),
    })?;
    let (file, data) = (file.display(), data.display());
    if prints_json {
        print_line(json!({
            "file": file.to_string(), "data": data.to_string(), "size_bytes": size,
            "schema_version": schema_version,
        }))?;
    } else {
        print_line(format!(
            "Restored {file} to {data}. To start a server: streamer up --data {data}"
        ))?;
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(size_bytes: i64) -> Progress {
        Progress::new(&BackupHeader { size_bytes, ..BackupHeader::default() })
    }

    #[test]
    fn ignored_signals_are_found_in_the_status_of_the_process() {
        let status =
            "SigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000004\n";
        assert!(is_ignored(SignalKind::hangup(), status));
        assert!(!is_ignored(SignalKind::quit(), status));
        assert!(!is_ignored(SignalKind::hangup(), ""));
    }

    #[test]
    fn a_complete_backup_has_the_announced_size_and_checksum() {
        let mut complete = progress(4);
        complete.add(b"ab").unwrap();
        assert!((complete.percentage() - 50.0).abs() < f64::EPSILON);
        complete.add(b"cd").unwrap();
        let sha256 = Sha256::digest(b"abcd");
        assert_eq!(complete.finish(&sha256).unwrap(), hex(&sha256));
    }

    #[test]
    fn a_backup_that_differs_from_its_header_or_trailer_is_rejected() {
        let sha256 = Sha256::digest(b"abcd");
        let mut short = progress(5);
        short.add(b"abcd").unwrap();
        assert!(short.finish(&sha256).unwrap_err().to_string().contains("4 of 5 bytes"));
        assert!(progress(3).add(b"abcd").unwrap_err().to_string().contains("more than 3"));
        let mut corrupt = progress(4);
        corrupt.add(b"abcx").unwrap();
        assert!(corrupt.finish(&sha256).unwrap_err().to_string().contains("SHA-256"));
    }
}
