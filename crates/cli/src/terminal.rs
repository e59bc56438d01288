//! What is printed. On a terminal, control characters in what a server sends are shown and not obeyed: they
//! may come from other users, and could move the cursor, hide text or fill the clipboard.

use std::{
    borrow::Cow,
    fmt::Write as _,
    io::{self, IsTerminal, Write},
};

/// Prints a line at once, so that a reader at the other end of a pipe sees it.
pub(crate) fn print_line(line: impl std::fmt::Display) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if out.is_terminal() {
        writeln!(out, "{}", printable(&line.to_string()))?;
    } else {
        writeln!(out, "{line}")?;
    }
    Ok(out.flush()?)
}

/// Prints a line on standard error.
pub(crate) fn print_error_line(line: &str) {
    if io::stderr().is_terminal() {
        eprintln!("{}", printable(line));
    } else {
        eprintln!("{line}");
    }
}

/// Replaces control characters other than line breaks and tabs, and characters that change the direction of
/// text, by JSON escapes.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    let is_control = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(is_control) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_control(c) {
            // All of them have four digits.
            let _: Result<(), std::fmt::Error> = write!(shown, "\\u{:04x}", u32::from(c));
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown() {
        assert_eq!(printable("plain\tü\n"), "plain\tü\n");
        assert_eq!(printable("\u{1b}[2Jx\u{9b}1A\r"), "\\u001b[2Jx\\u009b1A\\u000d");
        assert_eq!(printable("a\u{202e}b\u{7f}"), "a\\u202eb\\u007f");
    }
}
