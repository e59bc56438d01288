//! Histograms as inline SVG.

use crate::generate_report::html::{count, escape};

/// One bar of a histogram.
pub(super) struct Bar {
    /// Where it stands, as text.
    pub(super) label: String,
    /// How high it is.
    pub(super) count: u64,
}

const WIDTH: f64 = 600.0;
const HEIGHT: f64 = 120.0;
/// Share of its place that a bar leaves free.
const GAP: f64 = 0.12;

/// A histogram with a caption and the two ends of its axis. `description` stands for the picture
/// where it cannot be seen; all are plain text.
///
/// The picture is stretched to the width there is, so it holds bars only: text in it would be
/// stretched too.
pub(super) fn histogram(
    caption: &str,
    description: &str,
    (first, last): (&str, &str),
    bars: &[Bar],
) -> String {
    let highest = bars.iter().map(|bar| bar.count).max().unwrap_or(0);
    let place = WIDTH / bars.len().max(1) as f64;
    let rects: String = bars
        .iter()
        .enumerate()
        .map(|(position, bar)| rect(position as f64 * place, place, bar, highest))
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

fn rect(left: f64, place: f64, bar: &Bar, highest: u64) -> String {
    if bar.count == 0 {
        return String::new();
    }
    // A few of very many would otherwise be too flat to see.
    let height = (HEIGHT * bar.count as f64 / highest as f64).max(1.0);
    format!(
        "<rect x=\"{:.2}\" y=\"{:.2}\" width=\"{:.2}\" height=\"{height:.2}\"><title>{}: {}</title>\
         </rect>\n",
        left + place * GAP / 2.0,
        HEIGHT - height,
        place * (1.0 - GAP),
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
    fn bars_are_as_high_as_their_share_of_the_highest() {
        let chart = chart(&[50, 0, 100]);
        assert_eq!(chart.matches("<rect").count(), 2);
        assert!(chart.contains(r#"x="12.00" y="60.00" width="176.00" height="60.00""#), "{chart}");
        assert!(chart.contains(r#"x="412.00" y="0.00" width="176.00" height="120.00""#), "{chart}");
        assert!(chart.contains("<title>&lt;x&gt;: 100</title>"));
        assert!(chart.contains(r#"role="img" aria-label="a &quot;description&quot;""#));
    }

    #[test]
    fn nothing_to_draw_draws_nothing() {
        assert!(!chart(&[]).contains("<rect"));
        assert!(!chart(&[0, 0]).contains("NaN"));
    }
}
