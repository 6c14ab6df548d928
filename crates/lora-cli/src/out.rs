//! The only place that prints: results to stdout, messages and progress to stderr.

use anyhow::{Context, Result};
use serde::Serialize;
use std::io::{IsTerminal, Write};

/// Writes text to stdout at once, without a line end.
///
/// # Errors
/// When stdout cannot be written to.
pub(crate) fn text(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot write to stdout")
}

/// Writes a line to stdout.
///
/// # Errors
/// When stdout cannot be written to.
pub(crate) fn line(line: impl AsRef<str>) -> Result<()> {
    text(&format!("{}\n", line.as_ref()))
}

/// Writes one JSON document to stdout.
///
/// # Errors
/// When stdout cannot be written to.
pub(crate) fn json(value: &impl Serialize) -> Result<()> {
    let document = serde_json::to_string_pretty(value).context("cannot write the result as JSON")?;
    line(document)
}

/// Writes a line to stderr. Where stderr is gone there is nobody to tell.
pub(crate) fn note(line: impl AsRef<str>) {
    let _ = writeln!(std::io::stderr().lock(), "{}", line.as_ref());
}

/// Whether stdout may be coloured: it is a terminal, and `NO_COLOR` is not set.
pub(crate) fn colour() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// The columns of stdout: those of the terminal, or 100 where it is none.
pub(crate) fn width() -> usize {
    console::Term::stdout().size_checked().map_or(100, |(_rows, columns)| usize::from(columns).max(40))
}

/// Whether stderr is a terminal, on which a line may be drawn again and again.
pub(crate) fn live() -> bool {
    std::io::stderr().is_terminal()
}

/// A number with a space between thousands.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    grouped
}

/// Bytes in the unit that suits them, in powers of 1000.
pub(crate) fn bytes(n: u64) -> String {
    match n {
        0..1_000 => format!("{n} B"),
        1_000..1_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}

/// A time as `1h02m`, `3m04s`, `5.1s` or `17ms`.
pub(crate) fn seconds(s: f64) -> String {
    if !s.is_finite() {
        return "unknown".into();
    }
    let whole = s.round() as u64;
    match whole {
        0 if s < 1.0 => format!("{:.0}ms", 1e3 * s),
        0..60 => format!("{s:.1}s"),
        60..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        _ => format!("{}h{:02}m", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1 000", "1 234 567"]);
        assert_eq!([999, 1500, 2_500_000, 7_000_000_000].map(bytes), ["999 B", "1.5 kB", "2.5 MB", "7.00 GB"]);
        assert_eq!([0.017, 5.12, 59.6, 184.0, 3725.0].map(seconds), ["17ms", "5.1s", "1m00s", "3m04s", "1h02m"]);
        assert_eq!(seconds(f64::NAN), "unknown");
    }
}
