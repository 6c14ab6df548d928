//! `bench --against-full`: LoRA and full fine-tuning by the same trainer, on the same examples in the same order, each with
//! the best of several learning rates.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cargo::{Workspace, capture};
use crate::setup;

/// What is compared.
#[derive(clap::Args)]
pub struct Args {
    /// Compare LoRA with full fine-tuning: a folder of E2E's `train.txt` and `valid.txt`, lines of `record||sentence`
    #[arg(long, value_name = "DIR", requires = "base", conflicts_with_all = ["report", "filter", "compare", "against_datasets"])]
    against_full: Option<PathBuf>,
    /// Folder of the base model
    #[arg(long, value_name = "DIR", requires = "against_full")]
    base: Option<PathBuf>,
    /// Optimizer steps of each run, of 16 examples
    #[arg(long, default_value_t = 200)]
    steps: u64,
    /// Ranks of LoRA; lora_alpha is twice each
    #[arg(long, value_delimiter = ',', default_value = "8")]
    ranks: Vec<u32>,
    /// Learning rates of LoRA
    #[arg(long, value_delimiter = ',', default_value = "2e-3,5e-3,1e-2")]
    lora_rates: Vec<f64>,
    /// Learning rates of full fine-tuning
    #[arg(long, value_delimiter = ',', default_value = "5e-4,1e-3,2e-3")]
    full_rates: Vec<f64>,
    /// Write the table as a Markdown page, too
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
}

impl Args {
    /// Data and base, where this comparison was asked for.
    pub fn wanted(&self) -> Option<(&Path, &Path)> {
        self.against_full.as_deref().zip(self.base.as_deref())
    }
}

/// Examples of a step.
const BATCH: usize = 16;
/// Held-out examples.
const HELD_OUT: usize = 512;
/// Held-out records that are put into words, each against all its sentences.
const WRITTEN: usize = 100;

/// What a run came to.
struct Outcome {
    method: &'static str,
    /// Of LoRA.
    r: Option<u32>,
    rate: f64,
    trained: f64,
    before: f64,
    loss: f64,
    bleu: f64,
    rouge_l: f64,
    seconds: f64,
    peak: f64,
    result: u64,
    checkpoint: u64,
}

