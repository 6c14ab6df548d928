//! How much is tried, and what is told of it.

use std::path::PathBuf;
use std::time::Instant;

/// Set to `long` by `cargo xtask faults --long`.
const EXTENT: &str = "LORA_FAULTS";
/// A folder for the figures of each row, set by `cargo xtask faults --report`.
const FIGURES: &str = "LORA_FAULTS_FIGURES";

/// Whether everything is to be tried, and not a sample.
pub fn long() -> bool {
    std::env::var_os(EXTENT).is_some_and(|extent| extent == "long")
}

/// The one number or the other.
pub fn extent<T>(quick: T, whole: T) -> T {
    if long() { whole } else { quick }
}

/// A row of the table, from its start to its figures.
pub struct Row {
    name: &'static str,
    start: Instant,
}

impl Row {
    /// Begins a row.
    pub fn new(name: &'static str) -> Self {
        Self { name, start: Instant::now() }
    }

    /// Tells what was tried and held. A row whose assertions failed never comes here.
    pub fn held(self, figures: &str) {
        let seconds = self.start.elapsed().as_secs_f64();
        eprintln!("{}: {figures} ({seconds:.1} s)", self.name);
        self.write(&format!("{figures}\t{seconds:.0}"));
    }

    /// Tells loudly that nothing was proven.
    pub fn not_run(self, why: &str) {
        eprintln!("\n=== NOT RUN: {}: {why} ===\n", self.name);
        self.write(&format!("NOT RUN: {why}\t0"));
    }

    fn write(&self, text: &str) {
        if let Some(folder) = std::env::var_os(FIGURES) {
            std::fs::write(PathBuf::from(folder).join(self.name), text).unwrap();
        }
    }
}
