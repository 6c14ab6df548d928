//! What a run tells while it goes on; the program that owns the run decides how to show it.

use crate::metrics::{EvalRecord, StepRecord};
use crate::trainer::Trainer;
use crate::versions::Version;
use crate::watch::RefusedFile;
use lora_data::Origin;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Something that happened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// Records of a dataset were tokenised: how many of how many.
    Tokenising {
        /// Done.
        done: usize,
        /// In all.
        of: usize,
    },
    /// Bytes of the base weights were read.
    Loading {
        /// Done.
        done: u64,
        /// In all.
        of: u64,
    },
    /// The reference was asked about answers: how many of how many.
    Reference {
        /// Done.
        done: usize,
        /// In all.
        of: usize,
    },
    /// Something that the user should know and that does not stop the run.
    Note(String),
    /// Training starts at a step.
    Started {
        /// Steps done by an earlier part of the run.
        step: u64,
        /// Steps of the whole run.
        total_steps: u64,
    },
    /// How fast the machine is, and what a token of training needs.
    Speed {
        /// Operations a second of a large matrix product.
        matrix_rate: f64,
        /// Operations of a token of training, in the mean.
        operations_per_token: f64,
    },
    /// Prompts were answered for the samples: how many of how many.
    Sampling {
        /// Done.
        done: usize,
        /// In all.
        of: usize,
    },
    /// An optimizer step is done.
    Step(StepRecord),
    /// A step was left out, because its loss or gradient was not finite.
    Skipped {
        /// The step.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
        /// Its rows, the first of them where there are many.
        rows: Vec<Origin>,
    },
    /// An evaluation goes on.
    Evaluating {
        /// Rows done.
        done: usize,
        /// Rows in all.
        of: usize,
    },
    /// An evaluation is done.
    Evaluated(EvalRecord),
    /// A checkpoint is on the disk.
    Saved(PathBuf),
    /// A round of a watch is over: its version was published, or rejected.
    Round(Version),
    /// A file that arrived cannot be trained on.
    Refused(RefusedFile),
}

/// Takes what a run tells, and may look at the trainer and end the run. Every method does nothing unless it is written, but
/// that the three hooks pass on what happened as an event.
///
/// Hooks are called on the thread of the run, which goes on when they return. One that answers [`ControlFlow::Break`] ends the run
/// after this step, as [`EndedBy::Hook`](crate::EndedBy::Hook): it is evaluated and saved, the adapter is written, and the run can
/// go on from there.
pub trait EventSink {
    /// Something happened.
    fn event(&mut self, event: Event) {
        let _ = event;
    }

    /// An optimizer step is done.
    fn step(&mut self, trainer: &Trainer, record: &StepRecord) -> ControlFlow<()> {
        let _ = trainer;
        self.event(Event::Step(record.clone()));
        ControlFlow::Continue(())
    }

    /// An evaluation is done.
    fn evaluation(&mut self, trainer: &Trainer, record: &EvalRecord) -> ControlFlow<()> {
        let _ = trainer;
        self.event(Event::Evaluated(record.clone()));
        ControlFlow::Continue(())
    }

    /// A checkpoint is on the disk, whole, in the folder `dir`.
    fn checkpoint(&mut self, trainer: &Trainer, dir: &Path) -> ControlFlow<()> {
        let _ = trainer;
        self.event(Event::Saved(dir.to_path_buf()));
        ControlFlow::Continue(())
    }
}

/// Takes events and drops them.
#[derive(Debug, Default)]
pub struct NoEvents;

impl EventSink for NoEvents {}

impl<F: FnMut(Event)> EventSink for F {
    fn event(&mut self, event: Event) {
        self(event);
    }
}
