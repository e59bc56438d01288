//! Report on a table: an overview of its columns, then a section for each column.

use streamer_handler::{Context, HandlerError};

use crate::{
    generate_report::{
        chart::{Bar, histogram},
        html::{self, count, count_of, escape, facts, number, row, share, share_bar},
        page::Page,
        summary::ReportSummary,
    },
    process_data::{ColumnProfile, Histogram, NumericSummary, Profile},
};

/// Writes the page.
pub(super) async fn write(
    context: &Context,
    profile: &Profile,
) -> Result<ReportSummary, HandlerError> {
    let title = format!("Profile of {}", profile.name);
    let columns = profile.profile.len() as u64;
    let lead = format!("{} in {}", count_of(profile.rows, "row"), count_of(columns, "column"));
    let mut page = Page::begin(context, title, &lead, 1 + columns).await?;
    page.section(overview(profile)).await?;
    for (position, column) in profile.profile.iter().enumerate() {
        page.section(column_section(position, column)).await?;
    }
    page.end().await
}

fn overview(profile: &Profile) -> String {
    let rows: String = profile
        .profile
        .iter()
        .enumerate()
        .map(|(position, column)| {
            let name = format!("<a href=\"#column-{position}\">{}</a>", escape(&column.name));
            let cells = [
                column.kind.as_str().to_owned(),
                count(column.count),
                missing(column),
                distinct(column),
            ];
            row(&name, &cells)
        })
        .collect();
    let heads = ["Column", "Type", "Values", "Missing", "Distinct"];
    let table = html::table("All columns", &heads, &rows);
    format!(
        "<section aria-labelledby=\"overview\">\n<h2 id=\"overview\">Overview</h2>\n{table}</section>\n"
    )
}

/// Returns the section of a column. The section's ID is derived from the position, which requires no escaping.
fn column_section(position: usize, column: &ColumnProfile) -> String {
    let name = escape(&column.name);
    let kind = column.kind.as_str();
    let mut rows = vec![
        ("Values", count(column.count)),
        ("Missing", missing(column)),
        ("Distinct", distinct(column)),
    ];
    let chart = match &column.numbers {
        Some(numbers) => {
            rows.extend(numeric_facts(numbers));
            column_histogram(&column.name, column.count, &numbers.histogram)
        }
        None => String::new(),
    };
    format!(
        "<section id=\"column-{position}\" aria-labelledby=\"name-{position}\">\n\
         <h2 id=\"name-{position}\">{name} <span class=\"kind\">{kind}</span></h2>\n{}{chart}{}\
         </section>\n",
        facts(&rows),
        top_values(column),
    )
}

fn numeric_facts(numbers: &NumericSummary) -> [(&'static str, String); 7] {
    [
        ("Mean", number(numbers.mean)),
        ("Standard deviation", numbers.standard_deviation.map_or("–".into(), number)),
        ("Minimum", number(numbers.min)),
        ("25 % below", number(numbers.p25)),
        ("Median", number(numbers.p50)),
        ("75 % below", number(numbers.p75)),
        ("Maximum", number(numbers.max)),
    ]
}

fn column_histogram(name: &str, values: u64, distribution: &Histogram) -> String {
    let Histogram { from, to, counts } = distribution;
    let bins = counts.len();
    let edge = |index: usize| number(from + (to - from) * index as f64 / bins as f64);
    let bars: Vec<Bar> = counts
        .iter()
        .enumerate()
        .map(|(index, &count)| Bar {
            label: format!("{} to {}", edge(index), edge(index + 1)),
            count,
        })
        .collect();
    let Some(highest) = bars.iter().max_by_key(|bar| bar.count) else {
        return String::new();
    };
    let most = format!("most, {}, lie from {}", count(highest.count), highest.label);
    let caption = format!("Distribution in {bins} bins; {most}");
    let description = format!(
        "Histogram of {name}: {} from {} to {}; {most}",
        count_of(values, "value"),
        edge(0),
        edge(bins)
    );
    histogram(&caption, &description, (&edge(0), &edge(bins)), &bars)
}

fn top_values(column: &ColumnProfile) -> String {
    if column.top.is_empty() {
        return "<p>There are no values.</p>\n".into();
    }
    let rows: String = column
        .top
        .iter()
        .map(|top| {
            row(&escape(&top.value), &[count(top.count), share_bar(top.count, column.count)])
        })
        .collect();
    html::table("Most frequent values", &["Value", "Occurrences", "Share of values"], &rows)
}

fn missing(column: &ColumnProfile) -> String {
    match column.missing {
        0 => "0".into(),
        missing => {
            let whole = column.count.saturating_add(missing);
            format!("{} ({})", count(missing), share(missing, whole))
        }
    }
}

fn distinct(column: &ColumnProfile) -> String {
    let at_least = if column.distinct_is_lower_bound { "at least " } else { "" };
    format!("{at_least}{}", count(column.distinct))
}
