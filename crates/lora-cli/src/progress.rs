//! Progress on stderr: bars where it is a terminal, a line now and then where it is not.

use crate::out;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::{Duration, Instant};

/// Without a terminal, a line at most this often.
pub(crate) const LINE_EVERY: Duration = Duration::from_secs(5);

/// A bar on stderr, hidden where that is no terminal.
pub(crate) fn bar(template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// A bar that counts bytes.
#[derive(Debug)]
pub(crate) struct ByteBar(ProgressBar);

impl ByteBar {
    /// A bar with a word in front.
    pub(crate) fn new(word: &str) -> Self {
        let bar = bar("{prefix:<10} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}");
        bar.set_prefix(word.to_string());
        Self(bar)
    }

    /// The same for what takes long: with the time that is left.
    pub(crate) fn with_time(word: &str) -> Self {
        let bar = bar("{prefix:<10} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta} left");
        bar.set_prefix(word.to_string());
        Self(bar)
    }

    /// Shows a message above it.
    pub(crate) fn above(&self, line: &str) {
        above(Some(&self.0), line);
    }

    /// Shows how far it is.
    pub(crate) fn set(&mut self, done: u64, of: u64) {
        self.0.set_length(of);
        self.0.set_position(done);
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// A bar that counts things.
#[derive(Debug)]
pub(crate) struct CountBar(ProgressBar);

impl CountBar {
    /// A bar with a word in front.
    pub(crate) fn new(word: &str) -> Self {
        let bar = bar("{prefix:<10} [{bar:30}] {pos}/{len}");
        bar.set_prefix(word.to_string());
        Self(bar)
    }

    /// Shows how far it is.
    pub(crate) fn set(&mut self, done: usize, of: usize) {
        self.0.set_length(of as u64);
        self.0.set_position(done as u64);
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// Lets something through at most every five seconds.
#[derive(Debug, Default)]
pub(crate) struct NowAndThen(Option<Instant>);

impl NowAndThen {
    /// Whether it is time again.
    pub(crate) fn due(&mut self) -> bool {
        let due = self.0.is_none_or(|last| last.elapsed() >= LINE_EVERY);
        if due {
            self.0 = Some(Instant::now());
        }
        due
    }
}

/// A message that goes above a bar.
pub(crate) fn above(bar: Option<&ProgressBar>, line: &str) {
    match bar {
        Some(bar) if !bar.is_hidden() => bar.println(line),
        _ => out::note(line),
    }
}
