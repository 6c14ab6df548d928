//! Token-weighted evaluation.

use crate::class_eval::ClassScores;
use crate::comparing::Rewards;
use crate::error::Result;
use crate::events::{Event, EventSink};
use lora_data::{Batch, Rows, Scores};
use lora_model::{Decoder, ModelConfig, TokenBatch};
use serde::Serialize;
use tch::Device;

/// What an evaluation found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct EvalReport {
    /// Sum of the loss over all trained tokens, over their number.
    pub loss: f64,
    /// `exp(loss)`
    pub perplexity: f64,
    /// Share of the trained tokens that the model ranks first.
    pub accuracy: f64,
    /// Trained tokens.
    pub tokens: u64,
    /// Examples.
    pub examples: usize,
    /// Of a classifier, whose `tokens` are its texts, and `accuracy` the share of those that get the right label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<ClassScores>,
    /// Of answers that are compared or rated; `accuracy` then is the share of pairs whose better answer has the higher reward,
    /// and `examples` the pairs, or the answers where they come alone.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub rewards: Option<Rewards>,
    /// How near the answers that the model writes are to those of the examples, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generated: Option<Scores>,
}

/// Evaluates the trained tokens of `examples`, `rows` of them at a time; every token weighs the same.
///
/// # Errors
/// What the model reports.
pub fn evaluate(model: &Decoder, examples: &Rows, rows: usize, sink: &mut dyn EventSink) -> Result<EvalReport> {
    let (mut sums, mut done) = (Sums::default(), 0);
    while done < examples.len() {
        let part = done..examples.len().min(done + rows.max(1));
        let batch = examples.batch(part.clone())?;
        let batch = on_device(&model.config, &batch, model.device())?;
        let (loss, right) = model.evaluate(&batch)?;
        sums.add(&Sums { loss, right, tokens: batch.trained() });
        done = part.end;
        sink.event(Event::Evaluating { done, of: examples.len() });
    }
    Ok(sums.report(examples.len()))
}

/// What an evaluation sums up.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sums {
    pub(crate) loss: f64,
    /// Trained tokens that the model ranks first.
    pub(crate) right: i64,
    /// Trained tokens.
    pub(crate) tokens: i64,
}

impl Sums {
    pub(crate) fn add(&mut self, other: &Self) {
        self.loss += other.loss;
        self.right += other.right;
        self.tokens += other.tokens;
    }

    pub(crate) fn report(&self, examples: usize) -> EvalReport {
        let tokens = self.tokens.max(1) as f64;
        let mean = self.loss / tokens;
        EvalReport {
            loss: mean,
            perplexity: mean.exp(),
            accuracy: self.right as f64 / tokens,
            tokens: self.tokens.unsigned_abs(),
            examples,
            ..EvalReport::default()
        }
    }
}

/// Moves a batch of the data pipeline to the model's device.
pub(crate) fn on_device(config: &ModelConfig, batch: &Batch, device: Device) -> Result<TokenBatch> {
    Ok(TokenBatch::new(config, &batch.input_ids, &batch.segment_lens, &batch.target_rows, &batch.targets, device)?)
}
