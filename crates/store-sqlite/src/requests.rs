//! State changes of requests and their logs. Each change reads the current state, and then performs the writes that
//! this state allows.

mod claim;
mod read;

use bytes::Bytes;
use prost::Message;
use rusqlite::{Connection, OptionalExtension, params};
use streamer_core::{AttemptNumber, OutputDigest, RequestState, Seq, Timestamp, Uid, saturate};
use streamer_proto::common::v1::{Accepted, Cancelled, Event, OutputSummary, event::Kind};

use super::{
    checksum, large_values, row,
    usage::{BATCH_BYTES, Db, REQUEST_BYTES},
};
pub(super) use claim::{adopt, claim};
pub(super) use read::{events, expired, find, get, list, payload, tenant};
use streamer_store::{
    Append, AppendOutcome, CancelOutcome, CreateOutcome, DeleteOutcome, EventNumbers, Lease,
    LeaseRenewal, LogHead, NewRequest, Owner, RequestRecord, Writer, log_event,
};

pub(super) fn create(db: &Db<'_>, new: &NewRequest) -> rusqlite::Result<CreateOutcome> {
    if let Some(existing) = find_existing(db, new)? {
        let (record, fingerprint) = existing;
        return Ok(if fingerprint == new.fingerprint {
            CreateOutcome::Existing(Box::new(record))
        } else {
            CreateOutcome::Conflict(Box::new(record))
        });
    }
    let kind = Kind::Accepted(Accepted { action: new.action.clone() });
    let accepted = log_event(Seq::FIRST, AttemptNumber::NONE, new.create_time, kind);
    let batch = encode_batch(std::slice::from_ref(&accepted));
    let metadata = new.metadata.as_ref().map_or(0, Bytes::len);
    let bytes = REQUEST_BYTES + new.payload.data.len() + metadata + BATCH_BYTES + batch.len();
    let mut used = db.usage_of(&new.owner)?;
    used.queued_of_tenant += 1;
    used.queued_of_user += 1;
    used.stored_bytes_of_tenant += bytes as u64;
    if let Some(limit) = new.quota.exceeded_by(used) {
        return Ok(CreateOutcome::OverQuota(limit));
    }
    let record = RequestRecord {
        uid: new.uid,
        client_id: new.client_id.clone(),
        owner: new.owner.clone(),
        action: new.action.clone(),
        state: RequestState::Queued,
        attempt: AttemptNumber::NONE,
        failed_attempts: 0,
        last_seq: Seq::FIRST,
        attempt_seq: Seq::NONE,
        priority: new.priority,
        create_time: new.create_time,
        start_time: None,
        finish_time: None,
        not_before: new.not_before,
        deadline: new.deadline,
        close_by: new.close_by,
        progress: None,
        metadata: new.metadata.clone(),
        cancel_reason: None,
        error: None,
        output: None,
        redrive_of: new.redrive_of,
        trace_parent: new.trace_parent.clone(),
        trace_state: new.trace_state.clone(),
    };
    db.prepare_cached(
        "INSERT INTO requests (uid, client_id, tenant, user, action, state, attempt, last_seq,
             attempt_seq, priority, create_time, not_before, deadline, close_by, expire_at,
             metadata, redrive_of, trace_parent, trace_state, fingerprint, crc, bytes, delayed)
         VALUES (?1, ?2, ?3, ?4, ?5, 0, 0, 1, 0, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15,
             ?16, ?17, ?18, ?19)",
    )?
    .execute(params![
        new.uid.to_bytes(),
        new.client_id,
        new.owner.tenant,
        new.owner.user,
        new.action,
        new.priority,
        new.create_time.as_millis(),
        new.not_before.as_millis(),
        new.deadline.map(Timestamp::as_millis),
        new.close_by.map(Timestamp::as_millis),
        [new.deadline, new.close_by].into_iter().flatten().min().map(Timestamp::as_millis),
        new.metadata.as_deref(),
        new.redrive_of.map(Uid::to_bytes),
        new.trace_parent,
        new.trace_state,
        new.fingerprint,
        checksum::of_request(&record),
        saturate::to_i64(bytes),
        new.not_before > new.create_time,
    ])?;
    let payload = large_values::insert(db, &new.payload.data)?;
    db.prepare_cached("INSERT INTO payloads VALUES (?1, ?2, ?3, ?4, ?5)")?.execute(params![
        new.uid.to_bytes(),
        new.payload.content_type,
        payload.inline,
        checksum::of_value(new.uid, &new.payload.data),
        payload.large,
    ])?;
    insert_batch(db, new.uid, Seq::FIRST, &batch)?;
    db.change_usage(&new.owner, 1, saturate::to_i64(bytes))?;
    Ok(CreateOutcome::Created(Box::new(record), Box::new(accepted), used))
}

