//! How far a long step is: a bar on a terminal, a line every few seconds elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows bytes done of a total.
pub struct Meter {
    label: String,
    total: Option<u64>,
    bar: Option<ProgressBar>,
    next_line: Instant,
}

impl Meter {
    /// `total` in bytes, where it is known.
    pub fn new(label: impl Into<String>, total: Option<u64>) -> Self {
        let label = label.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let (bar, template) = match total {
                Some(total) => (ProgressBar::new(total), "{msg} [{wide_bar}] {bytes}/{total_bytes} {eta}"),
                None => (ProgressBar::new_spinner(), "{msg} {bytes}"),
            };
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.with_style(style).with_message(label.clone())
        });
        if bar.is_none() {
            eprintln!("{label}{}", total.map(|t| format!(" ({} MB)", t / 1_000_000)).unwrap_or_default());
        }
        Self { label, total, bar, next_line: Instant::now() + LINE_EVERY }
    }

    /// `done` bytes so far.
    pub fn set(&mut self, done: u64) {
        let done = self.total.map_or(done, |total| done.min(total));
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        } else if Instant::now() >= self.next_line {
            self.next_line = Instant::now() + LINE_EVERY;
            eprintln!("{}: {} MB", self.label, done / 1_000_000);
        }
    }

    /// Clears the bar.
    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
