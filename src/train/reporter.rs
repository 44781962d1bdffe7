//! Progress for people: a bar on a terminal, one line per epoch elsewhere, nothing when quiet. Always on stderr, and never
//! a reason to end: what cannot be written there is lost.

use std::fmt::Display;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::terminal;

const TEMPLATE: &str = "{prefix:>9} {bar:32} {pos}/{len} {elapsed} (left {eta}) {msg}";
/// How often a bar is drawn again at most.
const REDRAW: Duration = Duration::from_millis(250);

/// Shows the progress of a job.
#[derive(Debug)]
pub struct Reporter {
    style: Style,
    bar: Option<ProgressBar>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Quiet,
    Lines,
    Bars,
}

impl Reporter {
    /// A bar where stderr is a terminal that can draw one, lines elsewhere.
    pub fn new() -> Self {
        Self { style: if terminal::has_bars() { Style::Bars } else { Style::Lines }, bar: None }
    }

    /// Shows nothing.
    pub fn quiet() -> Self {
        Self { style: Style::Quiet, bar: None }
    }

    /// A stage begins, or goes on after `done` of its `total` steps.
    pub fn begin(&mut self, stage: &str, done: u64, total: u64) {
        if self.style == Style::Bars {
            let bar = ProgressBar::new(total).with_position(done).with_prefix(stage.to_owned());
            if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
                bar.set_style(style);
            }
            bar.reset_eta();
            bar.enable_steady_tick(REDRAW);
            self.bar = Some(bar);
        }
    }

    /// `done` steps of the stage are taken; `message` is what stands behind the bar.
    pub fn step(&mut self, done: u64, message: impl Display) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(message.to_string());
        }
    }

    /// Prints a line where there are no bars, which would say the same.
    pub fn line_without_bar(&self, text: &str) {
        if self.style == Style::Lines {
            terminal::tell(text);
        }
    }

    /// Prints a line, above the bar where there is one.
    pub fn line(&self, text: &str) {
        match (self.style, &self.bar) {
            (Style::Quiet, _) => {}
            (_, Some(bar)) => bar.suspend(|| terminal::tell(text)),
            _ => terminal::tell(text),
        }
    }

    /// The stage has ended.
    pub fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Default for Reporter {
    fn default() -> Self {
        Self::new()
    }
}
