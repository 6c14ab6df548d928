//! THE loop: steps, evaluations, checkpoints, and what is left at the end.

use crate::error::{Error, Result};
use crate::eval::EvalReport;
use crate::events::{Event, EventSink};
use crate::lock::RunLock;
use crate::metrics::{EndRecord, EvalRecord, MetricsWriter};
use crate::plan::RunPlan;
use crate::trainer::{BEST_FOLDER, StepOutcome, Trainer};
use lora_format::{copy_atomic, read_json_object, write_atomic};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

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
    /// `finished`, or `stopped` when it was asked to stop or its time was over.
    pub status: &'static str,
    /// Why it ended.
    pub ended_by: EndedBy,
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

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EndedBy {
    /// All steps are done.
    Steps,
    /// Evaluations did not become better for as long as was allowed.
    EarlyStopping,
    /// `train.max_time` is over; the run can go on.
    MaxTime,
    /// It was asked to stop; the run can go on.
    Interrupt,
}

/// Trains until the plan's last step, until its time is over, or until `stop` is set; the step in progress is finished and saved in
/// any case.
///
/// # Errors
/// What any part reports; older checkpoints are intact then.
pub fn train(
    plan: RunPlan,
    options: &TrainOptions,
    stop: &AtomicBool,
    sink: &mut dyn EventSink,
) -> Result<(RunReport, Trainer)> {
    let (out, start, budget) = (plan.config.output_dir.clone(), Instant::now(), plan.config.train.time_budget());
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
    let mut metrics = match trainer.state().step {
        0 => MetricsWriter::create(&out)?,
        step => MetricsWriter::resume(&out, step)?,
    };
    let (total, config) = (trainer.plan().total_steps, trainer.plan().config.train.clone());
    sink.event(Event::Started { step: trainer.state().step, total_steps: total });
    let eval_before = if trainer.state().step == 0 { evaluate(&mut trainer, &mut metrics, sink)? } else { None };

    let (mut loss, mut eval_after, mut saved, mut evaluated) = (None, None, trainer.state().step, 0);
    // Every start comes a step further, however long loading takes.
    let first = trainer.state().step;
    let over = |step: u64| step > first && budget.is_some_and(|budget| start.elapsed() >= budget);
    let ended_by = loop {
        if trainer.state().step >= total {
            break EndedBy::Steps;
        } else if trainer.has_stalled() {
            break EndedBy::EarlyStopping;
        } else if stop.load(Ordering::Relaxed) {
            break EndedBy::Interrupt;
        } else if over(trainer.state().step) {
            break EndedBy::MaxTime;
        }
        match trainer.step()? {
            StepOutcome::Updated(record) => {
                loss = Some(record.loss);
                if record.step.is_multiple_of(config.logging_steps) || record.step == total {
                    metrics.write_step(&record)?;
                }
                sink.event(Event::Step(record));
            }
            StepOutcome::Skipped { step, loss, grad_norm } => sink.event(Event::Skipped { step, loss, grad_norm }),
        }
        let step = trainer.state().step;
        let due = |every: u64| every > 0 && step.is_multiple_of(every);
        if due(config.eval_steps) || step == total {
            eval_after = evaluate(&mut trainer, &mut metrics, sink)?;
            evaluated = step;
        }
        if due(config.save_steps) {
            saved = save(&trainer, &metrics, sink)?;
        }
    };
    let state = trainer.state().clone();
    if ended_by == EndedBy::MaxTime && evaluated != state.step {
        // It shows what has come of the run so far, and does not count for what goes on from here.
        let report = trainer.measure(sink)?;
        eval_after = tell(report, state.step, &mut metrics, sink)?;
    }
    if saved != state.step {
        save(&trainer, &metrics, sink)?;
    }
    let at = format!("ended at step {} of {total}", state.step);
    match ended_by {
        EndedBy::EarlyStopping => {
            sink.event(Event::Note(format!("{at}: {} evaluations in a row were not better", state.evals_since_best)))
        }
        EndedBy::MaxTime => {
            let budget = config.max_time.as_deref().unwrap_or_default().trim();
            sink.event(Event::Note(format!("{at}: train.max_time = {budget:?} is over; --resume goes on")));
        }
        EndedBy::Steps | EndedBy::Interrupt => {}
    }
    if ended_by != EndedBy::Interrupt {
        write_outputs(&trainer)?;
    }
    metrics.write_end(&EndRecord { step: state.step, ended_by })?;
    let finished = matches!(ended_by, EndedBy::Steps | EndedBy::EarlyStopping);
    let report = RunReport {
        status: if finished { "finished" } else { "stopped" },
        ended_by,
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

fn evaluate(
    trainer: &mut Trainer,
    metrics: &mut MetricsWriter,
    sink: &mut dyn EventSink,
) -> Result<Option<EvalReport>> {
    let report = trainer.evaluate(sink)?;
    tell(report, trainer.state().step, metrics, sink)
}

fn tell(
    report: Option<EvalReport>,
    step: u64,
    metrics: &mut MetricsWriter,
    sink: &mut dyn EventSink,
) -> Result<Option<EvalReport>> {
    if let Some(r) = &report {
        let record = EvalRecord::of(r, step);
        metrics.write_eval(&record)?;
        sink.event(Event::Evaluated(record));
    }
    Ok(report)
}

/// Metrics first: no line of a saved step may be lost.
fn save(trainer: &Trainer, metrics: &MetricsWriter, sink: &mut dyn EventSink) -> Result<u64> {
    metrics.sync()?;
    sink.event(Event::Saved(trainer.save()?));
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
