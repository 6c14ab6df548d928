//! THE loop: steps, evaluations, checkpoints, and what is left at the end.

use crate::checkpoint::{Found, check_free_space, has_checkpoints, newest_whole};
use crate::error::{Error, Result};
use crate::eval::EvalReport;
use crate::events::{Event, EventSink};
use crate::exchange::Asks;
use crate::follow::steps_behind;
use crate::journal::Journal;
use crate::lock::RunLock;
use crate::metrics::{EndRecord, EvalRecord};
use crate::objective::Objective;
use crate::plan::RunPlan;
use crate::resume_point::{find_resume_point, identity};
use crate::samples::Samples;
use crate::team::Team;
use crate::trainer::{BEST_FOLDER, StepOutcome, Trainer};
use lora_format::{copy_atomic, read_json_object, write_atomic};
use lora_report::Status;
use lora_torch::catching;
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
    /// The processes that train together.
    pub team: Team,
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
    /// A hook of the caller ended it; the run can go on.
    Hook,
}

impl EndedBy {
    /// Whether nothing is left to do.
    fn is_finished(self) -> bool {
        matches!(self, Self::Steps | Self::EarlyStopping)
    }
}

/// Takes a run's folder where there is one, and says at once what would keep a run from starting in it: another run, a file
/// in its place, checkpoints that would be written over or that are missing. `None` where there is no folder yet: none is
/// made. To be called before anything that takes time; [`train_claimed`] takes the lock.
///
/// # Errors
/// [`Error::OutputDir`], [`Error::Locked`], [`Error::OutputTaken`], [`Error::NothingToResume`].
pub fn claim(output_dir: &Path, resume: bool) -> Result<Option<RunLock>> {
    let nothing = || Error::NothingToResume { path: output_dir.to_path_buf() };
    if std::fs::symlink_metadata(output_dir).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) {
        return if resume { Err(nothing()) } else { Ok(None) };
    }
    let lock = RunLock::acquire(output_dir)?;
    match (has_checkpoints(output_dir)?, resume) {
        (true, false) => Err(Error::OutputTaken { path: output_dir.to_path_buf() }),
        (false, true) => Err(nothing()),
        _ => Ok(Some(lock)),
    }
}

/// Trains until the plan's last step, until its time is over, or until `stop` is set; the step in progress is finished and
/// saved in any case.
///
/// # Errors
/// What any part reports; older checkpoints are intact then.
pub fn train(
    plan: RunPlan,
    options: &TrainOptions,
    stop: &AtomicBool,
    sink: &mut dyn EventSink,
) -> Result<(RunReport, Trainer)> {
    train_claimed(None, plan, options, stop, sink)
}

/// The same with an objective of the caller's own: see [`Trainer::with_objective`].
///
/// # Errors
/// As [`train`].
pub fn train_with(
    plan: RunPlan,
    objective: Box<dyn Objective>,
    options: &TrainOptions,
    stop: &AtomicBool,
    sink: &mut dyn EventSink,
) -> Result<(RunReport, Trainer)> {
    run(None, plan, Some(objective), options, stop, sink)
}

/// The same in a folder that [`claim`] has taken.
///
/// # Errors
/// As [`train`].
pub fn train_claimed(
    lock: Option<RunLock>,
    plan: RunPlan,
    options: &TrainOptions,
    stop: &AtomicBool,
    sink: &mut dyn EventSink,
) -> Result<(RunReport, Trainer)> {
    run(lock, plan, None, options, stop, sink)
}

