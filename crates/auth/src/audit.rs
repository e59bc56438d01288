//! The audit log: which caller changed what, from where, and which calls were refused.
//!
//! Recorded are calls that change something beyond submitting one's own work (cancel, redrive, delete,
//! send, disconnect), every gRPC call of an operator, and every call that is refused because its token
//! is not valid or a permission is missing. Each is one line of JSON, written by a dedicated thread: a
//! slow disk delays no call. Records that it cannot keep up with are counted.

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

use crate::warn_if_others_can_read;

/// Records that wait to be written at most.
const MAX_WAITING: usize = 4096;
/// Refusals of one tenant that are recorded in one second at most, and of callers without a valid token,
/// so that no caller can fill the disk or hide the records of others.
const MAX_REFUSALS: u32 = 50;
/// Tenants whose refusals are recorded in one second at most.
const MAX_TENANTS: usize = 100;
/// Longest text of a caller in a record, in bytes.
const MAX_TEXT_BYTES: usize = 256;
/// In place of a file: standard error.
const STANDARD_ERROR: &str = "-";

/// Writes the audit log; clones write the same one.
#[derive(Clone)]
pub struct Audit(Option<Arc<Writer>>);

struct Writer {
    clock: Arc<dyn Clock>,
    lines: SyncSender<Line>,
    refusals: Mutex<Refusals>,
    on_dropped: Arc<dyn Fn() + Send + Sync>,
}

enum Line {
    Record(Vec<u8>),
    /// Everything before this is to be written; then the sender is dropped.
    Flush(SyncSender<()>),
}

/// How many refusals this second has seen, by tenant; `None` stands for callers without a valid token.
#[derive(Default)]
struct Refusals {
    second: i64,
    counts: HashMap<Option<String>, u32>,
    /// Those that were not recorded, since the last one that was.
    suppressed: u64,
}

/// One line of the log.
#[derive(Serialize)]
pub(crate) struct Record<'a> {
    /// Path of the method, or `/ws`.
    pub(crate) call: &'a str,
    /// Code of the outcome as gRPC has it, like `OK` or `PERMISSION_DENIED`.
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

/// What a call is about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Subject {
    /// The request, connection or user, as the caller names it.
    pub subject: String,
    /// Its owner, when that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

#[derive(Serialize)]
struct Stamped<'a> {
    time: String,
    #[serde(flatten)]
    record: Record<'a>,
    #[serde(skip_serializing_if = "is_zero")]
    suppressed: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Audit {
    /// Records nothing.
    #[must_use]
    pub fn off() -> Self {
        Self(None)
    }

    /// Appends to this file, which only its owner can read; `-` stands for standard error, and an
    /// empty path for no log. `on_dropped` is called for each record that is lost.
    ///
    /// # Errors
    /// The file cannot be opened.
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
            warn_if_others_can_read(path);
            Box::new(file)
        };
        let (lines, waiting) = sync_channel(MAX_WAITING);
        let on_dropped: Arc<dyn Fn() + Send + Sync> = Arc::new(on_dropped);
        let dropped = on_dropped.clone();
        thread::Builder::new()
            .name("audit".into())
            .spawn(move || write(output, &waiting, &*dropped))?;
        let refusals = Mutex::default();
        Ok(Self(Some(Arc::new(Writer { clock, lines, refusals, on_dropped }))))
    }

    pub(crate) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Records a call that was let through.
    pub(crate) fn record(&self, record: Record<'_>) {
        if let Some(writer) = &self.0 {
            writer.write(writer.clock.now(), record, 0);
        }
    }

    /// Records a call that was refused, unless there were too many within this second.
    pub(crate) fn refused(&self, record: Record<'_>) {
        let Some(writer) = &self.0 else { return };
        let now = writer.clock.now();
        let suppressed = writer.refusals.lock().one_more(record.tenant, now);
        if let Some(suppressed) = suppressed {
            writer.write(now, record, suppressed);
        }
    }

    /// Records that a WebSocket handshake was refused.
    pub fn refused_connection(&self, code: Code, reason: &str, from: Option<IpAddr>) {
        let (tenant, user, subject) = (None, None, None);
        let (call, outcome, reason) = ("/ws", code_name(code), Some(reason));
        self.refused(Record { call, outcome, reason, tenant, user, subject, from });
    }

    /// Waits until everything recorded before is written, or for `patience`.
    pub fn flush(&self, patience: Duration) {
        let Some(writer) = &self.0 else { return };
        let (written, is_written) = sync_channel::<()>(0);
        if writer.lines.try_send(Line::Flush(written)).is_err()
            || is_written.recv_timeout(patience) == Err(RecvTimeoutError::Timeout)
        {
            tracing::warn!("the last records of the audit log may not be written");
        }
    }
}

