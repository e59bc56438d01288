//! HTML building blocks of the pages, and formatting of text and numbers.

/// Style sheet, which is inlined because the page must be self-contained.
const STYLE: &str = include_str!("page.css");

/// Returns the HTML before the first section.
pub(super) fn head(title: &str, lead: &str) -> String {
    let (title, lead) = (escape(title), escape(lead));
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <header>\n<h1>{title}</h1>\n<p>{lead}</p>\n</header>\n<main>\n"
    )
}

/// Returns the HTML after the last section.
pub(super) fn foot() -> String {
    "</main>\n<footer>\n<p>Written by <code>generate_report</code>.</p>\n</footer>\n</body>\n</html>\n"
        .into()
}

/// Escapes text for use between tags and in quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // Control characters are not allowed in HTML.
            _ if c.is_control() && !c.is_whitespace() => escaped.push('\u{fffd}'),
            _ => escaped.push(c),
        }
    }
    escaped
}

/// Returns a list of facts, each a name and a value, both plain text.
pub(super) fn facts(facts: &[(&str, String)]) -> String {
    let fact = |(name, value): &(&str, String)| {
        format!("<div><dt>{}</dt><dd>{}</dd></div>\n", escape(name), escape(value))
    };
    format!("<dl class=\"facts\">\n{}</dl>\n", facts.iter().map(fact).collect::<String>())
}

/// Returns a table with the given column headers (plain text, the first for the row headers) and rows
/// (HTML from [`row`]). A table that is too wide can be scrolled separately, also with the keyboard.
pub(super) fn table(caption: &str, heads: &[&str], rows: &str) -> String {
    let caption = escape(caption);
    let head = |name: &&str| format!("<th scope=\"col\">{}</th>", escape(name));
    let heads: String = heads.iter().map(head).collect();
    format!(
        "<div class=\"wide\" role=\"region\" aria-label=\"{caption}\" tabindex=\"0\">\n<table>\n\
         <caption>{caption}</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody>\n\
         </table>\n</div>\n"
    )
}

/// Returns a table row: its header and its cells, all HTML.
pub(super) fn row(head: &str, cells: &[String]) -> String {
    let cells: String = cells.iter().map(|cell| format!("<td>{cell}</td>")).collect();
    format!("<tr><th scope=\"row\">{head}</th>{cells}</tr>\n")
}

/// Returns a share as text with a bar below it, as HTML.
pub(super) fn share_bar(part: u64, whole: u64) -> String {
    let percent = percentage(part, whole);
    format!("{}<div class=\"bar\" style=\"width:{percent:.1}%\"></div>", share(part, whole))
}

/// Formats a share: `12.5 %`, or a dash if the whole is zero.
pub(super) fn share(part: u64, whole: u64) -> String {
    if whole == 0 { "–".into() } else { format!("{:.1} %", percentage(part, whole)) }
}

fn percentage(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { (100.0 * part as f64 / whole as f64).min(100.0) }
}

/// Formats a count: `12,345`.
pub(super) fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// Formats a count with its noun: `1 row`, `2 rows`.
pub(super) fn count_of(number: u64, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", count(number))
}

/// Formats an integer with all digits, and any other value with six significant digits. Digits are not grouped,
/// because the value may be a year.
pub(super) fn number(value: f64) -> String {
    const DIGITS: i32 = 6;
    if value.fract() == 0.0 && value.abs() < 1e15 {
        // Converts negative zero to zero.
        return format!("{:.0}", value + 0.0);
    }
    let magnitude = value.abs().log10().floor();
    if !(-4.0..15.0).contains(&magnitude) {
        return format!("{value:.3e}");
    }
    let decimals = (DIGITS - 1 - magnitude as i32).max(0) as usize;
    let text = format!("{value:.decimals$}");
    if decimals == 0 { text } else { text.trim_end_matches('0').trim_end_matches('.').into() }
}

/// Formats a duration in milliseconds, in a suitable unit.
pub(super) fn duration(millis: f64) -> String {
    const SECOND: f64 = 1000.0;
    const MINUTE: f64 = 60.0 * SECOND;
    const HOUR: f64 = 60.0 * MINUTE;
    match millis {
        _ if millis < SECOND => format!("{millis:.0} ms"),
        _ if millis < MINUTE => format!("{:.1} s", millis / SECOND),
        _ if millis < HOUR => format!("{:.1} min", millis / MINUTE),
        _ => format!("{:.1} h", millis / HOUR),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        assert_eq!(
            escape("<b title=\"x\" id='y'>&amp;\u{0}\n"),
            "&lt;b title=&quot;x&quot; id=&#39;y&#39;&gt;&amp;amp;\u{fffd}\n"
        );
    }

    #[test]
    fn numbers_are_human_readable() {
        for (value, text) in [
            (4_201.754_385_964_9, "4201.75"),
            (2007.0, "2007"),
            (-0.0, "0"),
            (39.225, "39.225"),
            (-0.000_123_456_78, "-0.000123457"),
            (0.1 + 0.2, "0.3"),
            (1e-9, "1.000e-9"),
            (123_456_789.5, "123456790"),
            (1e30, "1.000e30"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn counts_are_grouped() {
        for (value, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(count(value), text);
        }
        assert_eq!((count_of(1, "row"), count_of(2, "row")), ("1 row".into(), "2 rows".into()));
    }

    #[test]
    fn shares_and_durations_have_units() {
        assert_eq!((share(1, 8), share(0, 0)), ("12.5 %".into(), "–".into()));
        let durations = [999.0, 1500.0, 90_000.0, 5_400_000.0].map(duration);
        assert_eq!(durations, ["999 ms", "1.5 s", "1.5 min", "1.5 h"]);
    }
}