/// Returns the stored request of a repeated submission: the request with the same client ID or, without a client ID,
/// with the same UID.
fn find_existing(
    db: &Connection,
    new: &NewRequest,
) -> rusqlite::Result<Option<(RequestRecord, Vec<u8>)>> {
    let with_fingerprint =
        |row: &rusqlite::Row<'_>| Ok((row::record(row)?, row.get("fingerprint")?));
    let columns = row::COLUMNS;
    if let Some(client_id) = &new.client_id {
        db.prepare_cached(&format!(
            "SELECT {columns}, fingerprint FROM requests
             WHERE tenant = ?1 AND user = ?2 AND client_id = ?3"
        ))?
        .query_row(params![new.owner.tenant, new.owner.user, client_id], with_fingerprint)
        .optional()
    } else {
        db.prepare_cached(&format!("SELECT {columns}, fingerprint FROM requests WHERE uid = ?1"))?
            .query_row([new.uid.to_bytes()], with_fingerprint)
            .optional()
    }
}

/// Columns that a change of an existing request depends on.
struct RequestHead {
    log: LogHead,
    cancel_reason: Option<String>,
    owner: Owner,
    bytes: i64,
}

fn request_head(db: &Connection, uid: Uid) -> rusqlite::Result<Option<RequestHead>> {
    db.prepare_cached(
        "SELECT state, attempt, last_seq, lease_until, cancel_reason, tenant, user, bytes
         FROM requests WHERE uid = ?1",
    )?
    .query_row([uid.to_bytes()], |row| {
        Ok(RequestHead {
            log: LogHead {
                state: row::state(row, 0)?,
                attempt: row::attempt(row, 1)?,
                last_seq: row::seq(row, 2)?,
                lease_until: Timestamp::from_millis(row.get::<_, Option<i64>>(3)?.unwrap_or(0)),
            },
            cancel_reason: row.get(4)?,
            owner: Owner { tenant: row.get(5)?, user: row.get(6)? },
            bytes: row.get(7)?,
        })
    })
    .optional()
}

pub(super) fn append(db: &Db<'_>, append: &Append) -> rusqlite::Result<AppendOutcome> {
    let Some(head) = request_head(db, append.uid)? else { return Ok(AppendOutcome::NotFound) };
    let applied = || AppendOutcome::Applied { cancel_reason: head.cancel_reason.clone() };
    let [first_seq, last_seq] =
        [append.events.first(), append.events.last()].map(|event| event.map(EventNumbers::seq));
    if head.log.may_contain(last_seq) && is_stored(db, append.uid, &append.events)? {
        return Ok(applied());
    }
    if let Some(fenced) = head.log.fence(append.writer, first_seq, append.now) {
        return Ok(fenced);
    }
    let mut bytes = insert_events(db, append.uid, &append.events)?;
    if let Some(checkpoint) = &append.checkpoint {
        bytes += replace_checkpoint(db, append.uid, checkpoint)?;
    }
    let is_queued = match append.events.last() {
        Some(last) => {
            set_state(db, append, last, bytes)?;
            match last.kind {
                Some(Kind::Retrying(_)) => true,
                Some(Kind::Succeeded(_) | Kind::Failed(_) | Kind::Cancelled(_)) => false,
                _ => head.log.state == RequestState::Queued,
            }
        }
        None => {
            db.prepare_cached("UPDATE requests SET bytes = bytes + ?2 WHERE uid = ?1")?
                .execute(params![append.uid.to_bytes(), bytes])?;
            head.log.state == RequestState::Queued
        }
    };
    let queued = i64::from(is_queued) - i64::from(head.log.state == RequestState::Queued);
    db.change_usage(&head.owner, queued, bytes)?;
    Ok(applied())
}