fn run(
    lock: Option<RunLock>,
    plan: RunPlan,
    objective: Option<Box<dyn Objective>>,
    options: &TrainOptions,
    stop: &AtomicBool,
    sink: &mut dyn EventSink,
) -> Result<(RunReport, Trainer)> {
    let (out, start, team) = (plan.config.output_dir.clone(), Instant::now(), options.team.clone());
    let mut run = identity(&plan, &team)?;
    run.config.insert("--resume".into(), options.resume.to_string());
    team.same_run(run)?;
    let lead = if team.leads() { take_folder(lock, &plan, options, sink).map(Some) } else { Ok(None) };
    let (lock, found, samples) = team.agree(lead)?.map_or((None, None, None), |(l, f, s)| (Some(l), f, Some(s)));
    let resolved = plan.config.to_toml()?;
    let trainer = match objective {
        Some(objective) => Trainer::with_objective_in_team(plan, team.clone(), objective, sink),
        None => Trainer::in_team(plan, team.clone(), sink),
    };
    let mut trainer = team.agree(trainer)?;
    if options.resume {
        trainer.go_on(Ok(found))?;
    }
    trainer.check_parameters()?;
    let mut progress = Progress { saved: trainer.state().step, ..Default::default() };
    let until = Until { start, first: trainer.state().step, stop };
    let journal = samples.map(|samples| open_journal(&trainer, &resolved, samples, sink)).transpose();
    let ended_by = match team.agree(journal)? {
        None => steps_behind(&mut trainer, &until, sink)?,
        Some((mut journal, samples)) => {
            let ended = catching(|| steps(&mut trainer, &mut journal, &samples, &mut progress, &until, sink));
            ended
                .map_err(Error::from)
                .flatten()
                .map_err(|error| stopped(&trainer, &mut journal, &mut progress, error, sink))?
        }
    };
    drop(lock);
    let state = trainer.state().clone();
    let report = RunReport {
        status: if ended_by.is_finished() { "finished" } else { "stopped" },
        ended_by,
        output_dir: out,
        steps: state.step,
        total_steps: trainer.plan().total_steps,
        skipped_steps: state.skipped_steps,
        seconds: state.seconds,
        tokens: state.tokens,
        trained_tokens: state.trained_tokens,
        loss: progress.loss,
        eval_before: progress.eval_before,
        eval_after: progress.eval_after,
        trained_parameters: trainer.trained_parameters(),
        base_parameters: trainer.plan().base_parameters(),
    };
    Ok((report, trainer))
}

/// Takes the run's folder, and before a weight is read sees to room for one checkpoint and to the one to go on from.
fn take_folder(
    lock: Option<RunLock>,
    plan: &RunPlan,
    options: &TrainOptions,
    sink: &mut dyn EventSink,
) -> Result<(RunLock, Option<Found>, Samples)> {
    let out = plan.config.output_dir.clone();
    let samples = Samples::of(plan)?;
    let lock = match lock {
        Some(lock) => lock,
        None => RunLock::acquire(&out)?,
    };
    if let Some(other) = lock.abandoned().filter(|other| !other.is_here()) {
        sink.event(Event::Note(format!(
            "the last run in {} did not give it back: {other}. If it may still be at work, stop it there: network file systems \
             do not always keep locks between machines",
            out.display()
        )));
    }
    if !options.resume && has_checkpoints(&out)? {
        // A folder with checkpoints of an earlier run is never written over.
        return Err(Error::OutputTaken { path: out });
    }
    check_free_space(&out, plan.checkpoint_bytes())?;
    let found = match options.resume {
        true => Some(find_resume_point(plan, &options.team, &options.changed, sink)?),
        false => None,
    };
    Ok((lock, found, samples))
}

/// Begins what the run tells of itself.
fn open_journal(
    trainer: &Trainer,
    resolved: &str,
    mut samples: Samples,
    sink: &mut dyn EventSink,
) -> Result<(Journal, Samples)> {
    write_atomic(&trainer.plan().config.output_dir.join("config.resolved.toml"), resolved.as_bytes())?;
    let journal = Journal::open(trainer, resolved, sink)?;
    samples.allow(trainer, journal.matrix_rate());
    Ok((journal, samples))
}

