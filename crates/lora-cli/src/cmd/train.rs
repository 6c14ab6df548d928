//! `lora train`: fine-tune a model on a dataset.

use crate::cmd::watch;
use crate::compute::DTYPES;
use crate::failure::{leave, usage};
use crate::fetching::{Part, prepare};
use crate::interrupt::stop_on_signals;
use crate::load::check_model_folder;
use crate::out;
use crate::summary::{PlanSummary, file_size};
use crate::team;
use crate::train_log::{LogFormat, View};
use crate::train_view::scores_in_words;
use anyhow::Result;
use lora_data::Format;
use lora_format::ADAPTER_WEIGHTS;
use lora_report::REPORT_FILE;
use lora_train::{
    EndedBy, EvalReport, Override, RunConfig, RunPlan, RunReport, Team, TrainOptions, Trained, WatchOptions, claim,
    train_claimed,
};
use std::path::PathBuf;

/// The flags of `lora train`. Flags go before --set, and --set before the configuration's file.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Configuration: TOML, or YAML by extension
    config: Option<PathBuf>,
    /// Base model: a folder, or a model of the hub as OWNER/NAME (model.path)
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Dataset: a file, a folder, a pattern, dataset_info.json#NAME or hf://OWNER/NAME (data.train)
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Folder of the run (output_dir)
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Set any key of the configuration, as train.learning_rate=1e-4
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Go on from the newest checkpoint of the output folder; without a CONFIG, with the run's own
    #[arg(long)]
    resume: bool,
    /// Check everything, show what would be done, and stop
    #[arg(long)]
    dry_run: bool,
    /// Train on each file that arrives in this folder, and publish what is not worse on data.eval as a version in output_dir
    #[arg(long, value_name = "DIR", conflicts_with_all = ["data", "resume", "dry_run"])]
    watch: Option<PathBuf>,
    /// With --watch: take up what is there and end, instead of waiting for more
    #[arg(long, requires = "watch")]
    once: bool,
    /// Print the configuration with every default written out, and stop
    #[arg(long)]
    print_config: bool,
    /// Show neither plan nor progress
    #[arg(long)]
    quiet: bool,
    /// How plan, progress and notes are written to stderr: for a reader, or for programs as a line of JSON each
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    log_format: LogFormat,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Where to compute (model.device)
    #[arg(long, help_heading = "Computing")]
    device: Option<String>,
    /// What the base model computes in (model.dtype)
    #[arg(long, value_parser = DTYPES, help_heading = "Computing")]
    dtype: Option<String>,
    /// Threads of one operation on the CPU (model.threads)
    #[arg(long, value_name = "N", help_heading = "Computing")]
    threads: Option<u16>,
}

/// Runs the verb.
///
/// # Errors
/// Every fault of the configuration and the data, or what the run reports.
pub(crate) fn run(args: &Args) -> Result<()> {
    let overrides = overrides(args)?;
    let file = config_file(args);
    let mut config = match &args.watch {
        Some(dir) => watch::configuration(file.as_deref(), dir, &overrides)?,
        None => RunConfig::load(file.as_deref(), &overrides)?,
    };
    if args.print_config {
        return out::text(&config.to_toml()?);
    }
    check_model_folder(&prepare(&mut config, Part::Whole, args.quiet)?)?;
    config.validate()?;
    if let Some(dir) = &args.watch {
        if team::launched()?.is_some() {
            return Err(usage("--watch trains in one process: start it without `lora launch` or another launcher"));
        }
        let options = WatchOptions { dir: dir.clone(), once: args.once };
        let view = View::new(args.log_format, args.quiet, config.train.logging_steps);
        return watch::run(config, &options, view, args.json);
    }
    let launch = if args.dry_run { None } else { team::launched()? };
    let team = team::meet(launch.as_ref(), &mut config).and_then(|team| match args.dry_run {
        true => Ok(team),
        false => Ok(team.check(&config).map(|()| team)?),
    });
    match team.and_then(|team| go(args, config, &overrides, team)) {
        Err(error) if launch.is_some() => leave(&error),
        done => done,
    }
}

fn go(args: &Args, config: RunConfig, overrides: &[Override], team: Team) -> Result<()> {
    let quiet = args.quiet || !team.leads();
    let mut view = View::new(args.log_format, quiet, config.train.logging_steps);
    // Before the data is read, which may take long; a dry run leaves the folder alone.
    let claimed = if args.dry_run || !team.leads() { Ok(None) } else { claim(&config.output_dir, args.resume) };
    let plan = claimed.and_then(|claimed| Ok((claimed, RunPlan::resolve(config, &mut view)?)));
    let (claimed, plan) = team.agree(plan)?;
    let summary = PlanSummary::of(&plan);
    if args.dry_run {
        return if args.json { out::json(&summary) } else { out::line(summary.to_string()) };
    }
    if !quiet {
        view.plan(&summary);
    }
    let next = Next::of(&plan);
    let stop = stop_on_signals()?;
    let changed = overrides.iter().map(Override::key).collect();
    let options = TrainOptions { resume: args.resume, changed, team: team.clone() };
    let trained = train_claimed(claimed, plan, &options, &stop, &mut view);
    view.finish();
    let (report, _) = trained?;
    match team.leads() {
        true if args.json => out::json(&report),
        true => out::line(closing(&report, &next)),
        false => Ok(()),
    }
}