/// Trains with every rate and prints what came of it.
pub fn run(ws: &Workspace, args: &Args, data: &Path, base: &Path) -> Result<()> {
    setup::ensure(ws)?;
    let lora = ws.build_lora()?;
    let work = ws.target()?.join("against-full");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    fs::create_dir_all(&work)?;
    let wanted = args.steps as usize * BATCH;
    let (train, held_out) = (records(&data.join("train.txt"))?, records(&data.join("valid.txt"))?);
    ensure!(train.len() >= wanted, "{} examples, and {wanted} are needed; lower --steps", train.len());
    // Records that are alike stand together, so they are taken from all over the file.
    let apart = train.len() / wanted;
    write_rows(&work.join("train.jsonl"), train.iter().step_by(apart).take(wanted))?;
    write_rows(&work.join("eval.jsonl"), held_out.iter().take(HELD_OUT))?;
    let mut outcomes = Vec::new();
    let adapted = args.ranks.iter().map(|r| (Some(*r), &args.lora_rates));
    for (r, rates) in adapted.chain([(None, &args.full_rates)]) {
        for rate in rates {
            let outcome = train_once(&lora, &work, base, r, *rate, args.steps)?;
            println!("{}", row(&outcome));
            outcomes.push(outcome);
        }
    }
    let page = page(&outcomes, args.steps)?;
    println!("\n{page}");
    if let Some(path) = &args.page {
        fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn train_once(lora: &Path, work: &Path, base: &Path, r: Option<u32>, rate: f64, steps: u64) -> Result<Outcome> {
    let method = if r.is_some() { "lora" } else { "full" };
    let out = work.join(format!("{method}-{}-{rate:e}", r.unwrap_or_default()));
    let mut command = Command::new(lora);
    command.args(["train", "--quiet", "--device", "cpu", "--model"]).arg(base);
    command.arg("--data").arg(work.join("train.jsonl")).arg("--output").arg(&out);
    let eval = format!("data.eval={}", work.join("eval.jsonl").display());
    let settings = [
        format!("train.finetuning_type={method}"),
        format!("train.learning_rate={rate}"),
        format!("train.max_steps={steps}"),
        format!("train.per_device_train_batch_size={BATCH}"),
        format!("train.generation_num_samples={WRITTEN}"),
        format!("train.save_steps={steps}"),
    ];
    let fixed = [
        "data.max_length=256",
        "data.cache=never",
        "train.predict_with_generate=true",
        "train.generation_max_new_tokens=80",
        "train.lr_scheduler_type=linear",
        "train.warmup_ratio=0.05",
        "train.weight_decay=0",
        "train.sample_count=0",
    ];
    let of_lora = r.map(|r| {
        [format!("lora.r={r}"), format!("lora.lora_alpha={}", 2 * r), "lora.target_modules=all-linear".to_owned()]
    });
    for setting in std::iter::once(eval.as_str())
        .chain(settings.iter().map(String::as_str))
        .chain(fixed)
        .chain(of_lora.iter().flatten().map(String::as_str))
    {
        command.args(["--set", setting]);
    }
    capture(&mut command)?;
    let lines = lines(&out.join("metrics.jsonl"))?;
    let evaluations: Vec<&Value> = lines.iter().filter(|line| line.get("eval_loss").is_some()).collect();
    let last_step = lines.iter().rfind(|line| line.get("loss").is_some()).context("a run without a step")?;
    let (first, last) = evaluations.first().zip(evaluations.last()).context("a run without an evaluation")?;
    let about: Value = serde_json::from_str(&fs::read_to_string(out.join("run.json"))?)?;
    let number = |line: &Value, key: &str| line[key].as_f64().with_context(|| format!("no `{key}` in {line}"));
    let result = if method == "lora" { "adapter_model.safetensors" } else { "model.safetensors" };
    Ok(Outcome {
        method,
        r,
        rate,
        trained: number(&about, "trained_parameters")?,
        before: number(first, "eval_loss")?,
        loss: number(last, "eval_loss")?,
        bleu: number(last, "eval_bleu")?,
        rouge_l: number(last, "eval_rouge_l")?,
        seconds: number(last_step, "seconds")?,
        peak: number(last_step, "peak_memory_bytes")?,
        result: fs::metadata(out.join(result))?.len(),
        checkpoint: folder_bytes(&out.join(format!("checkpoints/step-{steps}")))?,
    })
}

/// Lines of `record||sentence`.
fn records(path: &Path) -> Result<Vec<(String, String)>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let split = |line: &str| line.split_once("||").map(|(r, s)| (r.trim().to_string(), s.trim().to_string()));
    Ok(text.lines().filter_map(split).collect())
}

fn write_rows<'a>(path: &Path, rows: impl Iterator<Item = &'a (String, String)>) -> Result<()> {
    let line = |(record, sentence): &(String, String)| {
        format!("{}\n", json!({"prompt": format!("{record}\n"), "completion": sentence}))
    };
    Ok(fs::write(path, rows.map(line).collect::<String>())?)
}

fn lines(path: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

fn folder_bytes(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        bytes += entry?.metadata()?.len();
    }
    Ok(bytes)
}

/// What was trained, and by which rank.
fn name(o: &Outcome) -> String {
    o.r.map_or_else(|| o.method.to_owned(), |r| format!("{}, r {r}", o.method))
}

fn row(o: &Outcome) -> String {
    format!(
        "| {} | {:e} | {:.0} | {:.4} | {:.2} | {:.4} | {:.1} | {:.1} | {:.0} | {:.0} |",
        name(o),
        o.rate,
        o.trained,
        o.loss,
        o.bleu,
        o.rouge_l,
        o.seconds,
        o.peak / 1e6,
        o.result as f64 / 1e3,
        o.checkpoint as f64 / 1e3
    )
}