/// What the loop has to tell, however it ends.
#[derive(Debug, Default)]
struct Progress {
    loss: Option<f64>,
    eval_before: Option<EvalReport>,
    eval_after: Option<EvalReport>,
    /// The step of the last evaluation.
    evaluated: u64,
    /// The step of the last checkpoint.
    saved: u64,
    /// Whether a hook has asked for the end.
    enough: bool,
}

/// What ends a run before its last step.
pub(crate) struct Until<'a> {
    start: Instant,
    /// The step that this start goes on from: every start comes a step further, however long loading takes.
    first: u64,
    stop: &'a AtomicBool,
}

impl Until<'_> {
    /// What this process asks for; `enough` where a hook of its own does.
    pub(crate) fn asks(&self, trainer: &Trainer, enough: bool) -> Asks {
        let over = |budget| trainer.state().step > self.first && self.start.elapsed() >= budget;
        let stop = self.stop.load(Ordering::Relaxed);
        Asks { stop, enough, out_of_time: trainer.plan().config.train.time_budget().is_some_and(over) }
    }

    /// Why the run ends here, if it does.
    pub(crate) fn ended(&self, trainer: &Trainer, enough: bool) -> Option<EndedBy> {
        let asks = trainer.agreed().unwrap_or_else(|| self.asks(trainer, enough));
        if trainer.state().step >= trainer.plan().total_steps {
            Some(EndedBy::Steps)
        } else if trainer.has_stalled() {
            Some(EndedBy::EarlyStopping)
        } else if asks.stop {
            Some(EndedBy::Interrupt)
        } else if asks.enough {
            Some(EndedBy::Hook)
        } else {
            asks.out_of_time.then_some(EndedBy::MaxTime)
        }
    }
}

/// The loop.
fn steps(
    trainer: &mut Trainer,
    journal: &mut Journal,
    samples: &Samples,
    progress: &mut Progress,
    until: &Until<'_>,
    sink: &mut dyn EventSink,
) -> Result<EndedBy> {
    let (total, config) = (trainer.plan().total_steps, trainer.plan().config.train.clone());
    sink.event(Event::Started { step: trainer.state().step, total_steps: total });
    if trainer.state().step == 0 {
        progress.eval_before = evaluate(trainer, journal, progress, sink)?;
        // A process alone that is asked to stop here asks again when it goes on, from step 0. Several hear of it with their first
        // step, and what the model wrote before that would be lost.
        let never = AtomicBool::new(false);
        samples.take(trainer, if trainer.team().is_alone() { until.stop } else { &never }, sink);
    }
    journal.page(trainer, Status::Running, sink);
    let ended_by = loop {
        if let Some(ended_by) = until.ended(trainer, progress.enough) {
            break ended_by;
        }
        let enough = progress.enough;
        match trainer.step_asking(&|t| until.asks(t, enough))? {
            StepOutcome::Updated(record) => {
                progress.loss = Some(record.loss);
                if record.step.is_multiple_of(config.logging_steps) || record.step == total {
                    journal.step(&record)?;
                }
                progress.enough |= sink.step(trainer, &record).is_break();
            }
            StepOutcome::Skipped { step, loss, grad_norm, rows } => {
                sink.event(Event::Skipped { step, loss, grad_norm, rows });
            }
        }
        let step = trainer.state().step;
        let due = |every: u64| every > 0 && step.is_multiple_of(every);
        if due(config.eval_steps) || step == total {
            progress.eval_after = evaluate(trainer, journal, progress, sink)?;
            progress.evaluated = step;
            journal.page(trainer, Status::Running, sink);
        }
        if due(config.save_steps) {
            trainer.collect()?;
            let saved = save(trainer, journal, progress, sink);
            trainer.team().agree(saved)?;
        }
    };
    trainer.check_parameters()?;
    let finished = finish(trainer, journal, samples, progress, (ended_by, until.stop), sink);
    trainer.team().agree(finished).map(|()| ended_by)
}