/// Stores the checkpoint. Returns the difference in bytes between its size and that of the previous checkpoint.
fn replace_checkpoint(db: &Connection, uid: Uid, checkpoint: &Bytes) -> rusqlite::Result<i64> {
    let previous = large_values::delete_of_checkpoint(db, uid)?;
    let value = large_values::insert(db, checkpoint)?;
    db.prepare_cached("INSERT OR REPLACE INTO checkpoints VALUES (?1, ?2, ?3, ?4)")?.execute(
        params![uid.to_bytes(), value.inline, checksum::of_value(uid, checkpoint), value.large],
    )?;
    Ok(saturate::to_i64(checkpoint.len()) - previous.unwrap_or(0))
}

/// Sets the state that results from the last event, and adds `bytes` to the size of the request.
fn set_state(db: &Connection, append: &Append, last: &Event, bytes: i64) -> rusqlite::Result<()> {
    let (uid, last_seq) = (append.uid.to_bytes(), last.seq().as_i64());
    let progress = append.events.iter().rev().find_map(|event| match &event.kind {
        Some(Kind::Progress(progress)) => Some(progress.encode_to_vec()),
        _ => None,
    });
    let finish = |state, error: Option<Vec<u8>>, output: Option<&OutputSummary>| {
        db.prepare_cached(
            "UPDATE requests SET state = ?2, last_seq = ?3, finish_time = ?4, error = ?5,
                 output_chunks = ?6, output_sha256 = ?7, progress = COALESCE(?8, progress),
                 lease_until = NULL, lease_holder = NULL, worker = NULL, bytes = bytes + ?9
             WHERE uid = ?1",
        )?
        .execute(params![
            uid,
            row::state_number(state),
            last_seq,
            append.now.as_millis(),
            error,
            output.map_or(0, |output| output.chunks),
            output.map(|output| &output.sha256[..]),
            progress,
            bytes,
        ])
    };
    match &last.kind {
        Some(Kind::Succeeded(succeeded)) => {
            finish(RequestState::Succeeded, None, succeeded.output.as_ref())?
        }
        Some(Kind::Failed(failed)) => {
            let error = failed.error.as_ref().map(Message::encode_to_vec);
            finish(RequestState::Failed, error, failed.output.as_ref())?
        }
        Some(Kind::Cancelled(cancelled)) => {
            finish(RequestState::Cancelled, None, cancelled.output.as_ref())?
        }
        Some(Kind::Retrying(retrying)) => {
            let retry_at = append.retry_at.unwrap_or(append.now);
            db.prepare_cached(
                "UPDATE requests SET state = 0, last_seq = ?2, not_before = ?3, progress = NULL,
                     lease_until = NULL, lease_holder = NULL, worker = NULL, expire_at = close_by,
                     bytes = bytes + ?4, delayed = ?5, failed_attempts = failed_attempts + ?6
                 WHERE uid = ?1",
            )?
            .execute(params![
                uid,
                last_seq,
                retry_at.as_millis(),
                bytes,
                retry_at > append.now,
                !retrying.released,
            ])?
        }
        _ => db
            .prepare_cached(
                "UPDATE requests SET last_seq = ?2, progress = COALESCE(?3, progress),
                     bytes = bytes + ?4
                 WHERE uid = ?1",
            )?
            .execute(params![uid, last_seq, progress, bytes])?,
    };
    Ok(())
}

pub(super) fn cancel(
    db: &Db<'_>,
    uid: Uid,
    reason: &str,
    now: Timestamp,
) -> rusqlite::Result<CancelOutcome> {
    let Some(mut record) = get(db, uid)? else { return Ok(CancelOutcome::NotFound) };
    match record.state {
        RequestState::Succeeded | RequestState::Failed | RequestState::Cancelled => {
            Ok(CancelOutcome::Ended(Box::new(record)))
        }
        RequestState::Running => {
            if record.cancel_reason.is_none() {
                db.prepare_cached("UPDATE requests SET cancel_reason = ?2 WHERE uid = ?1")?
                    .execute(params![uid.to_bytes(), reason])?;
                record.cancel_reason = Some(reason.to_owned());
            }
            Ok(CancelOutcome::Requested(Box::new(record)))
        }
        RequestState::Queued => {
            // The output of earlier attempts is void, so the final output is empty.
            let empty = OutputDigest::default();
            let output = OutputSummary { chunks: 0, sha256: empty.sha256().to_vec().into() };
            let cancelled = log_event(
                record.last_seq.next(),
                record.attempt,
                now,
                Kind::Cancelled(Cancelled {
                    reason: reason.to_owned(),
                    output: Some(output.clone()),
                }),
            );
            let append = Append {
                uid,
                writer: Writer::Queued(record.attempt),
                events: vec![cancelled.clone()],
                checkpoint: None,
                retry_at: None,
                now,
            };
            let bytes = insert_events(db, uid, &append.events)?;
            set_state(db, &append, &cancelled, bytes)?;
            db.change_usage(&record.owner, -1, bytes)?;
            db.prepare_cached("UPDATE requests SET cancel_reason = ?2 WHERE uid = ?1")?
                .execute(params![uid.to_bytes(), reason])?;
            record.state = RequestState::Cancelled;
            record.last_seq = cancelled.seq();
            record.finish_time = Some(now);
            record.cancel_reason = Some(reason.to_owned());
            record.output = Some(output);
            Ok(CancelOutcome::Cancelled(Box::new(record), Box::new(cancelled)))
        }
    }
}

