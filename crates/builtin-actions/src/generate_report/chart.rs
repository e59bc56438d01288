//! Histograms as inline SVG.

use crate::generate_report::html::{count, escape};

/// Bar of a histogram.
pub(super) struct Bar {
    /// Label of the bar's position.
    pub(super) label: String,
    /// Height of the bar.
    pub(super) count: u64,
}

const WIDTH: f64 = 600.0;
const HEIGHT: f64 = 120.0;
/// Fraction of a bar's slot that is empty.
const GAP: f64 = 0.12;

/// Returns a histogram with a caption and the labels of both ends of its axis. `description` is the
/// alternative text. All texts are plain text.
///
/// The SVG is stretched to the available width, so it contains only bars: text would also be stretched.
pub(super) fn histogram(
    caption: &str,
    description: &str,
    (first, last): (&str, &str),
    bars: &[Bar],
) -> String {
    let highest = bars.iter().map(|bar| bar.count).max().unwrap_or(0);
    let slot = WIDTH / bars.len().max(1) as f64;
    let rects: String = bars
        .iter()
        .enumerate()
        .map(|(position, bar)| rect(position as f64 * slot, slot, bar, highest))
        .collect();
    format!(
        "<figure>\n<figcaption>{}</figcaption>\n\
         <svg role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         preserveAspectRatio=\"none\">\n{rects}</svg>\n\
         <div class=\"axis\" aria-hidden=\"true\"><span>{}</span><span>{}</span></div>\n</figure>\n",
        escape(caption),
        escape(description),
        escape(first),
        escape(last),
    )
}

fn rect(left: f64, slot: f64, bar: &Bar, highest: u64) -> String {
    if bar.count == 0 {
        return String::new();
    }
    // A minimum height keeps small counts visible.
    let height = (HEIGHT * bar.count as f64 / highest as f64).max(1.0);
    format!(
        "<rect x=\"{:.2}\" y=\"{:.2}\" width=\"{:.2}\" height=\"{height:.2}\"><title>{}: {}</title>\
         </rect>\n",
        left + slot * GAP / 2.0,
        HEIGHT - height,
        slot * (1.0 - GAP),
        escape(&bar.label),
        count(bar.count),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(counts: &[u64]) -> String {
        let bars: Vec<_> = counts.iter().map(|&count| Bar { label: "<x>".into(), count }).collect();
        histogram("caption", "a \"description\"", ("0", "9"), &bars)
    }

    #[test]
    fn heights_are_relative_to_the_highest_bar() {
        let chart = chart(&[50, 0, 100]);
        assert_eq!(chart.matches("<rect").count(), 2);
        assert!(chart.contains(r#"x="12.00" y="60.00" width="176.00" height="60.00""#), "{chart}");
        assert!(chart.contains(r#"x="412.00" y="0.00" width="176.00" height="120.00""#), "{chart}");
        assert!(chart.contains("<title>&lt;x&gt;: 100</title>"));
        assert!(chart.contains(r#"role="img" aria-label="a &quot;description&quot;""#));
    }

    #[test]
    fn empty_histograms_have_no_bars() {
        assert!(!chart(&[]).contains("<rect"));
        assert!(!chart(&[0, 0]).contains("NaN"));
    }
}
