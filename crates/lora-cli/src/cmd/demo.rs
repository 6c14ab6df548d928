//! `lora demo`: trains the example that comes with the program, and shows what it could do before and can do after.

mod score;

use crate::compute::Compute;
use crate::failure::usage;
use crate::interrupt::stop_on_signals;
use crate::load::{Wanted, load};
use crate::out;
use crate::summary::PlanSummary;
use crate::train_view::TrainView;
use anyhow::{Result, bail};
use lora_format::ADAPTER_WEIGHTS;
use lora_train::checkpoint::has_checkpoints;
use lora_train::{Override, RunConfig, RunPlan, RunReport, TrainOptions, train};
use score::{Score, TestSet};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Answers that are shown side by side.
const SAMPLES: usize = 3;
const CONFIG: &str = "demo.toml";

/// The flags of `lora demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the example; found beside the program or in the current folder when absent
    #[arg(long, value_name = "DIR")]
    assets: Option<PathBuf>,
    /// Folder of the run; a new one below runs when absent
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Set any key of the configuration, as train.max_steps=50
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// What the example showed.
#[derive(Serialize)]
struct DemoReport {
    run: RunReport,
    before: Score,
    after: Score,
    base_bytes: u64,
    adapter_bytes: u64,
    trained_share: f64,
    /// Everything, from the start of the program to the last answer.
    seconds: f64,
}

/// Runs the verb.
///
/// # Errors
/// When the example is not found, or what the run reports.
pub(crate) fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let assets = assets(args)?;
    let config = config(args, &assets)?;
    let tests = TestSet::read(&assets.join("test.jsonl"))?;
    let base = assets.join("base");

    let mut view = TrainView::new(false);
    let plan = RunPlan::resolve(config, &mut view)?;
    out::note(format!("{}\n", PlanSummary::of(&plan)));
    out::note(format!("the base model answers {} questions it was never trained for", tests.len()));
    let compute = Compute { device: plan.config.model.device.clone(), ..Compute::default() };
    let before =
        tests.score(&load(&base, &[], &[], &compute, Wanted::Language("generate text"))?.model, &plan.tokenizer)?;

    let stop = stop_on_signals()?;
    let (report, trainer) = train(plan, &TrainOptions::default(), &stop, &mut view)?;
    view.finish();
    if stop.load(Ordering::Relaxed) {
        bail!(
            "stopped at step {} of {}; nothing is lost: {}",
            report.steps,
            report.total_steps,
            report.output_dir.display()
        );
    }
    out::note("the trained model answers them");
    let after = tests.score(trainer.model(), &trainer.plan().tokenizer)?;
    let size = |path: PathBuf| std::fs::metadata(path).map_or(0, |m| m.len());
    let demo = DemoReport {
        base_bytes: size(base.join("model.safetensors")),
        adapter_bytes: size(report.output_dir.join(ADAPTER_WEIGHTS)),
        trained_share: report.trained_parameters as f64 / report.base_parameters as f64,
        run: report,
        before,
        after,
        seconds: start.elapsed().as_secs_f64(),
    };
    if args.json { out::json(&demo) } else { show(&demo, &tests, &base) }
}

/// The folder of the example: the one that was named, else `demo` here, else one above the program.
fn assets(args: &Args) -> Result<PathBuf> {
    if let Some(dir) = &args.assets {
        let found = dir.join(CONFIG).is_file();
        return if found {
            Ok(dir.clone())
        } else {
            Err(usage(format!("--assets {}: has no {CONFIG}", dir.display())))
        };
    }
    let program = std::env::current_exe().unwrap_or_default();
    let mut places = vec![PathBuf::from("demo")];
    places.extend(program.ancestors().skip(1).flat_map(|dir| [dir.join("demo"), dir.join("share/lora/demo")]));
    places.into_iter().find(|dir| dir.join(CONFIG).is_file()).ok_or_else(|| {
        usage(format!(
            "no folder demo with a {CONFIG} was found here or above {}; name it with --assets",
            program.display()
        ))
    })
}

