//! Output to standard output and standard error. On a terminal, control characters are escaped: data from a
//! server may contain input from other users, which could move the cursor, hide text or write to the clipboard.

use std::{
    borrow::Cow,
    fmt::Write as _,
    io::{self, IsTerminal, Write},
};

/// Prints a line and flushes it, so that the reader of a pipe receives it immediately.
pub(crate) fn print_line(line: impl std::fmt::Display) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if out.is_terminal() {
        writeln!(out, "{}", printable(&line.to_string()))?;
    } else {
        writeln!(out, "{line}")?;
    }
    Ok(out.flush()?)
}

/// Prints a line to standard error.
pub(crate) fn print_error_line(line: &str) {
    if io::stderr().is_terminal() {
        eprintln!("{}", printable(line));
    } else {
        eprintln!("{line}");
    }
}

/// Replaces control characters other than line breaks and tabs, and characters that change the direction of
/// text, with JSON escapes.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    let is_control = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(is_control) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_control(c) {
            // Four digits suffice: all escaped characters are below U+10000.
            let _: Result<(), std::fmt::Error> = write!(escaped, "\\u{:04x}", u32::from(c));
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(printable("plain\tü\n"), "plain\tü\n");
        assert_eq!(printable("\u{1b}[2Jx\u{9b}1A\r"), "\\u001b[2Jx\\u009b1A\\u000d");
        assert_eq!(printable("a\u{202e}b\u{7f}"), "a\\u202eb\\u007f");
    }
}