/// Every run, and the best of each method beside each other.
fn page(outcomes: &[Outcome], steps: u64) -> Result<String> {
    let mut text = format!(
        "# LoRA beside full fine-tuning\n\nE2E, {steps} steps of {BATCH} examples, the same in the same order; held out are {HELD_OUT} lines \
         of `valid.txt`, and {WRITTEN} of their records are put into words (most likely token each time) and compared with all their \
         sentences. LoRA has lora_alpha = 2 r on every linear layer. AdamW, linear schedule after 5 % of warm-up, no decay, \
         norm clipped at 1. Made by `cargo xtask bench --against-full`.\n\nHeld-out loss before: {:.4}.\n\n",
        outcomes.first().map_or(f64::NAN, |o| o.before)
    );
    text.push_str(
        "| | learning rate | trained | held-out loss | BLEU | ROUGE-L | s in steps | peak MB | result kB | checkpoint kB |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for outcome in outcomes {
        writeln!(text, "{}", row(outcome))?;
    }
    let best = |r: Option<u32>| {
        let of = outcomes.iter().filter(|o| o.r == r);
        of.min_by(|a, b| a.loss.total_cmp(&b.loss)).with_context(|| format!("no run of rank {r:?}"))
    };
    let full = best(None)?;
    let mut ranks: Vec<u32> = outcomes.iter().filter_map(|o| o.r).collect();
    ranks.dedup();
    let adapted = ranks.into_iter().map(|r| best(Some(r))).collect::<Result<Vec<_>>>()?;
    for one in adapted.iter().copied().chain([full]) {
        let rates = || outcomes.iter().filter(|o| o.r == one.r).map(|o| o.rate);
        let (low, high) = (rates().fold(f64::MAX, f64::min), rates().fold(0.0, f64::max));
        if low < high && (one.rate == low || one.rate == high) {
            let name = name(one);
            writeln!(
                text,
                "\nOf {name} the best rate is at the edge of those that were tried: another may be better."
            )?;
        }
    }
    for lora in adapted {
        writeln!(
            text,
            "\nBest of {} and full: loss {:.4} and {:.4}, BLEU {:.2} and {:.2}; LoRA trains {:.1} % as many parameters, takes {:.2} times \
             the seconds, {:.2} times the memory, and saves {:.1} % of the bytes of the result and {:.1} % of a checkpoint's.",
            name(lora),
            lora.loss,
            full.loss,
            lora.bleu,
            full.bleu,
            100.0 * lora.trained / full.trained,
            lora.seconds / full.seconds,
            lora.peak / full.peak,
            100.0 * (1.0 - lora.result as f64 / full.result as f64),
            100.0 * (1.0 - lora.checkpoint as f64 / full.checkpoint as f64)
        )?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(method: &'static str, rate: f64, loss: f64) -> Outcome {
        Outcome {
            method,
            r: (method == "lora").then_some(8),
            rate,
            trained: if method == "lora" { 10.0 } else { 100.0 },
            before: 5.0,
            loss,
            bleu: 20.0,
            rouge_l: 0.5,
            seconds: 2.0,
            peak: 3e6,
            result: if method == "lora" { 1000 } else { 4000 },
            checkpoint: 8000,
        }
    }

    #[test]
    fn the_best_of_each_are_compared() {
        let all = [
            outcome("lora", 1e-3, 2.0),
            outcome("lora", 2e-3, 1.5),
            outcome("full", 1e-3, 1.25),
            outcome("full", 5e-4, 1.75),
        ];
        let page = page(&all, 7).unwrap();
        assert!(page.contains("loss 1.5000 and 1.2500") && page.contains("10.0 % as many parameters"), "{page}");
        assert!(page.contains("75.0 % of the bytes") && page.contains("| lora, r 8 | 2e-3 | 10 | 1.5000 |"), "{page}");
        // Of two rates either is at the edge.
        assert!(
            page.contains("Of lora, r 8 the best rate is at the edge") && page.contains("Of full the best"),
            "{page}"
        );
        assert!(super::page(&all[..2], 7).is_err());
    }

    #[test]
    fn records_are_lines_with_both_parts() {
        let dir = std::env::temp_dir().join(format!("against-full-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("x.txt"), "a : b||It is b . \nnothing\n").unwrap();
        assert_eq!(records(&dir.join("x.txt")).unwrap(), [("a : b".to_string(), "It is b .".to_string())]);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