/// Saves, writes the result, and says why the run ended.
fn finish(
    trainer: &mut Trainer,
    journal: &mut Journal,
    samples: &Samples,
    progress: &mut Progress,
    (ended_by, stop): (EndedBy, &AtomicBool),
    sink: &mut dyn EventSink,
) -> Result<()> {
    let (total, config) = (trainer.plan().total_steps, trainer.plan().config.train.clone());
    let (step, evals_since_best) = (trainer.state().step, trainer.state().evals_since_best);
    if matches!(ended_by, EndedBy::MaxTime | EndedBy::Hook) && progress.evaluated != step {
        // It shows what has come of the run so far, and does not count for what goes on from here.
        let report = trainer.measure(sink)?;
        progress.eval_after = tell(report, trainer, journal, progress, sink)?;
    }
    trainer.collect()?;
    if progress.saved != step {
        save(trainer, journal, progress, sink)?;
    }
    let note = match ended_by {
        EndedBy::EarlyStopping => format!("{evals_since_best} evaluations in a row were not better"),
        EndedBy::MaxTime => {
            format!("train.max_time = {:?} is over; --resume goes on", config.max_time.as_deref().unwrap_or_default())
        }
        EndedBy::Steps | EndedBy::Interrupt | EndedBy::Hook => String::new(),
    };
    if !note.is_empty() {
        sink.event(Event::Note(format!("ended at step {step} of {total}: {note}")));
    }
    if ended_by != EndedBy::Interrupt {
        write_outputs(trainer)?;
        samples.take(trainer, stop, sink);
    }
    journal.end(&EndRecord { step, ended_by })?;
    journal.page(trainer, if ended_by.is_finished() { Status::Finished } else { Status::Stopped }, sink);
    Ok(())
}

/// The error of a run that was under way, with what was kept. Where memory ran out the last whole step is kept, too.
fn stopped(
    trainer: &Trainer,
    journal: &mut Journal,
    progress: &mut Progress,
    error: Error,
    sink: &mut dyn EventSink,
) -> Error {
    let step = trainer.state().step;
    if error.is_out_of_memory() && trainer.is_whole() && !trainer.is_staged() && progress.saved != step {
        // What cannot be saved, either, leaves the older checkpoint; the first error is the one to tell.
        let _ = save(trainer, journal, progress, sink);
    }
    journal.page(trainer, Status::Stopped, sink);
    let checkpoint = newest_whole(&trainer.plan().config.output_dir);
    Error::Stopped { step, source: Box::new(error), checkpoint }
}

fn evaluate(
    trainer: &mut Trainer,
    journal: &mut Journal,
    progress: &mut Progress,
    sink: &mut dyn EventSink,
) -> Result<Option<EvalReport>> {
    let report = trainer.evaluate(sink)?;
    tell(report, trainer, journal, progress, sink)
}

fn tell(
    report: Option<EvalReport>,
    trainer: &Trainer,
    journal: &mut Journal,
    progress: &mut Progress,
    sink: &mut dyn EventSink,
) -> Result<Option<EvalReport>> {
    if let Some(r) = &report {
        let record = EvalRecord::of(r, trainer.state().step);
        journal.eval(&record)?;
        progress.enough |= sink.evaluation(trainer, &record).is_break();
    }
    Ok(report)
}

/// Metrics first: no line of a saved step may be lost.
fn save(trainer: &Trainer, journal: &mut Journal, progress: &mut Progress, sink: &mut dyn EventSink) -> Result<()> {
    journal.sync()?;
    let dir = trainer.save()?;
    progress.saved = trainer.state().step;
    progress.enough |= sink.checkpoint(trainer, &dir).is_break();
    journal.page(trainer, Status::Running, sink);
    Ok(())
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
        // What a killed run was writing there.
        if name.to_string_lossy().starts_with('.') {
            continue;
        }
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
