//! Members of messages that are not parsed, because the generator must use less processor time than the server.

/// Returns the number that follows `"seq":`.
pub(super) fn seq_of(message: &str) -> Option<i64> {
    number_after(message, "\"seq\":")
}

/// Returns the number that follows `name` in the message.
pub(super) fn number_after(message: &str, name: &str) -> Option<i64> {
    let digits = &message[message.find(name)? + name.len()..];
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    digits[..end].parse().ok()
}

/// Returns the text that follows `name` in the message, up to the next quotation mark.
pub(super) fn text_after<'a>(message: &'a str, name: &str) -> Option<&'a str> {
    let rest = &message[message.find(name)? + name.len()..];
    rest.split('"').next()
}
