//! CSV parsing: the delimiter, the names of the columns, and the rows of a table.

use std::collections::HashSet;

use csv::{ErrorKind, Reader, ReaderBuilder, StringRecord, Trim};
use streamer_handler::HandlerError;

/// Maximum number of columns. Because the size of each column's profile is also bounded, the result stays well
/// below the server's limit.
const MAX_COLUMNS: usize = 500;
/// Maximum length of a column's name, in characters.
const MAX_COLUMN_NAME_CHARS: usize = 256;
/// Delimiters that are detected; the first of equally frequent delimiters takes precedence.
const DELIMITERS: [u8; 4] = [b',', b';', b'\t', b'|'];

/// Table whose header has been read. White space around fields is ignored.
pub(super) struct Table<'a> {
    text: &'a str,
    delimiter: u8,
    names: Vec<String>,
}

impl<'a> Table<'a> {
    /// Detects the delimiter, unless it is specified, and reads the header.
    pub(super) fn open(text: &'a str, delimiter: Option<&str>) -> Result<Self, HandlerError> {
        // Some programs write a byte order mark at the start of a file.
        let text = text.trim_start_matches('\u{feff}');
        let delimiter = match delimiter {
            Some(specified) => parse_delimiter(specified)?,
            None => detect_delimiter(text),
        };
        let mut reader = reader(text, delimiter);
        let header = reader.headers().map_err(|error| invalid_csv(error.to_string()))?;
        if header.iter().all(str::is_empty) {
            return Err(invalid_csv("has no header: the first line must contain the column names"));
        }
        if header.len() > MAX_COLUMNS {
            let columns = header.len();
            return Err(invalid_csv(format!(
                "must have at most {MAX_COLUMNS} columns, has {columns}"
            )));
        }
        let too_long = |name: &str| name.chars().count() > MAX_COLUMN_NAME_CHARS;
        if let Some(column) = header.iter().position(too_long) {
            return Err(invalid_csv(format!(
                "must have column names of at most {MAX_COLUMN_NAME_CHARS} characters, column {} \
                 has a longer name",
                column + 1
            )));
        }
        Ok(Self { text, delimiter, names: unique_names(header) })
    }

    /// Returns the separator of fields: one ASCII character.
    pub(super) fn delimiter(&self) -> u8 {
        self.delimiter
    }

    /// Returns the names of the columns: not empty, and unique.
    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    /// Returns the rows after the header, starting with the first.
    pub(super) fn rows(&self) -> Rows<'a> {
        let reader = reader(self.text, self.delimiter);
        Rows { text: self.text, reader, row: StringRecord::new(), number: 0 }
    }
}

/// Reads rows into a buffer that is reused for each row.
pub(super) struct Rows<'a> {
    text: &'a str,
    reader: Reader<&'a [u8]>,
    row: StringRecord,
    number: u64,
}

impl Rows<'_> {
    /// Returns the next row, which has as many fields as there are columns.
    pub(super) fn next(&mut self) -> Result<Option<&StringRecord>, HandlerError> {
        match self.reader.read_record(&mut self.row) {
            Ok(true) => {
                self.number += 1;
                Ok(Some(&self.row))
            }
            Ok(false) => Ok(None),
            Err(error) => Err(invalid_row(self.text, self.number + 1, &error)),
        }
    }

    /// Returns the number of the row that was read last, from 1; 0 before the first row.
    pub(super) fn number(&self) -> u64 {
        self.number
    }
}

fn reader(text: &str, delimiter: u8) -> Reader<&[u8]> {
    ReaderBuilder::new().delimiter(delimiter).trim(Trim::All).from_reader(text.as_bytes())
}

fn parse_delimiter(text: &str) -> Result<u8, HandlerError> {
    match text.as_bytes() {
        [byte] if byte.is_ascii() && !matches!(byte, b'"' | b'\n' | b'\r') => Ok(*byte),
        _ => Err(HandlerError::invalid(
            "payload.delimiter",
            "must be one ASCII character other than a quotation mark or a line break",
        )),
    }
}

/// Returns the most frequent of [`DELIMITERS`] in the first line, outside quotes.
fn detect_delimiter(text: &str) -> u8 {
    let mut counts = [0; DELIMITERS.len()];
    let mut is_quoted = false;
    for byte in text.trim_start_matches(['\r', '\n']).bytes() {
        match byte {
            b'"' => is_quoted = !is_quoted,
            _ if is_quoted => {}
            b'\n' | b'\r' => break,
            _ => {
                if let Some(index) = DELIMITERS.iter().position(|delimiter| *delimiter == byte) {
                    counts[index] += 1;
                }
            }
        }
    }
    // `max_by_key` returns the last of several maxima, so the order is reversed.
    let most_frequent = (0..DELIMITERS.len()).rev().max_by_key(|index| counts[*index]);
    most_frequent.map_or(b',', |index| DELIMITERS[index])
}