/// The example's configuration, with its paths made those of `assets`.
fn config(args: &Args, assets: &Path) -> Result<RunConfig> {
    let text = |path: &Path| {
        path.to_str().map(str::to_string).ok_or_else(|| usage(format!("{}: the path must be UTF-8", path.display())))
    };
    let mut overrides = vec![
        Override::text("model.path", text(&assets.join("base"))?),
        Override::text("data.train", text(&assets.join("train.jsonl"))?),
        Override::text("data.eval", text(&assets.join("eval.jsonl"))?),
    ];
    overrides.extend(args.set.iter().map(|s| s.parse()).collect::<Result<Vec<Override>, _>>()?);
    let output = match &args.output {
        Some(dir) => dir.clone(),
        None => free_folder(Path::new("runs/demo"))?,
    };
    overrides.push(Override::text("output_dir", text(&output)?));
    Ok(RunConfig::load(Some(&assets.join(CONFIG)), &overrides)?)
}

/// The folder, or the first of `-2`, `-3`, ... that holds no run: the example may be run again and again.
fn free_folder(wanted: &Path) -> Result<PathBuf> {
    let mut folder = wanted.to_path_buf();
    for i in 2.. {
        if !has_checkpoints(&folder)? {
            break;
        }
        folder = wanted.with_file_name(format!("{}-{i}", wanted.file_name().unwrap_or_default().to_string_lossy()));
    }
    Ok(folder)
}

fn show(demo: &DemoReport, tests: &TestSet, base: &Path) -> Result<()> {
    for (i, (before, after)) in demo.before.answers.iter().zip(&demo.after.answers).take(SAMPLES).enumerate() {
        let (prompt, wanted) = tests.question(i);
        out::line(format!("prompt    {}", one_line(prompt)))?;
        out::line(format!("  before  {}", one_line(before)))?;
        out::line(format!("  after   {}", one_line(after)))?;
        out::line(format!("  wanted  {}\n", one_line(wanted)))?;
    }
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let row = |name: &str, before: String, after: String| out::line(format!("{name:<32}{before:>12}{after:>12}"));
    row("", "before".into(), "after".into())?;
    if let (Some(before), Some(after)) = (demo.run.eval_before, demo.run.eval_after) {
        row("held-out loss", format!("{:.4}", before.loss), format!("{:.4}", after.loss))?;
    }
    row(
        &format!("slots named, of {}", demo.before.slots),
        percent(demo.before.slot_accuracy),
        percent(demo.after.slot_accuracy),
    )?;
    row(
        &format!("exact answers, of {}", tests.len()),
        percent(demo.before.exact_match),
        percent(demo.after.exact_match),
    )?;
    let (run_dir, base) = (demo.run.output_dir.display(), base.display());
    out::line(format!(
        "\ntrained {} of {} parameters ({}); the adapter has {}, the base model {}",
        out::count(demo.run.trained_parameters.unsigned_abs()),
        out::count(demo.run.base_parameters.unsigned_abs()),
        percent(demo.trained_share),
        out::bytes(demo.adapter_bytes),
        out::bytes(demo.base_bytes)
    ))?;
    out::line(format!("{} of training, {} in all\n", out::seconds(demo.run.seconds), out::seconds(demo.seconds)))?;
    let prompt = shell_quoted(tests.question(0).0);
    out::line(format!("try it    lora generate --model {base} --adapter {run_dir} --raw --prompt {prompt}"))?;
    out::line(format!("merge it  lora merge --model {base} --adapter {run_dir} --output {run_dir}-merged --verify"))?;
    out::line("your own  lora train --model DIR --data FILE.jsonl --output runs/mine")
}

fn one_line(text: &str) -> String {
    text.trim().replace('\n', " / ")
}

/// The text as one word of bash.
fn shell_quoted(text: &str) -> String {
    format!("$'{}'", text.replace('\\', "\\\\").replace('\'', "\\'").replace('\n', "\\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_a_run_is_not_taken_again() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = dir.path().join("demo");
        assert_eq!(free_folder(&wanted).unwrap(), wanted);
        std::fs::create_dir_all(wanted.join("checkpoints/step-5")).unwrap();
        std::fs::create_dir_all(dir.path().join("demo-2/checkpoints/step-5")).unwrap();
        assert_eq!(free_folder(&wanted).unwrap(), dir.path().join("demo-3"));
    }

    #[test]
    fn prompts_survive_a_shell() {
        assert_eq!(shell_quoted("name[it's]\n"), "$'name[it\\'s]\\n'");
    }
}
