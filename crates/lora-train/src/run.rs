//! THE loop: steps, evaluations, checkpoints, and what is left at the end.

use crate::error::{Error, Result};
use crate::eval::EvalReport;
use crate::events::{Event, EventSink};
use crate::journal::Journal;
use crate::lock::RunLock;
use crate::metrics::EvalRecord;
use crate::plan::RunPlan;
use crate::samples::Samples;
use crate::trainer::{BEST_FOLDER, StepOutcome, Trainer};
use lora_format::{copy_atomic, read_json_object, write_atomic};
use lora_report::Status;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// How a run is started.
#[derive(Clone, Debug, Default)]
pub struct TrainOptions {
    /// Go on from the newest checkpoint of the output folder.
    pub resume: bool,
    /// Keys that the user set on the command line: the harmless ones may differ from the checkpoint's.
    pub changed: Vec<String>,
}

/// What a run came to.
#[derive(Clone, Debug, Serialize)]
pub struct RunReport {
    /// `finished`, or `stopped` when it was asked to stop.
    pub status: &'static str,
    /// Where the result is.
    pub output_dir: PathBuf,
    /// Optimizer steps done.
    pub steps: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
    /// Steps left out because they were not finite.
    pub skipped_steps: u64,
    /// Seconds spent in steps.
    pub seconds: f64,
    /// Tokens computed.
    pub tokens: u64,
    /// Trained tokens.
    pub trained_tokens: u64,
    /// Loss of the last step.
    pub loss: Option<f64>,
    /// Evaluation before the first step.
    pub eval_before: Option<EvalReport>,
    /// Evaluation after the last.
    pub eval_after: Option<EvalReport>,
    /// Trained parameters.
    pub trained_parameters: i64,
    /// Parameters of the base model.
    pub base_parameters: i64,
}

/// Trains until the plan's last step, or until `stop` is set; the step in progress is finished and saved either way.
///
/// # Errors
/// What any part reports; older checkpoints are intact then.
pub fn train(
    plan: RunPlan,
    options: &TrainOptions,
    stop: &AtomicBool,
    sink: &mut dyn EventSink,
) -> Result<(RunReport, Trainer)> {
    let out = plan.config.output_dir.clone();
    let mut samples = Samples::of(&plan)?;
    let _lock = RunLock::acquire(&out)?;
    if !options.resume {
        refuse_to_overwrite(&plan)?;
    }
    let resolved = plan.config.to_toml()?;
    let mut trainer = Trainer::new(plan, sink)?;
    if options.resume {
        trainer.resume(&options.changed, sink)?;
    }
    write_atomic(&out.join("config.resolved.toml"), resolved.as_bytes())?;
    let mut journal = Journal::open(&trainer, &resolved, sink)?;
    samples.allow(&trainer, journal.matrix_rate());
    let (total, config) = (trainer.plan().total_steps, trainer.plan().config.train.clone());
    sink.event(Event::Started { step: trainer.state().step, total_steps: total });
    let eval_before = if trainer.state().step == 0 { evaluate(&mut trainer, &mut journal, sink)? } else { None };
    if trainer.state().step == 0 {
        samples.take(&trainer, stop, sink);
    }
    journal.page(&trainer, Status::Running, sink);

    let (mut loss, mut eval_after, mut saved) = (None, None, trainer.state().step);
    while trainer.state().step < total && !trainer.has_stalled() && !stop.load(Ordering::Relaxed) {
        match trainer.step()? {
            StepOutcome::Updated(record) => {
                loss = Some(record.loss);
                if record.step.is_multiple_of(config.logging_steps) || record.step == total {
                    journal.step(&record)?;
                }
                sink.event(Event::Step(record));
            }
            StepOutcome::Skipped { step, loss, grad_norm } => sink.event(Event::Skipped { step, loss, grad_norm }),
        }
        let step = trainer.state().step;
        let due = |every: u64| every > 0 && step.is_multiple_of(every);
        if due(config.eval_steps) || step == total {
            eval_after = evaluate(&mut trainer, &mut journal, sink)?;
            journal.page(&trainer, Status::Running, sink);
        }
        if due(config.save_steps) {
            saved = save(&trainer, &mut journal, sink)?;
        }
    }
    let state = trainer.state().clone();
    if saved != state.step {
        save(&trainer, &mut journal, sink)?;
    }
    let stalled = trainer.has_stalled() && state.step < total;
    let finished = stalled || state.step >= total;
    if stalled {
        sink.event(Event::Note(format!(
            "ended at step {} of {total}: {} evaluations in a row were not better",
            state.step, state.evals_since_best
        )));
    }
    if finished {
        write_outputs(&trainer)?;
        samples.take(&trainer, stop, sink);
    }
    journal.page(&trainer, if finished { Status::Finished } else { Status::Stopped }, sink);
    let report = RunReport {
        status: if finished { "finished" } else { "stopped" },
        output_dir: out,
        steps: state.step,
        total_steps: total,
        skipped_steps: state.skipped_steps,
        seconds: state.seconds,
        tokens: state.tokens,
        trained_tokens: state.trained_tokens,
        loss,
        eval_before,
        eval_after,
        trained_parameters: trainer.params().len(),
        base_parameters: trainer.plan().base_parameters(),
    };
    Ok((report, trainer))
}