/// Returns the names in the header, with `column_3` for a third column without a name, and `mass_2` for
/// a second column named `mass`.
fn unique_names(header: &StringRecord) -> Vec<String> {
    let mut used = HashSet::new();
    let mut unique = |position: usize, name: &str| {
        let base =
            if name.is_empty() { format!("column_{}", position + 1) } else { name.to_owned() };
        let mut name = base.clone();
        let mut occurrence = 1;
        while !used.insert(name.clone()) {
            occurrence += 1;
            name = format!("{base}_{occurrence}");
        }
        name
    };
    header.iter().enumerate().map(|(position, name)| unique(position, name)).collect()
}

/// Returns the error for an invalid row, with its row number and its line number: a row can contain line breaks,
/// and empty lines are not rows.
fn invalid_row(text: &str, number: u64, error: &csv::Error) -> HandlerError {
    match error.kind() {
        ErrorKind::UnequalLengths { pos, expected_len, len } => {
            let start = pos.as_ref().map_or(0, |position| position.byte() as usize);
            let line = line_at(text, start);
            let noun = if *len == 1 { "field" } else { "fields" };
            invalid_csv(format!(
                "row {number} (line {line}) has {len} {noun}, the header has {expected_len}"
            ))
        }
        _ => invalid_csv(format!("row {number} cannot be read: {error}")),
    }
}

/// Returns the line of the row that starts at `start`, or after the line breaks at `start`: the position from
/// the csv crate is the end of the previous row.
fn line_at(text: &str, start: usize) -> usize {
    let (before, after) = text.split_at_checked(start).unwrap_or(("", text));
    let breaks = &after[..after.len() - after.trim_start_matches(['\r', '\n']).len()];
    1 + before.matches('\n').count() + breaks.matches('\n').count()
}

fn invalid_csv(rule: impl Into<String>) -> HandlerError {
    HandlerError::invalid("payload.csv", rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        Table::open(text, None).map_err(|error| error.to_string()).unwrap().names
    }

    fn error_of(text: &str, delimiter: Option<&str>) -> String {
        let read_all = || {
            let mut rows = Table::open(text, delimiter)?.rows();
            while rows.next()?.is_some() {}
            Ok::<_, HandlerError>(())
        };
        read_all().unwrap_err().to_string()
    }

    #[test]
    fn the_most_frequent_delimiter_outside_quotes_is_detected() {
        for (text, delimiter) in [
            ("a,b;c,d\n", b','),
            ("a;b;c,d\n1,2,3,4,5,6", b';'),
            ("a\tb", b'\t'),
            ("a|b|c\r\n,,,,", b'|'),
            ("\"a,b,c,d\";e", b';'),
            ("a;b,c", b','),
            ("single", b','),
            ("\n\na;b", b';'),
        ] {
            assert_eq!(detect_delimiter(text), delimiter, "{text}");
        }
    }

    #[test]
    fn empty_and_repeated_names_are_made_unique() {
        assert_eq!(names("a,b,,\n"), ["a", "b", "column_3", "column_4"]);
        assert_eq!(names("a,a,a,a_2"), ["a", "a_2", "a_3", "a_2_2"]);
        assert_eq!(names("column_2,"), ["column_2", "column_2_2"]);
        assert_eq!(names("\u{feff}  a ,\"b \"\"c\"\"\"\n"), ["a", "b \"c\""]);
    }

    #[test]
    fn a_row_with_the_wrong_number_of_fields_is_reported_with_its_line() {
        let text = "a,b,c\n1,2,3\n\"1\nmore\",2,3\n\n1,2\n";
        assert_eq!(
            error_of(text, None),
            "VALIDATION_ERROR: payload.csv: row 3 (line 6) has 2 fields, the header has 3"
        );
        let text = "\u{feff}a,b\r\n1,2\r\n\r\n\"1\r\n2\"\r\n";
        assert!(error_of(text, None).contains("row 2 (line 4) has 1 field, the header has 2"));
        assert!(
            error_of("a,b\n1\n", None).contains("row 1 (line 2) has 1 field, the header has 2")
        );
        assert!(error_of("a,b\n1,2,3\n", None).contains("has 3 fields, the header has 2"));
    }

    #[test]
    fn a_missing_or_too_large_header_is_rejected() {
        for text in ["", "\n\n", "  \n1\n", ",,\n1,2,3"] {
            assert!(error_of(text, None).contains("payload.csv: has no header"), "{text:?}");
        }
        let wide = vec!["x"; 501].join(",");
        assert!(error_of(&wide, None).contains("must have at most 500 columns, has 501"));
        let long = format!("a,{}", "é".repeat(257));
        assert!(error_of(&long, None).contains("column 2 has a longer name"));
    }

    #[test]
    fn a_specified_delimiter_is_used_or_rejected() {
        let table = Table::open("a:b,c\n", Some(":")).map_err(|error| error.to_string()).unwrap();
        assert_eq!(table.names(), ["a", "b,c"]);
        for delimiter in ["", ",,", "é", "\"", "\n"] {
            assert!(
                error_of("a,b", Some(delimiter)).contains("payload.delimiter: must be one ASCII")
            );
        }
    }
}
