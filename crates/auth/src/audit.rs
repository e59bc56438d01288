//! Audit log of changes, with their callers and the callers' addresses, and of rejected calls.
//!
//! The log records calls that make changes other than submissions of the caller's own work (cancel, redrive,
//! delete, send, disconnect), every gRPC call of an operator, and every call that is rejected because its
//! token is invalid or a permission is missing. Each record is one line of JSON. A dedicated thread writes the
//! records, so that a slow disk does not delay calls. If the thread falls behind, records are dropped and counted.

use std::{
    collections::HashMap,
    fs::OpenOptions,
    io::{self, Write},
    net::IpAddr,
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use serde::Serialize;
use streamer_core::{Clock, Timestamp, validate::cut};
use streamer_rpc::code_name;
use tonic::Code;

use crate::warn_if_readable_by_others;

/// Maximum number of records that are waiting to be written.
const QUEUE_CAPACITY: usize = 4096;
/// Maximum number of rejections that are recorded per second for each tenant, and for all callers without a
/// valid token together, so that no caller can fill the disk or suppress the records of other callers.
const MAX_REJECTIONS: u32 = 50;
/// Maximum number of tenants whose rejections are recorded per second.
const MAX_TENANTS: usize = 100;
/// Maximum size of text from a caller in a record, in bytes.
const MAX_TEXT_BYTES: usize = 256;
/// Path that represents standard error.
const STANDARD_ERROR: &str = "-";

/// Handle to the audit log. Clones share the log.
#[derive(Clone)]
pub struct Audit(Option<Arc<Writer>>);

struct Writer {
    clock: Arc<dyn Clock>,
    lines: SyncSender<Line>,
    rejections: Mutex<RejectionLimiter>,
    on_dropped: Arc<dyn Fn() + Send + Sync>,
}

enum Line {
    Record(Vec<u8>),
    /// Request to drop the sender when all earlier records are written.
    Flush(SyncSender<()>),
}

/// Counts the rejections of the current second by tenant; `None` represents callers without a valid token.
#[derive(Default)]
struct RejectionLimiter {
    second: i64,
    counts: HashMap<Option<String>, u32>,
    /// Number of rejections that were suppressed since the last recorded one.
    suppressed: u64,
}

/// Record of the audit log.
#[derive(Serialize)]
pub(crate) struct Record<'a> {
    /// Path of the gRPC method, or `/ws`.
    pub(crate) call: &'a str,
    /// gRPC code of the outcome, such as `OK` or `PERMISSION_DENIED`.
    pub(crate) outcome: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tenant: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) user: Option<&'a str>,
    #[serde(flatten)]
    pub(crate) subject: Option<Subject>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<IpAddr>,
}

/// Object that a call concerns.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Subject {
    /// ID of the request, connection or user, as specified by the caller.
    pub subject: String,
    /// Owner of the object, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

#[derive(Serialize)]
struct TimestampedRecord<'a> {
    time: String,
    #[serde(flatten)]
    record: Record<'a>,
    #[serde(skip_serializing_if = "is_zero")]
    suppressed: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde requires")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Audit {
    /// Returns a disabled audit log.
    #[must_use]
    pub fn off() -> Self {
        Self(None)
    }

    /// Opens the audit log for appending, in a file that only its owner can read; `-` means standard
    /// error, and an empty path disables the log. `on_dropped` is called for each dropped record.
    ///
    /// # Errors
    /// Returns an error if the file cannot be opened.
    pub fn open(
        path: &Path,
        clock: Arc<dyn Clock>,
        on_dropped: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Self> {
        if path.as_os_str().is_empty() {
            return Ok(Self::off());
        }
        let output: Box<dyn Write + Send> = if path.as_os_str() == STANDARD_ERROR {
            Box::new(io::stderr())
        } else {
            let mut options = OpenOptions::new();
            options.append(true).create(true);
            #[cfg(unix)]
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            let file = options.open(path)?;
            warn_if_readable_by_others(path);
            Box::new(file)
        };
        let (lines, queued) = sync_channel(QUEUE_CAPACITY);
        let on_dropped: Arc<dyn Fn() + Send + Sync> = Arc::new(on_dropped);
        let dropped = on_dropped.clone();
        thread::Builder::new()
            .name("audit".into())
            .spawn(move || write_lines(output, &queued, &*dropped))?;
        let rejections = Mutex::default();
        Ok(Self(Some(Arc::new(Writer { clock, lines, rejections, on_dropped }))))
    }

    pub(crate) fn is_enabled(&self) -> bool {
        self.0.is_some()
    }

    /// Records an accepted call.
    pub(crate) fn record(&self, record: Record<'_>) {
        if let Some(writer) = &self.0 {
            writer.write(writer.clock.now(), record, 0);
        }
    }

    /// Records a rejected call, unless too many were rejected in the current second.
    pub(crate) fn record_rejection(&self, record: Record<'_>) {
        let Some(writer) = &self.0 else { return };
        let now = writer.clock.now();
        let suppressed = writer.rejections.lock().admit(record.tenant, now);
        if let Some(suppressed) = suppressed {
            writer.write(now, record, suppressed);
        }
    }

    /// Records a rejected WebSocket handshake.
    pub fn record_rejected_connection(&self, code: Code, reason: &str, from: Option<IpAddr>) {
        let (tenant, user, subject) = (None, None, None);
        let (call, outcome, reason) = ("/ws", code_name(code), Some(reason));
        self.record_rejection(Record { call, outcome, reason, tenant, user, subject, from });
    }

    /// Waits until all earlier records are written, or until the timeout expires.
    pub fn flush(&self, timeout: Duration) {
        let Some(writer) = &self.0 else { return };
        let (written, is_written) = sync_channel::<()>(0);
        if writer.lines.try_send(Line::Flush(written)).is_err()
            || is_written.recv_timeout(timeout) == Err(RecvTimeoutError::Timeout)
        {
            tracing::warn!("timed out writing the audit log; the last records may be lost");
        }
    }
}

