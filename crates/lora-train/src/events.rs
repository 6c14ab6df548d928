//! What a run tells while it goes on; the program that owns the run decides how to show it.

use crate::metrics::{EvalRecord, StepRecord};
use lora_data::Origin;
use std::path::PathBuf;

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
}

/// Takes the events of a run.
pub trait EventSink {
    /// Called for each event, on the thread of the run.
    fn event(&mut self, event: Event);
}

/// Takes events and drops them.
#[derive(Debug, Default)]
pub struct NoEvents;

impl EventSink for NoEvents {
    fn event(&mut self, _: Event) {}
}

impl<F: FnMut(Event)> EventSink for F {
    fn event(&mut self, event: Event) {
        self(event);
    }
}
