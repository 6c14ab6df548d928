//! `faults`: the fault tests in their long form, and the page with what they came to.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::cargo::{self, Workspace};
use crate::setup;

#[derive(clap::Args)]
pub struct Args {
    /// Everything, and not a sample: hundreds of kills, a fault at every call of a save
    #[arg(long)]
    long: bool,
    /// Only these rows, as R1,R6
    #[arg(long, value_delimiter = ',', value_name = "ROWS")]
    only: Vec<String>,
    /// Write the figures of the rows that were run into the table of a page
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Runs the rows, and fills their figures into the page.
pub fn run(ws: &Workspace, args: &Args) -> Result<()> {
    setup::ensure(ws)?;
    let figures = ws.target()?.join("faults");
    let _ = fs::remove_dir_all(&figures);
    fs::create_dir_all(&figures)?;
    let mut test = ws.cargo();
    test.args(["test", "--release", "--workspace", "--test", "reliability", "--", "--nocapture"]);
    for row in &args.only {
        test.arg(prefix(row)?);
    }
    test.env("LORA_FAULTS_FIGURES", &figures);
    if args.long {
        test.env("LORA_FAULTS", "long");
    }
    cargo::run(&mut test)?;
    match &args.report {
        Some(page) => fill(page, &figures, args.long),
        None => Ok(()),
    }
}

/// How the test of a row is called: `r06_` of R6.
fn prefix(row: &str) -> Result<String> {
    let letter = row.chars().next().filter(char::is_ascii_alphabetic);
    let number = row.get(1..).and_then(|number| number.parse::<u8>().ok());
    let (Some(letter), Some(number)) = (letter, number) else { bail!("--only {row}: rows are called as R1, I5 or N3") };
    Ok(format!("{}{number:02}_", letter.to_ascii_lowercase()))
}

/// Puts figures and seconds into the two last columns of the rows of a table that begin with their names.
fn fill(page: &Path, figures: &Path, long: bool) -> Result<()> {
    ensure!(long, "--report needs --long: the page tells what the long form came to");
    let text = fs::read_to_string(page).with_context(|| format!("--report {}", page.display()))?;
    let filled = fill_text(&text, |row| fs::read_to_string(figures.join(row)).ok());
    fs::write(page, filled).with_context(|| format!("--report {}", page.display()))
}

fn fill_text(text: &str, found: impl Fn(&str) -> Option<String>) -> String {
    let line = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let figures = cells.get(1).and_then(|row| found(row)).filter(|_| cells.len() == 7);
        match (figures, cells.as_slice()) {
            (Some(figures), ["", row, fault, must, ..]) => {
                let (figures, seconds) = figures.split_once('\t').unwrap_or((&figures, ""));
                format!("| {row} | {fault} | {must} | {figures} | {seconds} |\n")
            }
            _ => format!("{line}\n"),
        }
    };
    text.lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_by_their_tests() {
        assert_eq!(prefix("R6").unwrap(), "r06_");
        assert_eq!(prefix("n3").unwrap(), "n03_");
        assert!(prefix("6").is_err() && prefix("").is_err() && prefix("Rx").is_err());
    }

    #[test]
    fn figures_come_into_their_row_and_nothing_else_changes() {
        let page = "# Page\n\n| row | fault | must | figures | s |\n|---|---|---|---|---|\n| R1 | kill | same | | |\n| R2 | b | c | old | 3 |\n";
        let filled = fill_text(page, |row| (row == "R1").then(|| "200 kills\t61".to_string()));
        assert_eq!(filled, page.replace("| R1 | kill | same | | |", "| R1 | kill | same | 200 kills | 61 |"));
    }
}
