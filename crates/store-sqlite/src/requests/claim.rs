//! Claims and adopts requests.

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, params};
use streamer_core::{RequestState, Uid};
use streamer_proto::common::v1::{Started, event::Kind};
use streamer_store::{Adopt, Claim, ClaimOutcome, Claimed, RequestRecord, log_event};

use super::{events, get, insert_events, payload};
use crate::{checksum, row, usage::Db};

pub(crate) fn claim(db: &Db<'_>, claim: &Claim) -> rusqlite::Result<ClaimOutcome> {
    let Some(mut record) = get(db, claim.uid)? else { return Ok(ClaimOutcome::NotClaimable) };
    if record.state == RequestState::Running && is_repetition(db, claim, &record)? {
        return repeated_claim(db, record);
    }
    if record.state != RequestState::Queued
        || (record.not_before > claim.now && is_delayed(db, claim.uid)?)
    {
        return Ok(ClaimOutcome::NotClaimable);
    }
    if record.is_overdue(claim.now) {
        return Ok(ClaimOutcome::Overdue(Box::new(record)));
    }
    let Some(payload) = payload(db, claim.uid)? else { return Ok(ClaimOutcome::NotClaimable) };
    record.state = RequestState::Running;
    record.attempt = record.attempt.next();
    record.last_seq = record.last_seq.next();
    record.attempt_seq = record.last_seq;
    record.start_time = Some(claim.now);
    record.progress = None;
    let started = log_event(
        record.last_seq,
        record.attempt,
        claim.now,
        Kind::Started(Started { worker: claim.worker_display_name().to_owned() }),
    );
    let bytes = insert_events(db, claim.uid, std::slice::from_ref(&started))?;
    db.prepare_cached(
        "UPDATE requests SET state = 1, attempt = ?2, last_seq = ?3, attempt_seq = ?3,
             start_time = ?4, lease_until = ?5, lease_holder = ?6, worker = ?7, progress = NULL,
             bytes = bytes + ?8
         WHERE uid = ?1",
    )?
    .execute(params![
        claim.uid.to_bytes(),
        record.attempt.as_u32(),
        record.last_seq.as_i64(),
        claim.now.as_millis(),
        claim.lease_until.as_millis(),
        claim.holder,
        claim.worker_identity(),
        bytes,
    ])?;
    db.change_usage(&record.owner, -1, bytes)?;
    let checkpoint = checkpoint(db, claim.uid)?;
    Ok(ClaimOutcome::Claimed(Box::new(Claimed { record, payload, checkpoint, started })))
}

fn checkpoint(db: &Connection, uid: Uid) -> rusqlite::Result<Option<Bytes>> {
    db.prepare_cached(
        "SELECT COALESCE((SELECT data FROM large_values WHERE id = large), data), crc
         FROM checkpoints WHERE uid = ?1",
    )?
    .query_row([uid.to_bytes()], |row| {
        let data = row.get::<_, Vec<u8>>(0)?;
        row::verify(row, 1, || checksum::of_value(uid, &data))?;
        Ok(Bytes::from(data))
    })
    .optional()
}

/// Returns whether a request was queued with a later due time, and has not been released since. A request without a delay
/// is due for every clock.
fn is_delayed(db: &Connection, uid: Uid) -> rusqlite::Result<bool> {
    db.prepare_cached("SELECT delayed FROM requests WHERE uid = ?1")?
        .query_row([uid.to_bytes()], |row| row.get(0))
}

/// Returns whether an earlier call, which `claim` repeats, started the running attempt.
fn is_repetition(db: &Connection, claim: &Claim, record: &RequestRecord) -> rusqlite::Result<bool> {
    let (holder, worker): (Option<String>, Option<String>) = db
        .prepare_cached("SELECT lease_holder, worker FROM requests WHERE uid = ?1")?
        .query_row([claim.uid.to_bytes()], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(claim.is_repetition(record.start_time, holder.as_deref(), worker.as_deref()))
}

/// Returns the attempt that an earlier call started.
fn repeated_claim(db: &Connection, record: RequestRecord) -> rusqlite::Result<ClaimOutcome> {
    let Some(payload) = payload(db, record.uid)? else { return Ok(ClaimOutcome::NotClaimable) };
    let after = record.attempt_seq.previous();
    let started = events(db, record.uid, after, 1, usize::MAX)?.events.pop();
    let Some(started) = started else { return Ok(ClaimOutcome::NotClaimable) };
    let checkpoint = checkpoint(db, record.uid)?;
    Ok(ClaimOutcome::Claimed(Box::new(Claimed { record, payload, checkpoint, started })))
}

pub(crate) fn adopt(db: &Connection, adopt: &Adopt) -> rusqlite::Result<Option<RequestRecord>> {
    let changed = db
        .prepare_cached(
            "UPDATE requests SET lease_holder = ?4, lease_until = MAX(lease_until, ?5)
             WHERE uid = ?1 AND state = 1 AND attempt = ?2 AND worker = ?3",
        )?
        .execute(params![
            adopt.lease.uid.to_bytes(),
            adopt.lease.attempt.as_u32(),
            adopt.worker_identity,
            adopt.holder,
            adopt.lease_until.as_millis()
        ])?;
    if changed == 1 { get(db, adopt.lease.uid) } else { Ok(None) }
}
