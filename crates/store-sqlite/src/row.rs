//! Converts database rows to records, and values of records to columns.

use bytes::Bytes;
use prost::Message;
use rusqlite::{Row, types::Type};
use streamer_core::{AttemptNumber, RequestState, Seq, Timestamp, Uid};
use streamer_proto::{common::v1::OutputSummary, internal::v1::EventBatch};

use super::checksum;
use streamer_store::{Owner, RequestRecord, check_events};

/// Columns that [`record`] reads, in this order.
pub(super) const COLUMNS: &str = "uid, client_id, tenant, user, action, state, attempt, last_seq, attempt_seq, priority, \
     create_time, start_time, finish_time, not_before, deadline, progress, metadata, \
     cancel_reason, error, output_chunks, output_sha256, redrive_of, trace_parent, close_by, \
     trace_state, crc, failed_attempts";

pub(super) fn record(row: &Row<'_>) -> rusqlite::Result<RequestRecord> {
    let chunks: Option<i64> = row.get(19)?;
    let sha256: Option<Vec<u8>> = row.get(20)?;
    let record = RequestRecord {
        uid: uid(row, 0)?,
        client_id: row.get(1)?,
        owner: Owner { tenant: row.get(2)?, user: row.get(3)? },
        action: row.get(4)?,
        state: state(row, 5)?,
        attempt: attempt(row, 6)?,
        failed_attempts: row.get(26)?,
        last_seq: seq(row, 7)?,
        attempt_seq: seq(row, 8)?,
        priority: row.get(9)?,
        create_time: Timestamp::from_millis(row.get(10)?),
        start_time: optional_time(row, 11)?,
        finish_time: optional_time(row, 12)?,
        not_before: Timestamp::from_millis(row.get(13)?),
        deadline: optional_time(row, 14)?,
        progress: message(row, 15)?,
        metadata: row.get::<_, Option<Vec<u8>>>(16)?.map(Bytes::from),
        cancel_reason: row.get(17)?,
        error: message(row, 18)?,
        output: chunks
            .map(|chunks| OutputSummary { chunks, sha256: sha256.unwrap_or_default().into() }),
        redrive_of: match row.get_ref(21)? {
            rusqlite::types::ValueRef::Null => None,
            _ => Some(uid(row, 21)?),
        },
        trace_parent: row.get(22)?,
        close_by: optional_time(row, 23)?,
        trace_state: row.get(24)?,
    };
    verify(row, 25, || checksum::of_request(&record))?;
    Ok(record)
}

/// Verifies the checksum in the given column, if the row has one.
pub(super) fn verify(
    row: &Row<'_>,
    column: usize,
    checksum: impl FnOnce() -> u32,
) -> rusqlite::Result<()> {
    match row.get::<_, Option<u32>>(column)? {
        Some(expected) if expected != checksum() => {
            Err(corrupt(column, Type::Blob, "checksum mismatch".into()))
        }
        _ => Ok(()),
    }
}

pub(super) fn state_number(state: RequestState) -> i64 {
    match state {
        RequestState::Queued => 0,
        RequestState::Running => 1,
        RequestState::Succeeded => 2,
        RequestState::Failed => 3,
        RequestState::Cancelled => 4,
    }
}

pub(super) fn state(row: &Row<'_>, column: usize) -> rusqlite::Result<RequestState> {
    let number: i64 = row.get(column)?;
    RequestState::ALL
        .iter()
        .copied()
        .find(|state| state_number(*state) == number)
        .ok_or_else(|| corrupt(column, Type::Integer, format!("invalid state {number}")))
}

pub(super) fn seq(row: &Row<'_>, column: usize) -> rusqlite::Result<Seq> {
    Seq::from_i64(row.get(column)?).map_err(|rule| out_of_range(row, column, &rule.to_string()))
}