impl Writer {
    fn write(&self, now: Timestamp, mut record: Record<'_>, suppressed: u64) {
        record.reason = record
            .reason
            .map(|reason| &reason[..reason.floor_char_boundary(MAX_TEXT_BYTES.min(reason.len()))]);
        let record = TimestampedRecord { time: now.to_string(), record, suppressed };
        let Ok(mut line) = serde_json::to_vec(&record) else { return (self.on_dropped)() };
        line.push(b'\n');
        match self.lines.try_send(Line::Record(line)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => (self.on_dropped)(),
        }
    }
}

impl RejectionLimiter {
    /// Counts a rejection. Returns the number of rejections that were suppressed before it, or `None` if it is
    /// also suppressed.
    fn admit(&mut self, tenant: Option<&str>, now: Timestamp) -> Option<u64> {
        let second = now.as_millis().div_euclid(1000);
        if self.second != second {
            self.second = second;
            self.counts.clear();
        }
        let tenant = tenant.map(str::to_owned);
        let is_known = tenant.is_none() || self.counts.contains_key(&tenant);
        if !is_known && self.counts.len() >= MAX_TENANTS {
            self.suppressed += 1;
            return None;
        }
        let count = self.counts.entry(tenant).or_insert(0);
        if *count >= MAX_REJECTIONS {
            self.suppressed += 1;
            return None;
        }
        *count += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

impl Subject {
    /// Returns the object with the given ID; a very long ID is truncated.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self { subject: cut(name.to_owned(), MAX_TEXT_BYTES), owner: None }
    }
}

fn write_lines(mut output: Box<dyn Write + Send>, lines: &Receiver<Line>, on_dropped: &dyn Fn()) {
    let mut is_failing = false;
    while let Ok(first) = lines.recv() {
        let (mut flushed, mut batch, mut count) = (Vec::new(), Vec::new(), 0_usize);
        for line in std::iter::once(first).chain(lines.try_iter()).take(QUEUE_CAPACITY) {
            match line {
                Line::Record(line) => {
                    batch.extend(line);
                    count += 1;
                }
                Line::Flush(sender) => flushed.push(sender),
            }
        }
        let outcome = output.write_all(&batch).and_then(|()| output.flush());
        if outcome.is_err() {
            // A partial write may end within a line; the next record starts on a new line.
            (0..count).for_each(|_| on_dropped());
            drop(output.write_all(b"\n"));
        }
        if let (Err(error), false) = (&outcome, is_failing) {
            tracing::error!(%error, "failed to write the audit log; records are dropped");
        }
        is_failing = outcome.is_err();
        drop(flushed);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};
    use streamer_core::ManualClock;

    use super::*;

    fn rejection(reason: &str) -> Record<'_> {
        Record {
            call: "/a.B/C",
            outcome: "PERMISSION_DENIED",
            reason: Some(reason),
            tenant: Some("acme"),
            user: Some("a\"\nb"),
            subject: Some(Subject { subject: "r".into(), owner: Some("bob".into()) }),
            from: Some([127, 0, 0, 1].into()),
        }
    }

    #[test]
    fn records_are_lines_of_json_and_rejections_are_limited() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let clock = Arc::new(ManualClock::at(Timestamp::from_millis(0)));
        let audit =
            Audit::open(&path, clock.clone(), || panic!("no record may be dropped")).unwrap();
        for _ in 0..MAX_REJECTIONS + 7 {
            audit.record_rejection(rejection("no"));
        }
        clock.advance(Duration::from_secs(1));
        audit.record_rejection(rejection("no"));
        audit.flush(Duration::from_secs(60));
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), MAX_REJECTIONS as usize + 1);
        let first = json!({
            "time": "1970-01-01T00:00:00.000Z", "call": "/a.B/C", "outcome": "PERMISSION_DENIED",
            "reason": "no", "tenant": "acme", "user": "a\"\nb", "subject": "r", "owner": "bob",
            "from": "127.0.0.1",
        });
        assert_eq!(lines[0], first);
        assert_eq!(lines.last().unwrap()["suppressed"], json!(7));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn rejections_of_many_tenants_do_not_suppress_those_of_callers_without_a_token() {
        let mut rejections = RejectionLimiter::default();
        let now = Timestamp::from_millis(1000);
        for tenant in 0..=MAX_TENANTS {
            let is_recorded = rejections.admit(Some(&tenant.to_string()), now).is_some();
            assert_eq!(is_recorded, tenant < MAX_TENANTS);
        }
        assert_eq!(rejections.admit(None, now), Some(1), "the previous one was suppressed");
    }
}
