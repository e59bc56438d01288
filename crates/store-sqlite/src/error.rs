//! Converts errors to store errors.

use std::{io, path::Path};

use streamer_store::StoreError;

/// Converts an error of the file system.
pub(crate) fn io_error(doing: &'static str, path: &Path, error: &io::Error) -> StoreError {
    StoreError::Unavailable { doing, reason: format!("{}: {error}", path.display()) }
}

/// Converts an error of SQLite.
pub(crate) fn sqlite_error(doing: &'static str, error: &rusqlite::Error) -> StoreError {
    use rusqlite::ErrorCode;
    let reason = error.to_string();
    let corrupt = match error {
        rusqlite::Error::SqliteFailure(failure, _) => {
            matches!(failure.code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
        }
        rusqlite::Error::FromSqlConversionFailure(..) | rusqlite::Error::InvalidColumnType(..) => {
            true
        }
        _ => false,
    };
    if corrupt {
        StoreError::Corrupt { doing, reason }
    } else {
        StoreError::Unavailable { doing, reason }
    }
}
