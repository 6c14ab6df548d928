//! Evaluations, and what they say of the result.

use super::{BEST_FOLDER, Trainer};
use crate::answering::answer_questions;
use crate::class_eval::evaluate_classes;
use crate::error::{Error, Result};
use crate::eval::{EvalReport, evaluate};
use crate::events::EventSink;

impl Trainer {
    /// Evaluates the held-out examples; `None` when there are none, and behind rank 0. It counts for what the best
    /// evaluation is.
    ///
    /// # Errors
    /// What the model reports.
    pub fn evaluate(&mut self, sink: &mut dyn EventSink) -> Result<Option<EvalReport>> {
        if self.is_staged() {
            return self.evaluate_in_stages(sink);
        }
        let own = if self.team.leads() { self.evaluate_alone(sink) } else { Ok(None) };
        let (report, evals_since_best) = self.team.clone().follow(own, self.state.evals_since_best)?;
        self.state.evals_since_best = evals_since_best;
        Ok(report)
    }

    fn evaluate_alone(&mut self, sink: &mut dyn EventSink) -> Result<Option<EvalReport>> {
        let report = self.measure(sink)?;
        if let Some(report) = &report
            && self.judge(report)?
            && self.plan.config.train.load_best_model_at_end
        {
            self.write_best()?;
        }
        Ok(report)
    }

    /// The same, and nothing is changed by it. Where the model is divided, every process calls it.
    pub(crate) fn measure(&mut self, sink: &mut dyn EventSink) -> Result<Option<EvalReport>> {
        if self.plan.eval.is_empty() {
            return Ok(None);
        }
        let rows = self.plan.config.train.per_device_eval_batch_size as usize;
        if let Some(pipeline) = &self.pipeline {
            return Ok(Some(pipeline.evaluate(&self.model, &self.plan.eval, rows, sink)?));
        }
        if let Some(policy) = &mut self.policy {
            return Ok(Some(policy.evaluate(&self.model, &self.plan, rows, sink)?));
        }
        Ok(Some(match (&self.comparing, &self.plan.classes) {
            (Some(comparing), _) => comparing.evaluate(&self.model, rows, sink)?,
            (None, None) => self.measure_language(rows, sink)?,
            (None, Some(classes)) => {
                evaluate_classes(&self.model, &self.plan.eval, &classes.eval, rows, sink)?.summary()
            }
        }))
    }

    fn measure_language(&self, rows: usize, sink: &mut dyn EventSink) -> Result<EvalReport> {
        let (plan, mut report) = (&self.plan, evaluate(&self.model, &self.plan.eval, rows, sink)?);
        if !plan.questions.is_empty() {
            let most = plan.config.train.generation_max_new_tokens as usize;
            report.generated = Some(answer_questions(&self.model, &plan.tokenizer, &plan.questions, most, sink)?);
        }
        Ok(report)
    }

    /// Whether an evaluation is the best so far, which is kept in mind.
    pub(super) fn judge(&mut self, report: &EvalReport) -> Result<bool> {
        let config = &self.plan.config.train;
        let metric = config.metric_for_best_model;
        let Some(value) = metric.of(report) else {
            if config.load_best_model_at_end || config.early_stopping_patience.is_some() {
                return Err(Error::NoMetric { metric: metric.name() });
            }
            return Ok(false);
        };
        let better = self.state.best_eval.is_none_or(|best| value > best + config.early_stopping_threshold);
        match better {
            true => (self.state.best_eval, self.state.evals_since_best) = (Some(value), 0),
            false => self.state.evals_since_best += 1,
        }
        Ok(better)
    }

    /// Keeps the result as that of the best evaluation.
    pub(super) fn write_best(&self) -> Result<()> {
        self.write_result(&self.plan.config.output_dir.join(BEST_FOLDER))
    }

    /// Whether evaluations have not become better for as long as was allowed.
    pub fn has_stalled(&self) -> bool {
        self.plan.config.train.early_stopping_patience.is_some_and(|most| self.state.evals_since_best >= most)
    }
}
