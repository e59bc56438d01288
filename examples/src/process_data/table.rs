//! A CSV text as a table: its delimiter, the names of its columns, its rows.

use std::collections::HashSet;

use csv::{ErrorKind, Reader, ReaderBuilder, StringRecord, Trim};
use streamer_handler::HandlerError;

/// Most columns of a table: with each column's profile bounded too, the result stays well below
/// what a server takes.
const MAX_COLUMNS: usize = 500;
/// Longest name of a column, in characters.
const MAX_COLUMN_NAME_CHARS: usize = 256;
/// What is tried as delimiter; the first wins when several are equally frequent.
const DELIMITERS: [u8; 4] = [b',', b';', b'\t', b'|'];

/// A table whose header is read. White space around fields does not belong to them.
pub(super) struct Table<'a> {
    text: &'a str,
    delimiter: u8,
    names: Vec<String>,
}

impl<'a> Table<'a> {
    /// Finds the delimiter, unless it is given, and reads the header.
    pub(super) fn open(text: &'a str, delimiter: Option<&str>) -> Result<Self, HandlerError> {
        // Some programs begin a file with a byte order mark, which is no part of the first name.
        let text = text.trim_start_matches('\u{feff}');
        let delimiter = match delimiter {
            Some(given) => checked_delimiter(given)?,
            None => detected_delimiter(text),
        };
        let mut reader = reader(text, delimiter);
        let header = reader.headers().map_err(|error| invalid_csv(error.to_string()))?;
        if header.iter().all(str::is_empty) {
            return Err(invalid_csv("has no header: its first line must name the columns"));
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
                "must name its columns in at most {MAX_COLUMN_NAME_CHARS} characters, column {} \
                 has a longer name",
                column + 1
            )));
        }
        Ok(Self { text, delimiter, names: unique_names(header) })
    }

    /// What stands between fields: one ASCII character.
    pub(super) fn delimiter(&self) -> u8 {
        self.delimiter
    }

    /// The names of the columns: none is empty, no two are the same.
    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    /// The rows below the header, from the first.
    pub(super) fn rows(&self) -> Rows<'a> {
        let reader = reader(self.text, self.delimiter);
        Rows { text: self.text, reader, row: StringRecord::new(), number: 0 }
    }
}

/// Rows one after the other, in memory that is used again for each.
pub(super) struct Rows<'a> {
    text: &'a str,
    reader: Reader<&'a [u8]>,
    row: StringRecord,
    number: u64,
}

impl Rows<'_> {
    /// The next row, with as many fields as there are columns.
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

    /// The number of the row that was read last, from 1; 0 before the first.
    pub(super) fn number(&self) -> u64 {
        self.number
    }
}

fn reader(text: &str, delimiter: u8) -> Reader<&[u8]> {
    ReaderBuilder::new().delimiter(delimiter).trim(Trim::All).from_reader(text.as_bytes())
}

fn checked_delimiter(given: &str) -> Result<u8, HandlerError> {
    match given.as_bytes() {
        [byte] if byte.is_ascii() && !matches!(byte, b'"' | b'\n' | b'\r') => Ok(*byte),
        _ => Err(HandlerError::invalid(
            "payload.delimiter",
            "must be one ASCII character that is no quotation mark and no line break",
        )),
    }
}

/// The most frequent of [`DELIMITERS`] in the first line; what is quoted does not count.
fn detected_delimiter(text: &str) -> u8 {
    let mut counts = [0; DELIMITERS.len()];
    let mut quoted = false;
    for byte in text.trim_start_matches(['\r', '\n']).bytes() {
        match byte {
            b'"' => quoted = !quoted,
            _ if quoted => {}
            b'\n' | b'\r' => break,
            _ => {
                if let Some(index) = DELIMITERS.iter().position(|delimiter| *delimiter == byte) {
                    counts[index] += 1;
                }
            }
        }
    }
    // The last of equals is the maximum, so the order is turned around.
    let most_frequent = (0..DELIMITERS.len()).rev().max_by_key(|index| counts[*index]);
    most_frequent.map_or(b',', |index| DELIMITERS[index])
}