/// A folder with checkpoints of an earlier run is never written over.
fn refuse_to_overwrite(plan: &RunPlan) -> Result<()> {
    let path = &plan.config.output_dir;
    match crate::checkpoint::has_checkpoints(path)? {
        true => Err(Error::OutputTaken { path: path.clone() }),
        false => Ok(()),
    }
}

fn evaluate(trainer: &mut Trainer, journal: &mut Journal, sink: &mut dyn EventSink) -> Result<Option<EvalReport>> {
    let report = trainer.evaluate(sink)?;
    if let Some(r) = &report {
        let record = EvalRecord {
            step: trainer.state().step,
            eval_loss: r.loss,
            eval_tokens: r.tokens,
            eval_accuracy: r.classes.and_then(|c| c.accuracy),
            eval_macro_f1: r.classes.and_then(|c| c.macro_f1),
            rewards: r.rewards,
        };
        journal.eval(&record)?;
        sink.event(Event::Evaluated(record));
    }
    Ok(report)
}

/// Metrics first: no line of a saved step may be lost.
fn save(trainer: &Trainer, journal: &mut Journal, sink: &mut dyn EventSink) -> Result<u64> {
    journal.sync()?;
    sink.event(Event::Saved(trainer.save()?));
    journal.page(trainer, Status::Running, sink);
    Ok(trainer.state().step)
}

/// What the best evaluation saw becomes the result.
fn take_best(out: &Path) -> Result<()> {
    let best = out.join(BEST_FOLDER);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&best)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
        .map_err(Error::io("read", &best))?;
    files.sort();
    for file in files.iter().filter(|file| file.is_file()) {
        let Some(name) = file.file_name() else { continue };
        copy_atomic(file, &out.join(name))?;
    }
    Ok(())
}

/// The adapter or the weights, and what a loader needs beside them.
fn write_outputs(trainer: &Trainer) -> Result<()> {
    let plan = trainer.plan();
    let out = &plan.config.output_dir;
    match plan.config.train.load_best_model_at_end {
        true => take_best(out)?,
        false => trainer.write_result(out)?,
    }
    let mut beside = plan.tokenizer.files().to_vec();
    if plan.adapter_config().is_none() {
        beside.extend(
            ["config.json", "generation_config.json"]
                .map(|name| plan.model_dir.join(name))
                .into_iter()
                .filter(|p| p.is_file()),
        );
    }
    for file in beside {
        // Several of the tokenizer's files may be the model's own config, which an adapter's folder must not have.
        let Some(name) = file.file_name() else { continue };
        if plan.adapter_config().is_some() && name == "config.json" {
            continue;
        }
        if let Some(labels) = plan.model.labels.as_ref().filter(|_| name == "config.json") {
            let mut config = read_json_object(&file)?;
            labels.put_into_config(&mut config);
            let text = format!("{:#}\n", serde_json::Value::Object(config));
            write_atomic(&out.join(name), text.as_bytes())?;
            continue;
        }
        copy_atomic(&file, &out.join(name))?;
    }
    Ok(())
}
