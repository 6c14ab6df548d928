//! `bench --compare`: two reports side by side.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::bench::{Report, Row, read, time};

/// How far apart two medians may lie, in spreads of both, and still count as the same.
const SPREADS: f64 = 2.0;

/// Prints the ratio of every benchmark that both reports have.
///
/// # Errors
/// When the reports are of different machines, or have nothing in common.
pub fn run(a: &Path, b: &Path) -> Result<()> {
    for line in table(&read(a)?, &read(b)?)? {
        println!("{line}");
    }
    Ok(())
}

fn table(a: &Report, b: &Report) -> Result<Vec<String>> {
    ensure!(
        a.host == b.host,
        "the reports are of different machines ({} with {} cores; {} with {}): their times say nothing about each other",
        a.host.cpu,
        a.host.cores,
        b.host.cpu,
        b.host.cores
    );
    let mut lines = vec![format!("A {} {}   B {} {}", a.date, a.revision, b.date, b.revision)];
    for row in &a.results {
        let Some(other) = b.results.iter().find(|other| other.id == row.id) else { continue };
        let (ratio, noise) = ratio(row, other);
        let verdict = match ratio {
            ratio if (ratio - 1.0).abs() <= noise => "same",
            ratio if ratio < 1.0 => "faster",
            _ => "slower",
        };
        let (median, other) = (time(row.median_ns), time(other.median_ns));
        lines.push(format!("{:<48} {median:>11} {other:>11}  x{ratio:.3} ±{noise:.3}  {verdict}", row.id));
    }
    ensure!(lines.len() > 1, "the reports have no benchmark in common");
    Ok(lines)
}

/// Time of `b` over time of `a`, and how much of a difference is noise.
fn ratio(a: &Row, b: &Row) -> (f64, f64) {
    let spread = ((a.mad_ns / a.median_ns).powi(2) + (b.mad_ns / b.median_ns).powi(2)).sqrt();
    (b.median_ns / a.median_ns, SPREADS * spread)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Host;

    fn report(cores: usize, median_ns: f64) -> Report {
        let row = Row { id: "op".to_owned(), median_ns, mad_ns: 1.0, low_ns: 0.0, high_ns: 0.0, throughput: None };
        Report {
            date: String::new(),
            revision: String::new(),
            dirty: false,
            host: Host { cpu: "c".to_owned(), cores, memory_gib: 1, gpu: None },
            libtorch: String::new(),
            rustc: String::new(),
            results: vec![row],
            metrics: Vec::new(),
        }
    }

    #[test]
    fn verdicts_follow_the_noise() {
        let verdict = |b: f64| table(&report(2, 100.0), &report(2, b)).unwrap()[1].clone();
        assert!(verdict(101.0).ends_with("same"));
        assert!(verdict(110.0).ends_with("slower"));
        assert!(verdict(90.0).ends_with("faster"));
    }

    #[test]
    fn other_machines_are_refused() {
        let error = table(&report(2, 1.0), &report(4, 1.0)).unwrap_err();
        assert!(error.to_string().contains("different machines"));
    }
}
