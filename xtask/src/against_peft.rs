//! `bench --against-peft`: `lora` and PEFT with transformers at the same work, in turns.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::bench::Host;
use crate::cargo::{Workspace, capture, first_line};
use crate::{against, python, setup};
use case::{Case, Shape};

mod case;

/// What is compared.
#[derive(clap::Args)]
pub struct Args {
    /// Compare with PEFT and transformers
    #[arg(long, value_name = "CASES", value_delimiter = ',', num_args = 1..,
          conflicts_with_all = ["report", "filter", "compare", "against_datasets", "against_full"])]
    against_peft: Vec<Case>,
    /// An alpaca file, for ragged and start
    #[arg(long, value_name = "FILE", requires = "tokenizer")]
    instructions: Option<PathBuf>,
    /// Folder of a GPT-2 tokenizer, for ragged, start and generate
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Write what was found as a Markdown page, too
    #[arg(id = "peft_page", long = "peft-page", value_name = "FILE")]
    page: Option<PathBuf>,
}

impl Args {
    /// Whether this comparison was asked for.
    pub fn wanted(&self) -> bool {
        !self.against_peft.is_empty()
    }
}

/// Both programs, and where they work.
struct Bench<'a> {
    lora: PathBuf,
    python: PathBuf,
    script: PathBuf,
    work: PathBuf,
    args: &'a Args,
}

/// Runs each case in turns and prints medians and ratios.
pub fn run(ws: &Workspace, args: &Args, of_both: &against::Args) -> Result<()> {
    setup::ensure(ws)?;
    for case in &args.against_peft {
        let missing = match case {
            Case::Ragged | Case::Start if args.instructions.is_none() => "--instructions FILE and --tokenizer DIR",
            Case::Generate if args.tokenizer.is_none() => "--tokenizer DIR",
            _ => continue,
        };
        bail!("{}: give {missing}", case.title());
    }
    let work = ws.target()?.join("against-peft");
    fs::create_dir_all(&work)?;
    let bench = Bench {
        lora: ws.build_lora()?,
        python: python::reference(of_both.python(), &work, &ws.root.join(".libtorch-cache"), &python::PEFT)?,
        script: ws.root.join("tests/reference/peft_bench.py"),
        work,
        args,
    };
    let revision = first_line("git", &["rev-parse", "--short=12", "HEAD"]).unwrap_or_default();
    let mut page = format!(
        "# Beside PEFT\n\n`cargo xtask bench --against-peft`: this program and PEFT 0.21.2 with transformers 5.23.0 and torch 2.11.0 at the \
         same work, in turns, {} times each; medians, with the least and the most, and so of the pairs' ratios. r = 16 on all linear layers, AdamW, \
         float32. Revision {}; {}.\n",
        of_both.pairs(),
        revision,
        Host::read()?
    );
    for case in &args.against_peft {
        let text = bench.compare(*case, of_both.pairs())?;
        println!("{text}");
        page.push_str(&text);
    }
    match &args.page {
        Some(path) => fs::write(path, page).with_context(|| format!("cannot write {}", path.display())),
        None => Ok(()),
    }
}

