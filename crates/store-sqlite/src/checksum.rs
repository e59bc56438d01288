//! CRC-32 checksums of stored values and their keys. SQLite detects corrupt structures, but not corrupt values.

use crc32fast::Hasher;
use streamer_core::{Seq, Timestamp, Uid, saturate};

use streamer_store::RequestRecord;

/// Returns the checksum of a payload or a checkpoint, and the UID of its request.
pub(super) fn of_value(uid: Uid, value: &[u8]) -> u32 {
    of_batch(uid, Seq::NONE, value)
}

/// Returns the checksum of a batch of events, the position of its last event, and the UID of its request.
pub(super) fn of_batch(uid: Uid, last_seq: Seq, value: &[u8]) -> u32 {
    let mut hasher = Hasher::new();
    hasher.update(&uid.to_bytes());
    hasher.update(&last_seq.as_i64().to_be_bytes());
    hasher.update(value);
    hasher.finalize()
}

/// Returns the checksum of the immutable fields of a request.
pub(super) fn of_request(record: &RequestRecord) -> u32 {
    let mut hasher = Hasher::new();
    let mut part = |bytes: Option<&[u8]>| {
        // The length is included, so that moving a byte from one field to the next changes the checksum.
        let length = bytes.map_or(-1, |bytes| saturate::to_i64(bytes.len()));
        hasher.update(&length.to_be_bytes());
        hasher.update(bytes.unwrap_or_default());
    };
    let texts = [&record.owner.tenant, &record.owner.user, &record.action];
    texts.into_iter().for_each(|text| part(Some(text.as_bytes())));
    part(Some(&record.uid.to_bytes()));
    part(record.client_id.as_deref().map(str::as_bytes));
    part(record.metadata.as_deref());
    part(record.redrive_of.map(Uid::to_bytes).as_ref().map(<[u8; 16]>::as_slice));
    part(record.trace_parent.as_deref().map(str::as_bytes));
    part(Some(&record.priority.to_be_bytes()));
    for time in [Some(record.create_time), record.deadline, record.close_by] {
        part(
            time.map(|time| Timestamp::as_millis(time).to_be_bytes())
                .as_ref()
                .map(<[u8; 8]>::as_slice),
        );
    }
    // Rows that schema version 2 wrote do not have this field.
    if let Some(state) = &record.trace_state {
        part(Some(state.as_bytes()));
    }
    hasher.finalize()
}
