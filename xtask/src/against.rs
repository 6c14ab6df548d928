//! `bench --against-datasets`: `lora` and `datasets.map` on the same file with the same tokenizer, in turns.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cargo::{Workspace, capture};
use crate::{python, setup};

/// What is compared.
#[derive(clap::Args)]
pub struct Args {
    /// Compare with the Python package `datasets`: a JSON Lines file of prompt and completion, or of messages
    #[arg(long, value_name = "FILE", requires = "model", conflicts_with_all = ["report", "filter", "compare"])]
    against_datasets: Option<PathBuf>,
    /// Folder of the tokenizer
    #[arg(long, value_name = "DIR", requires = "against_datasets")]
    model: Option<PathBuf>,
    /// Runs of each, in turns
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// A Python that has what is compared with, instead of a private environment
    #[arg(long, value_name = "PROGRAM")]
    python: Option<PathBuf>,
}

impl Args {
    /// File and tokenizer, where this comparison was asked for.
    pub fn wanted(&self) -> Option<(&Path, &Path)> {
        self.against_datasets.as_deref().zip(self.model.as_deref())
    }

    /// Runs of each.
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// The Python that was named.
    pub fn python(&self) -> Option<&Path> {
        self.python.as_deref()
    }
}

/// Runs both in turns and prints the medians.
pub fn run(ws: &Workspace, args: &Args, data: &Path, model: &Path) -> Result<()> {
    setup::ensure(ws)?;
    let lora = ws.build_lora()?;
    let work = ws.target()?.join("against-datasets");
    let python = python::reference(args.python.as_deref(), &work, &ws.root.join(".libtorch-cache"), &python::DATASETS)?;
    let cache = work.join("cache");
    let talks = std::fs::read_to_string(data)?.lines().next().is_some_and(|line| line.contains("\"messages\""));
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 1..=args.pairs {
        let mut command = Command::new(&lora);
        command.args(["bench", "data", "--json", "--model"]).arg(model).arg(data);
        if talks {
            command.args(["--template", "chatml"]);
        }
        let own = report(&mut command)?;
        if cache.exists() {
            std::fs::remove_dir_all(&cache)?;
        }
        let mut command = Command::new(&python);
        command.arg(ws.root.join("tests/reference/datasets_bench.py"));
        command.arg("--data").arg(data).arg("--model").arg(model).arg("--cache").arg(&cache);
        command.env("HF_HUB_OFFLINE", "1");
        let other = report(&mut command)?;
        println!(
            "{pair}: lora {:.2} s, kept {:.3} s; datasets {:.2} s, kept {:.3} s",
            number(&own, "fresh_s")?,
            number(&own, "cached_s")?,
            number(&other, "fresh_s")?,
            number(&other, "cached_s")?
        );
        ours.push(own);
        theirs.push(other);
    }
    let medians = |runs: &[Value], key: &str| -> Result<f64> {
        Ok(median(runs.iter().map(|run| number(run, key)).collect::<Result<_>>()?))
    };
    let (tokens, of_other) = (medians(&ours, "tokens")?, medians(&theirs, "tokens")?);
    println!("tokens {tokens:.0} and {of_other:.0}");
    ensure!((tokens / of_other - 1.0).abs() < SAME, "the two made different tokens, so their times mean nothing");
    let rate = |runs: &[Value]| -> Result<f64> { Ok(tokens / medians(runs, "fresh_s")?) };
    let (own, other) = (rate(&ours)?, rate(&theirs)?);
    println!("fresh: {own:.0} and {other:.0} tokens a second, ratio {:.2}", own / other);
    println!(
        "kept:  {:.3} s and {:.3} s to the first batch",
        medians(&ours, "cached_s")?,
        medians(&theirs, "cached_s")?
    );
    Ok(())
}

/// The share by which both may differ in what they count, as an end token more or less makes of short rows.
const SAME: f64 = 0.05;

fn report(command: &mut Command) -> Result<Value> {
    let text = capture(command)?;
    serde_json::from_str(&text).with_context(|| format!("no report: {text}"))
}

fn number(report: &Value, key: &str) -> Result<f64> {
    report[key].as_f64().with_context(|| format!("the report has no number `{key}`: {report}"))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_an_odd_number_of_runs() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn a_report_is_what_was_printed() {
        let said = report(Command::new("printf").arg("{\"tokens\": 5}\\n")).unwrap();
        assert_eq!(number(&said, "tokens").unwrap(), 5.0);
        assert!(number(&said, "rows").is_err());
        assert!(report(Command::new("printf").arg("none")).is_err());
    }
}