pub(super) fn attempt(row: &Row<'_>, column: usize) -> rusqlite::Result<AttemptNumber> {
    AttemptNumber::from_i64(row.get(column)?)
        .map_err(|rule| out_of_range(row, column, &rule.to_string()))
}

fn out_of_range(row: &Row<'_>, column: usize, rule: &str) -> rusqlite::Error {
    let name = row.as_ref().column_name(column).unwrap_or("column");
    corrupt(column, Type::Integer, format!("{name}: {rule}"))
}

pub(super) fn uid(row: &Row<'_>, column: usize) -> rusqlite::Result<Uid> {
    let bytes = row.get_ref(column)?.as_blob()?;
    Uid::from_slice(bytes)
        .ok_or_else(|| corrupt(column, Type::Blob, format!("invalid ID of {} bytes", bytes.len())))
}

/// Reads a batch of events from the columns `batch`, `last_seq` and `crc`.
pub(super) fn batch(row: &Row<'_>, uid: Uid) -> rusqlite::Result<EventBatch> {
    let column = 0;
    let bytes = row.get_ref(column)?.as_blob()?;
    let last_seq = seq(row, 1)?;
    verify(row, 2, || checksum::of_batch(uid, last_seq, bytes))?;
    let bytes = Bytes::copy_from_slice(bytes);
    let invalid = |reason: String| corrupt(column, Type::Blob, reason);
    let batch = EventBatch::decode(bytes).map_err(|error| invalid(error.to_string()))?;
    check_events(&batch.events).map_err(|error| invalid(error.to_string()))?;
    Ok(batch)
}

pub(super) fn message<M: Message + Default>(
    row: &Row<'_>,
    column: usize,
) -> rusqlite::Result<Option<M>> {
    let Some(bytes) = row.get_ref(column)?.as_blob_or_null()? else { return Ok(None) };
    let decoded =
        M::decode(bytes).map_err(|error| corrupt(column, Type::Blob, error.to_string()))?;
    Ok(Some(decoded))
}

fn optional_time(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<Timestamp>> {
    Ok(row.get::<_, Option<i64>>(column)?.map(Timestamp::from_millis))
}

fn corrupt(column: usize, kind: Type, reason: String) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, kind, reason.into())
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::*;

    fn read<T>(
        query: &str,
        read: impl FnOnce(&Row<'_>, usize) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let connection = Connection::open_in_memory().unwrap();
        connection.query_row(query, [], |row| read(row, 0))
    }

    #[test]
    fn numbers_of_events_and_attempts_are_read() {
        assert_eq!(read("SELECT 7 AS last_seq", seq), Ok(Seq::from(7)));
        assert_eq!(read("SELECT 2 AS attempt", attempt), Ok(AttemptNumber::from(2)));
    }

    #[test]
    fn a_number_out_of_range_is_reported_with_its_column() {
        let rejected = read("SELECT -1 AS last_seq", seq).unwrap_err().to_string();
        assert!(
            rejected.contains("last_seq: must be 0 to 9223372036854775807, is -1"),
            "{rejected}"
        );
        let rejected = read("SELECT 2147483648 AS attempt", attempt).unwrap_err().to_string();
        assert!(rejected.contains("attempt: must be 0 to 2147483647, is 2147483648"), "{rejected}");
    }

    #[test]
    fn a_batch_with_a_number_out_of_range_is_corrupt() {
        // An `EventBatch` with one event, whose `seq` is 7 and whose `attempt` is 2 or -1.
        let good = "SELECT x'0A0408071002', 7, NULL";
        let bad = "SELECT x'0A0D080710FFFFFFFFFFFFFFFFFF01', 7, NULL";
        let batch = |query| read(query, |row, _| batch(row, Uid::first_of(Timestamp::default())));
        assert_eq!(batch(good).unwrap().events[0].attempt, 2);
        let rejected = batch(bad).unwrap_err().to_string();
        assert!(rejected.contains("event.attempt: must be 0 to 2147483647, is -1"), "{rejected}");
    }
}
