//! Progress bar of one request.

use std::time::Duration;

use indicatif::{ProgressDrawTarget, ProgressStyle};

use crate::terminal::{print_line, printable};

/// Length of the bar, in tenths of a percent.
const LENGTH: u64 = 1000;
/// Interval at which a bar is redrawn without an update.
const REDRAW_INTERVAL: Duration = Duration::from_millis(100);

/// Progress bar on a terminal. If the output is not a terminal, or a terminal that cannot move its cursor, each update
/// is a line, or nothing is printed.
pub(crate) struct ProgressBar {
    bar: indicatif::ProgressBar,
    /// Whether updates are printed as lines.
    prints_lines: bool,
}

impl ProgressBar {
    /// Creates a bar on standard output, or one line per update if standard output is not a terminal.
    pub(crate) fn on_stdout() -> Self {
        let target = ProgressDrawTarget::stdout();
        let prints_lines = target.is_hidden();
        Self::new(target, prints_lines)
    }

    /// Creates a bar on standard error, which is invisible if standard error is not a terminal.
    pub(crate) fn on_stderr() -> Self {
        Self::new(ProgressDrawTarget::stderr(), false)
    }

    /// Creates a bar that prints nothing.
    pub(crate) fn hidden() -> Self {
        Self::new(ProgressDrawTarget::hidden(), false)
    }

    fn new(target: ProgressDrawTarget, prints_lines: bool) -> Self {
        let bar = indicatif::ProgressBar::with_draw_target(Some(LENGTH), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:32} {percent:>3} %  {msg}") {
            bar.set_style(style);
        }
        Self { bar, prints_lines }
    }

    /// Draws the bar before the first update.
    pub(crate) fn start(&self) {
        self.bar.enable_steady_tick(REDRAW_INTERVAL);
    }

    /// Shows the percentage and a message.
    ///
    /// # Errors
    /// Returns an error if standard output is closed.
    pub(crate) fn update(&self, percentage: f64, message: &str) -> anyhow::Result<()> {
        if self.prints_lines {
            return print_line(line(percentage, message));
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to LENGTH")]
        self.bar.set_position((percentage * 10.0) as u64);
        self.bar.set_message(printable(message).into_owned());
        Ok(())
    }

    /// Prints a line above a visible bar.
    pub(crate) fn print_above(&self, line: &str) {
        self.bar.println(printable(line));
    }

    /// Ends the bar, which stays visible.
    ///
    /// # Errors
    /// Returns an error if standard output is closed.
    pub(crate) fn finish(&self) -> anyhow::Result<()> {
        self.bar.abandon();
        // The cursor is at the end of the bar.
        if self.bar.is_hidden() { Ok(()) } else { print_line("") }
    }

    /// Removes the bar.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// Returns an update as a line of text.
fn line(percentage: f64, message: &str) -> String {
    const WIDTH: usize = 30;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to WIDTH")]
    let full = (percentage / 100.0 * WIDTH as f64).round() as usize;
    let full = full.min(WIDTH);
    format!("  {}{} {percentage:5.1} %  {message}", "█".repeat(full), "░".repeat(WIDTH - full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_contains_the_bar_the_percentage_and_the_message() {
        let bar = |full: usize| format!("{}{}", "█".repeat(full), "░".repeat(30 - full));
        assert_eq!(line(0.0, "starting"), format!("  {}   0.0 %  starting", bar(0)));
        assert_eq!(line(45.5, "half"), format!("  {}  45.5 %  half", bar(14)));
        assert_eq!(line(100.0, "done"), format!("  {} 100.0 %  done", bar(30)));
        assert_eq!(line(250.0, ""), format!("  {} 250.0 %  ", bar(30)));
    }

    #[test]
    fn a_hidden_bar_keeps_its_position() {
        let bar = ProgressBar::hidden();
        bar.update(45.5, "half").unwrap();
        assert_eq!((bar.bar.position(), bar.bar.message().as_str()), (455, "half"));
        bar.finish().unwrap();
        assert!(bar.bar.is_finished());
    }
}