impl Writer {
    fn write(&self, now: Timestamp, mut record: Record<'_>, suppressed: u64) {
        record.reason = record
            .reason
            .map(|reason| &reason[..reason.floor_char_boundary(MAX_TEXT_BYTES.min(reason.len()))]);
        let stamped = Stamped { time: now.to_string(), record, suppressed };
        let Ok(mut line) = serde_json::to_vec(&stamped) else { return (self.on_dropped)() };
        line.push(b'\n');
        match self.lines.try_send(Line::Record(line)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => (self.on_dropped)(),
        }
    }
}

impl Refusals {
    /// Counts a refusal: how many before it were not recorded, or `None` if it is not to be either.
    fn one_more(&mut self, tenant: Option<&str>, now: Timestamp) -> Option<u64> {
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
        if *count >= MAX_REFUSALS {
            self.suppressed += 1;
            return None;
        }
        *count += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

impl Subject {
    /// The object that the caller names; a very long name is cut.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self { subject: cut(name.to_owned(), MAX_TEXT_BYTES), owner: None }
    }
}

fn write(mut output: Box<dyn Write + Send>, lines: &Receiver<Line>, on_dropped: &dyn Fn()) {
    let mut fails = false;
    while let Ok(first) = lines.recv() {
        let (mut flushed, mut batch, mut count) = (Vec::new(), Vec::new(), 0_usize);
        for line in std::iter::once(first).chain(lines.try_iter()).take(MAX_WAITING) {
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
            // What was written of it may end in the midst of a line; the next one begins a new line.
            (0..count).for_each(|_| on_dropped());
            drop(output.write_all(b"\n"));
        }
        if let (Err(error), false) = (&outcome, fails) {
            tracing::error!(%error, "the audit log cannot be written");
        }
        fails = outcome.is_err();
        drop(flushed);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};
    use streamer_core::ManualClock;

    use super::*;

    fn refusal(reason: &str) -> Record<'_> {
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
    fn records_are_lines_of_json_and_refusals_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        let clock = Arc::new(ManualClock::at(Timestamp::from_millis(0)));
        let audit = Audit::open(&path, clock.clone(), || panic!("none is dropped")).unwrap();
        for _ in 0..MAX_REFUSALS + 7 {
            audit.refused(refusal("no"));
        }
        clock.advance(Duration::from_secs(1));
        audit.refused(refusal("no"));
        audit.flush(Duration::from_secs(60));
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), MAX_REFUSALS as usize + 1);
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
    fn refusals_of_many_tenants_hide_none_of_callers_without_a_token() {
        let mut refusals = Refusals::default();
        let now = Timestamp::from_millis(1000);
        for tenant in 0..=MAX_TENANTS {
            let is_recorded = refusals.one_more(Some(&tenant.to_string()), now).is_some();
            assert_eq!(is_recorded, tenant < MAX_TENANTS);
        }
        assert_eq!(refusals.one_more(None, now), Some(1), "one before it was not recorded");
    }
}