/// The configuration's file: the one that was named, or the resumed run's own.
fn config_file(args: &Args) -> Option<PathBuf> {
    let own = || args.output.as_ref().map(|dir| dir.join("config.resolved.toml")).filter(|_| args.resume);
    args.config.clone().or_else(|| own().filter(|path| path.is_file()))
}

/// The settings of the command line, the most particular last.
fn overrides(args: &Args) -> Result<Vec<Override>> {
    let mut list = args.set.iter().map(|s| s.parse()).collect::<Result<Vec<Override>, _>>()?;
    for (key, flag, path) in [
        ("model.path", "--model", &args.model),
        ("data.train", "--data", &args.data),
        ("output_dir", "--output", &args.output),
    ] {
        if let Some(path) = path {
            let text =
                path.to_str().ok_or_else(|| usage(format!("{flag} {}: the path must be UTF-8", path.display())))?;
            list.push(Override::text(key, text));
        }
    }
    list.extend(args.device.as_ref().map(|device| Override::text("model.device", device)));
    list.extend(args.dtype.as_ref().map(|dtype| Override::text("model.dtype", dtype)));
    if let Some(threads) = args.threads {
        list.push(format!("model.threads={threads}").parse()?);
    }
    Ok(list)
}

/// What the commands after a run depend on.
struct Next {
    model: PathBuf,
    full: bool,
    /// Whether labels are predicted.
    classifies: bool,
    /// `--raw` where the prompts of the data were plain text and the tokenizer would render a message.
    raw: &'static str,
}

impl Next {
    fn of(plan: &RunPlan) -> Self {
        let plain = |format| matches!(format, Format::PromptCompletion | Format::Text | Format::Tokenized);
        let raw = plan.tokenizer.template().is_some() && plan.train_report.sources.iter().any(|s| plain(s.format));
        Self {
            model: PathBuf::from(&plan.config.model.path),
            full: matches!(plan.trained, Trained::Everything),
            classifies: plan.model.labels.is_some(),
            raw: if raw { " --raw" } else { "" },
        }
    }

    /// What tries the result, and the flag that takes a text.
    fn verb(&self) -> (&'static str, &'static str) {
        if self.classifies { ("lora classify", "--text") } else { ("lora generate", "--prompt") }
    }
}

/// What came of it, and what to type next.
fn closing(report: &RunReport, next: &Next) -> String {
    let (out_dir, model, raw) = (report.output_dir.display(), next.model.display(), next.raw);
    let why = match report.ended_by {
        EndedBy::Steps | EndedBy::Interrupt | EndedBy::Hook => "",
        EndedBy::EarlyStopping => " (no better evaluation)",
        EndedBy::MaxTime => " (max_time)",
    };
    let mut lines = vec![format!(
        "{} after step {} of {}{why}: {} tokens ({} trained) in {}",
        report.status,
        report.steps,
        report.total_steps,
        out::count(report.tokens),
        out::count(report.trained_tokens),
        out::seconds(report.seconds)
    )];
    match (report.eval_before, report.eval_after) {
        (Some(before), Some(after)) => {
            let reward = |r: EvalReport| r.rewards.and_then(|rewards| rewards.mean);
            lines.push(match (reward(before), reward(after)) {
                (Some(before), Some(after)) => format!("held-out reward {before:.4} -> {after:.4}"),
                _ => format!("held-out loss {:.4} -> {:.4}", before.loss, after.loss),
            });
            let accuracy = |r: EvalReport| r.classes.and_then(|c| c.accuracy);
            if let (Some(before), Some(after)) = (accuracy(before), accuracy(after)) {
                lines.push(format!("held-out accuracy {before:.4} -> {after:.4}"));
            }
            if let (Some(before), Some(after)) = (before.generated, after.generated) {
                lines.push(format!("answers before {}", scores_in_words(&before)));
                lines.push(format!("answers after  {}", scores_in_words(&after)));
            }
            let margin = |r: EvalReport| r.rewards.and_then(|rewards| rewards.margin);
            if let (Some(before), Some(after)) = (margin(before), margin(after)) {
                lines.push(format!("held-out reward margin {before:.4} -> {after:.4}"));
            }
        }
        (None, Some(after)) => lines.push(format!("held-out loss {:.4}", after.loss)),
        _ => lines.extend(report.loss.map(|loss| format!("loss of the last step {loss:.4}"))),
    }
    if report.skipped_steps > 0 {
        lines.push(format!("{} steps were left out, because they were not finite", report.skipped_steps));
    }
    lines.push(format!("page         {}", report.output_dir.join(REPORT_FILE).display()));
    if report.status != "finished" {
        lines.push(match report.steps {
            0 => "nothing was trained, and nothing saved: start again without --resume".to_string(),
            _ => format!("go on with   lora train --resume --output {out_dir}"),
        });
        if report.ended_by == EndedBy::Interrupt {
            return lines.join("\n");
        }
    }
    if next.full {
        lines.push(format!("model        {out_dir}  ({})", file_size(&report.output_dir.join("model.safetensors"))));
        lines.push(format!("try it       {} --model {out_dir}{raw} {} \"...\"", next.verb().0, next.verb().1));
        return lines.join("\n");
    }
    lines.push(format!("adapter      {out_dir}  ({})", file_size(&report.output_dir.join(ADAPTER_WEIGHTS))));
    lines.push(format!(
        "try it       {} --model {model} --adapter {out_dir}{raw} {} \"...\"",
        next.verb().0,
        next.verb().1
    ));
    lines.push(format!(
        "merge it     lora merge --model {model} --adapter {out_dir} --output {out_dir}-merged --verify"
    ));
    lines.join("\n")
}