/// The header's names, with `column_3` for a third column that has none, and `mass_2` for another
/// column named `mass`.
fn unique_names(header: &StringRecord) -> Vec<String> {
    let mut taken = HashSet::new();
    let mut unique = |position: usize, name: &str| {
        let wanted =
            if name.is_empty() { format!("column_{}", position + 1) } else { name.to_owned() };
        let mut name = wanted.clone();
        let mut occurrence = 1;
        while !taken.insert(name.clone()) {
            occurrence += 1;
            name = format!("{wanted}_{occurrence}");
        }
        name
    };
    header.iter().enumerate().map(|(position, name)| unique(position, name)).collect()
}

/// The number of a row counts rows, its line counts line breaks: a row may hold some, and empty
/// lines are no rows.
fn invalid_row(text: &str, number: u64, error: &csv::Error) -> HandlerError {
    match error.kind() {
        ErrorKind::UnequalLengths { pos, expected_len, len } => {
            let begin = pos.as_ref().map_or(0, |position| position.byte() as usize);
            let line = line_at(text, begin);
            let noun = if *len == 1 { "field" } else { "fields" };
            invalid_csv(format!(
                "row {number} (line {line}) has {len} {noun}, the header has {expected_len}"
            ))
        }
        _ => invalid_csv(format!("row {number} cannot be read: {error}")),
    }
}

/// The line of the row that begins here or, as the position given by csv is where the row before
/// ended, after some line breaks.
fn line_at(text: &str, begin: usize) -> usize {
    let (before, after) = text.split_at_checked(begin).unwrap_or(("", text));
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

    fn refusal(text: &str, delimiter: Option<&str>) -> String {
        let read_all = || {
            let mut rows = Table::open(text, delimiter)?.rows();
            while rows.next()?.is_some() {}
            Ok::<_, HandlerError>(())
        };
        read_all().unwrap_err().to_string()
    }

    #[test]
    fn the_delimiter_is_the_most_frequent_outside_quotes() {
        for (text, delimiter) in [
            ("a,b;c,d\n", b','),
            ("a;b;c,d\n1,2,3,4,5,6", b';'),
            ("a\tb", b'\t'),
            ("a|b|c\r\n,,,,", b'|'),
            ("\"a,b,c,d\";e", b';'),
            ("a;b,c", b','),
            ("alone", b','),
            ("\n\na;b", b';'),
        ] {
            assert_eq!(detected_delimiter(text), delimiter, "{text}");
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
    fn a_row_of_another_length_is_named_with_its_line() {
        let text = "a,b,c\n1,2,3\n\"1\nmore\",2,3\n\n1,2\n";
        assert_eq!(
            refusal(text, None),
            "VALIDATION_ERROR: payload.csv: row 3 (line 6) has 2 fields, the header has 3"
        );
        let text = "\u{feff}a,b\r\n1,2\r\n\r\n\"1\r\n2\"\r\n";
        assert!(refusal(text, None).contains("row 2 (line 4) has 1 field, the header has 2"));
        assert!(refusal("a,b\n1\n", None).contains("row 1 (line 2) has 1 field, the header has 2"));
        assert!(refusal("a,b\n1,2,3\n", None).contains("has 3 fields, the header has 2"));
    }

    #[test]
    fn a_table_without_header_or_with_too_much_of_it_is_refused() {
        for text in ["", "\n\n", "  \n1\n", ",,\n1,2,3"] {
            assert!(refusal(text, None).contains("payload.csv: has no header"), "{text:?}");
        }
        let wide = vec!["x"; 501].join(",");
        assert!(refusal(&wide, None).contains("must have at most 500 columns, has 501"));
        let long = format!("a,{}", "é".repeat(257));
        assert!(refusal(&long, None).contains("column 2 has a longer name"));
    }

    #[test]
    fn a_given_delimiter_is_taken_or_refused() {
        let table = Table::open("a:b,c\n", Some(":")).map_err(|error| error.to_string()).unwrap();
        assert_eq!(table.names(), ["a", "b,c"]);
        for given in ["", ",,", "é", "\"", "\n"] {
            assert!(refusal("a,b", Some(given)).contains("payload.delimiter: must be one ASCII"));
        }
    }
}