impl Bench<'_> {
    fn compare(&self, case: Case, pairs: usize) -> Result<String> {
        let model = self.model(case.shape())?;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for pair in 1..=pairs {
            // Theirs goes first: it leaves the adapter and the tokens that both begin with.
            theirs.push(self.theirs(case, &model)?);
            ours.push(self.ours(case, &model)?);
            let (name, unit, _) = case.figures()[0];
            let (a, b) = (figure(&ours[pair - 1], name)?, figure(&theirs[pair - 1], name)?);
            eprintln!("{}, {pair} of {pairs}: {a:.2} and {b:.2} {unit}", case.title());
        }
        let mut text = format!("\n## {}\n\n| | here | PEFT | ratio |\n| --- | ---: | ---: | ---: |\n", case.title());
        for (name, unit, more_is_better) in case.figures() {
            let (own, other) = (figures(&ours, name)?, figures(&theirs, name)?);
            // Of each pair: what slows the machine down for a while slows both down.
            let ratios = own.iter().zip(&other).map(|(a, b)| if *more_is_better { a / b } else { b / a });
            let (ratio, own, other) = (Spread::of(ratios.collect())?, Spread::of(own)?, Spread::of(other)?);
            let way = if *more_is_better { "more" } else { "less" };
            writeln!(text, "| {unit} | {own} | {other} | {ratio} times {way} |")?;
        }
        if let Some(off) = ours.iter().zip(&theirs).filter_map(|(a, b)| apart(a, b)).max_by(f64::total_cmp) {
            writeln!(text, "\nLosses of the steps differ by at most {off:.1e}.")?;
            ensure!(off < 1e-3, "{}: losses differ by {off}: this was not the same work", case.title());
        }
        if let Some(padding) = theirs.first().and_then(|run| run["padding"].as_f64()) {
            writeln!(text, "\nPadding there: {:.0} %.", 100.0 * padding)?;
        }
        Ok(text)
    }

    /// The folder of a model with random weights, and with the tokenizer where there is one.
    fn model(&self, shape: &Shape) -> Result<PathBuf> {
        let dir = self.work.join(shape.name);
        if !dir.exists() {
            let config = self.work.join(format!("{}.json", shape.name));
            fs::write(&config, shape.config().to_string())?;
            let mut command = Command::new(&self.lora);
            command.args(["init-model", "--dtype", shape.dtype, "--config"]).arg(&config).arg("--output").arg(&dir);
            capture(&mut command)?;
        }
        if let Some(tokenizer) = &self.args.tokenizer {
            fs::copy(tokenizer.join("tokenizer.json"), dir.join("tokenizer.json"))
                .with_context(|| format!("--tokenizer {}", tokenizer.display()))?;
            fs::write(dir.join("tokenizer_config.json"), r#"{"eos_token": "<|endoftext|>"}"#)?;
        }
        Ok(dir)
    }

    fn theirs(&self, case: Case, model: &Path) -> Result<Value> {
        let mut command = Command::new(&self.python);
        command.env("HF_HUB_OFFLINE", "1").arg(&self.script);
        let start = self.start(case)?;
        let batch = case.batch().to_string();
        match case {
            Case::Ragged | Case::Start => {
                command.arg("ragged").arg(model).args([
                    "--batch",
                    "8",
                    "--steps",
                    if case == Case::Start { "0" } else { "8" },
                ]);
                command.arg("--data").args(&self.args.instructions).arg("--tokenizer").args(&self.args.tokenizer);
            }
            Case::Generate => {
                command.arg("generate").arg(model).arg("--tokenizer").args(&self.args.tokenizer);
            }
            Case::Merge => {
                command.arg("merge").arg(model).arg("--adapter").arg(start.join("adapter"));
                command.arg("--output").arg(self.fresh("merged")?);
            }
            _ => {
                command.arg("step").arg(model).args(["--batch", &batch, "--start"]).arg(&start);
                command.args((case == Case::Full).then_some("--full"));
                command.args(case.checkpoints().then_some("--checkpointing"));
            }
        }
        if case == Case::Start {
            return timed(&mut command);
        }
        last_object(&capture(&mut command)?)
    }

    fn ours(&self, case: Case, model: &Path) -> Result<Value> {
        let mut command = Command::new(&self.lora);
        let start = self.start(case)?;
        match case {
            Case::Ragged | Case::Start => {
                let out = self.fresh("run")?;
                let steps = if case == Case::Start { 1 } else { 9 };
                self.train(&mut command, model, &out, steps);
                let whole = timed(&mut command)?;
                return if case == Case::Start { Ok(whole) } else { steps_after_the_first(&out) };
            }
            Case::Generate => {
                let prompt = "The quick brown fox jumps over the lazy dog. ".repeat(8);
                command.args([
                    "generate",
                    "--json",
                    "--raw",
                    "--device",
                    "cpu",
                    "--max-new-tokens",
                    "64",
                    "--prompt",
                    &prompt,
                ]);
                command.arg("--model").arg(model);
                let report = last_object(&capture(&mut command)?)?;
                return Ok(json!({"tok_s": report["tokens_per_second"]}));
            }
            Case::Merge => {
                command.args(["merge", "--model"]).arg(model).arg("--adapter").arg(start.join("adapter"));
                command.arg("--output").arg(self.fresh("merged")?);
                return timed(&mut command);
            }
            _ => {}
        }
        command.args([
            "bench",
            "step",
            "--json",
            "--device",
            "cpu",
            "--seq",
            "512",
            "--batch",
            &case.batch().to_string(),
        ]);
        command.arg("--model").arg(model).arg("--input").arg(start.join("input.safetensors"));
        command.args(case.settings());
        match case {
            Case::Full => command.arg("--full"),
            _ => command.arg("--init-adapter").arg(start.join("adapter")),
        };
        last_object(&capture(&mut command)?)
    }

    /// A short run on the instructions, packed.
    fn train(&self, command: &mut Command, model: &Path, out: &Path, steps: u64) {
        command.args(["train", "--quiet", "--device", "cpu", "--model"]).arg(model).arg("--output").arg(out);
        command.arg("--data").args(&self.args.instructions);
        let steps = format!("train.max_steps={steps}");
        for setting in [
            steps.as_str(),
            "data.template=alpaca",
            "data.max_length=512",
            "data.packing=true",
            "data.cache=never",
            "lora.r=16",
            "lora.lora_alpha=32",
            "lora.target_modules=all-linear",
            // Steps of four rows: where nothing is padded, one row at a time is as fast, and a quarter of the activations.
            "train.per_device_train_batch_size=1",
            "train.gradient_accumulation_steps=4",
            "train.logging_steps=1",
            "train.sample_count=0",
        ] {
            command.args(["--set", setting]);
        }
    }

    /// Where theirs leaves what both begin with.
    fn start(&self, case: Case) -> Result<PathBuf> {
        let dir = self.work.join(format!("start-{}", case.shape().name));
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// A folder that is not there.
    fn fresh(&self, name: &str) -> Result<PathBuf> {
        let dir = self.work.join(name);
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        Ok(dir)
    }
}

/// Seconds of a whole process.
fn timed(command: &mut Command) -> Result<Value> {
    let start = Instant::now();
    capture(command)?;
    Ok(json!({"seconds": start.elapsed().as_secs_f64()}))
}

/// The object of JSON that a program printed last.
fn last_object(text: &str) -> Result<Value> {
    let at = text.rfind("\n{").map_or(0, |at| at + 1);
    serde_json::from_str(&text[at..]).with_context(|| format!("no report: {text}"))
}

/// Tokens a second of the steps behind the first, and the peak of the run.
fn steps_after_the_first(out: &Path) -> Result<Value> {
    let path = out.join("metrics.jsonl");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let steps: Vec<&Value> = lines.iter().filter(|line| line.get("loss").is_some()).collect();
    let (Some(first), Some(last)) = (steps.first(), steps.last()) else { bail!("{}: no steps", path.display()) };
    let tokens: f64 = steps[1..].iter().map(|line| figure(line, "tokens")).sum::<Result<f64>>()?;
    let seconds = figure(last, "seconds")? - figure(first, "seconds")?;
    Ok(json!({"tok_s": tokens / seconds, "rss_mb": figure(last, "peak_memory_bytes")? / f64::from(1 << 20)}))
}

fn figure(report: &Value, name: &str) -> Result<f64> {
    report[name].as_f64().with_context(|| format!("no `{name}` in {report}"))
}

fn figures(reports: &[Value], name: &str) -> Result<Vec<f64>> {
    reports.iter().map(|report| figure(report, name)).collect()
}

/// The largest difference of the losses of two runs that tell them.
fn apart(a: &Value, b: &Value) -> Option<f64> {
    let pairs = a["losses"].as_array()?.iter().zip(b["losses"].as_array()?);
    pairs.filter_map(|(x, y)| Some((x.as_f64()? - y.as_f64()?).abs())).max_by(f64::total_cmp)
}

/// Several runs of one figure.
struct Spread {
    low: f64,
    median: f64,
    high: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Result<Self> {
        values.sort_by(f64::total_cmp);
        let (Some(low), Some(high)) = (values.first(), values.last()) else { bail!("no runs") };
        let n = values.len();
        Ok(Self { low: *low, median: f64::midpoint(values[(n - 1) / 2], values[n / 2]), high: *high })
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let places = if self.high < 10.0 { 2 } else { usize::from(self.high < 1000.0) };
        let Self { low, median, high } = self;
        write!(f, "{median:.places$}")?;
        if low < high {
            write!(f, " ({low:.places$} to {high:.places$})")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_the_last_object() {
        assert_eq!(last_object("a word\n{\"a\": 1}\n").unwrap()["a"], 1);
        assert_eq!(last_object("{\n  \"a\": {\"b\": 2}\n}\n").unwrap()["a"]["b"], 2);
        assert!(last_object("none").is_err());
    }

    #[test]
    fn runs_are_told_by_their_median_and_ends() {
        let told = |values: &[f64]| Spread::of(values.to_vec()).map(|spread| spread.to_string());
        assert_eq!(told(&[3.0, 1.0, 2.0]).unwrap(), "2.00 (1.00 to 3.00)");
        assert_eq!(told(&[300.0, 100.0]).unwrap(), "200.0 (100.0 to 300.0)");
        assert_eq!(told(&[1.5]).unwrap(), "1.50");
        assert!(told(&[]).is_err());
        assert!(figures(&[json!({"tok_s": 1.0})], "seconds").is_err());
    }

    #[test]
    fn losses_are_compared_where_both_tell_them() {
        let of = |losses: &[f64]| json!({"losses": losses});
        assert_eq!(apart(&of(&[1.0, 2.0]), &of(&[1.5, 2.25])), Some(0.5));
        assert_eq!(apart(&of(&[1.0]), &json!({})), None);
    }

    #[test]
    fn the_steps_behind_the_first_count() {
        let out = std::env::temp_dir().join(format!("against-peft-{}", std::process::id()));
        std::fs::create_dir_all(&out).unwrap();
        let line = |seconds: f64| json!({"loss": 1.0, "tokens": 100, "seconds": seconds, "peak_memory_bytes": 2 << 20});
        let text: String = [5.0, 6.0, 7.0].map(|s| format!("{}\n", line(s))).concat();
        std::fs::write(out.join("metrics.jsonl"), text).unwrap();
        let report = steps_after_the_first(&out).unwrap();
        assert_eq!((report["tok_s"].as_f64(), report["rss_mb"].as_f64()), (Some(100.0), Some(2.0)));
        std::fs::remove_dir_all(&out).unwrap();
    }
}