pub(super) fn renew(
    db: &Connection,
    holder: &str,
    leases: &[Lease],
    until: Timestamp,
) -> rusqlite::Result<Vec<LeaseRenewal>> {
    let mut update = db.prepare_cached(
        "UPDATE requests SET lease_until = MAX(lease_until, ?4)
         WHERE uid = ?1 AND state = 1 AND attempt = ?2 AND lease_holder = ?3",
    )?;
    let mut renewed = Vec::with_capacity(leases.len());
    for lease in leases {
        let changed = update.execute(params![
            lease.uid.to_bytes(),
            lease.attempt.as_u32(),
            holder,
            until.as_millis()
        ])?;
        let cancel_reason = request_head(db, lease.uid)?.and_then(|head| head.cancel_reason);
        renewed.push(LeaseRenewal { lease: *lease, held: changed == 1, cancel_reason });
    }
    Ok(renewed)
}

pub(super) fn delete(db: &Db<'_>, uid: Uid) -> rusqlite::Result<DeleteOutcome> {
    let Some(head) = request_head(db, uid)? else { return Ok(DeleteOutcome::Deleted) };
    if !head.log.state.is_terminal() {
        return Ok(DeleteOutcome::NotEnded);
    }
    db.change_usage(&head.owner, 0, -head.bytes)?;
    large_values::delete_of_request(db, uid)?;
    for statement in [
        "DELETE FROM events WHERE uid = ?1",
        "DELETE FROM payloads WHERE uid = ?1",
        "DELETE FROM checkpoints WHERE uid = ?1",
        "DELETE FROM requests WHERE uid = ?1",
    ] {
        db.prepare_cached(statement)?.execute([uid.to_bytes()])?;
    }
    Ok(DeleteOutcome::Deleted)
}

/// Stores a batch of events and returns its size in bytes.
fn insert_events(db: &Connection, uid: Uid, events: &[Event]) -> rusqlite::Result<i64> {
    let Some(last) = events.last() else { return Ok(0) };
    let batch = encode_batch(events);
    insert_batch(db, uid, last.seq(), &batch)?;
    Ok(saturate::to_i64(BATCH_BYTES + batch.len()))
}

/// Encodes an `EventBatch` event by event, to avoid copying the events.
fn encode_batch(events: &[Event]) -> Vec<u8> {
    let mut batch = Vec::new();
    for event in events {
        prost::encoding::message::encode(1, event, &mut batch);
    }
    batch
}

fn insert_batch(db: &Connection, uid: Uid, last_seq: Seq, batch: &[u8]) -> rusqlite::Result<()> {
    let crc = checksum::of_batch(uid, last_seq, batch);
    let batch = large_values::insert(db, batch)?;
    db.prepare_cached("INSERT INTO events VALUES (?1, ?2, ?3, ?4, ?5)")?
        .execute(params![uid.to_bytes(), last_seq.as_i64(), batch.inline, crc, batch.large])
        .map(drop)
}

/// Returns whether the log contains exactly the given events, for example after an earlier identical append.
fn is_stored(db: &Connection, uid: Uid, events: &[Event]) -> rusqlite::Result<bool> {
    let Some(first) = events.first() else { return Ok(true) };
    let page = read::events(db, uid, first.seq().previous(), events.len(), usize::MAX)?;
    Ok(page.events == events)
}
