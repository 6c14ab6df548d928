//! A model whose blocks are divided among processes, the stages: each holds the weights and adapters of its own blocks, and
//! hidden states and their gradients go from one to the next.
//!
//! A stage that fails still gives what the others wait for, zeros, and tells of it in the exchange at the end.

use crate::config::PipelineDType;
use crate::error::{Error, Result};
use crate::eval::{EvalReport, Sums, on_device};
use crate::events::{Event, EventSink};
use crate::link::Link;
use crate::team::Team;
use lora_data::Rows;
use lora_model::{Decoder, Passage, Recompute, Stage, TokenBatch};
use std::collections::VecDeque;
use tch::{Kind, Tensor};

/// A process's place in the line.
#[derive(Debug)]
pub(crate) struct Pipeline {
    team: Team,
    stage: Stage,
    /// What numbers go from stage to stage as.
    sent_as: Kind,
}

/// A micro-batch, and what is drawn for it.
#[derive(Debug)]
pub(crate) struct Micro {
    pub(crate) batch: TokenBatch,
    pub(crate) seed: u64,
}

impl Pipeline {
    pub(crate) fn new(team: Team, stage: Stage, dtype: PipelineDType) -> Self {
        let sent_as = match dtype {
            PipelineDType::Float32 => Kind::Float,
            PipelineDType::BFloat16 => Kind::BFloat16,
        };
        Self { team, stage, sent_as }
    }

    pub(crate) fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Adds the gradients of `weight` times the summed loss of these micro-batches, and returns that loss; 0 before the last
    /// stage.
    ///
    /// The order is "one forward, one backward" (Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", 2021): a
    /// stage goes ahead by as many micro-batches as there are stages behind it, so no more than that wait for their way
    /// back, and then takes one forward and one back in turn. Of S stages and M micro-batches each waits
    /// (S - 1) / (M + S - 1) of the time. Gradients are added in the order of the micro-batches, as in one process.
    pub(crate) fn step(&self, model: &Decoder, micros: &[Micro], weight: f64, recompute: Recompute) -> Result<f64> {
        let tokens: Vec<i64> = micros.iter().map(|micro| micro.batch.segments.total()).collect();
        let mut line = Line::new(self, model, &tokens, true)?;
        let behind = self.team.world() - 1 - self.team.rank();
        let ahead = micros.len().min(behind as usize);
        let (first, rest) = micros.split_at(ahead);
        first.iter().try_for_each(|micro| line.forward(micro, recompute))?;
        let mut rest = rest.iter();
        for micro in micros {
            rest.next().map_or(Ok(()), |next| line.forward(next, recompute))?;
            line.backward(micro, weight)?;
        }
        line.end()
    }

    /// Evaluates the trained tokens of `examples`, `rows` of them at a time; every stage has the same report.
    pub(crate) fn evaluate(
        &self,
        model: &Decoder,
        examples: &Rows,
        rows: usize,
        sink: &mut dyn EventSink,
    ) -> Result<EvalReport> {
        let lengths = examples.lengths();
        let tokens: Vec<i64> = lengths.chunks(rows.max(1)).map(|part| part.iter().sum::<usize>() as i64).collect();
        let mut line = Line::new(self, model, &tokens, false)?;
        let (mut sums, mut done) = (Sums::default(), 0);
        while done < examples.len() {
            let part = done..examples.len().min(done + rows.max(1));
            done = part.end;
            let batch = || on_device(&model.config, &examples.batch(part)?, model.device());
            line.evaluate(batch, &mut sums)?;
            sink.event(Event::Evaluating { done, of: examples.len() });
        }
        let own = line.end().map(|_| ());
        let told = own.as_ref().map_or([1.0, 0.0, 0.0, 0.0], |()| {
            let Sums { loss, right, tokens } = sums;
            [0.0, loss, right as f64, tokens as f64]
        });
        let mut told = Tensor::f_from_slice(&told)?;
        self.team.settle(own, |team| {
            team.all_reduce_sum(&mut told)?;
            Ok(told.f_double_value(&[0])? > 0.0)
        })?;
        let [loss, right, tokens] = [1, 2, 3].map(|i| told.f_double_value(&[i]));
        Ok(Sums { loss: loss?, right: right? as i64, tokens: tokens? as i64 }.report(examples.len()))
    }
}

/// A stage at work on a list of micro-batches.
struct Line<'a> {
    model: &'a Decoder,
    before: Option<Link<'a>>,
    after: Option<Link<'a>>,
    /// Those that wait for their way back, the oldest first; nothing in the place of one that failed.
    underway: VecDeque<Option<Passage>>,
    loss: f64,
    /// What went wrong here first.
    failed: Option<Error>,
}

impl<'a> Line<'a> {
    /// `tokens` of each micro-batch; `both` where gradients come back.
    fn new(pipeline: &'a Pipeline, model: &'a Decoder, tokens: &[i64], both: bool) -> Result<Self> {
        let (team, rank) = (pipeline.team.collective(), pipeline.team.rank());
        let as_computed = (model.kind(), model.device());
        let shapes: Vec<[i64; 2]> = tokens.iter().map(|n| [*n, model.config.hidden_size]).collect();
        let link = |peer, coming| Link::new(team, peer, pipeline.sent_as, as_computed, (&shapes, coming));
        let (first, last) = (pipeline.stage.is_first(), pipeline.stage.is_last());
        Ok(Self {
            model,
            before: (!first).then(|| link(rank.saturating_sub(1), true)).transpose()?,
            after: (!last).then(|| link(rank + 1, both)).transpose()?,
            underway: VecDeque::new(),
            loss: 0.0,
            failed: None,
        })
    }

    fn forward(&mut self, micro: &Micro, recompute: Recompute) -> Result<()> {
        let (model, Micro { batch, seed }) = (self.model, micro);
        let hidden = self.before.as_mut().map(Link::take).transpose()?;
        let passage = self.attempt(|| Ok(model.forward_part(batch, hidden.as_ref(), *seed, recompute)?));
        if let Some(after) = &mut self.after {
            after.give(passage.as_ref().map(|passage| &passage.output))?;
        }
        self.underway.push_back(passage);
        Ok(())
    }

    fn backward(&mut self, micro: &Micro, weight: f64) -> Result<()> {
        let (model, batch) = (self.model, &micro.batch);
        let passage = self.underway.pop_front().flatten();
        let coming = self.after.as_mut().map(Link::take).transpose()?;
        let mut loss = 0.0;
        let gradient = self.attempt(|| {
            let Some(passage) = passage else { return Ok(None) };
            let gradient = match coming {
                Some(gradient) => gradient,
                None => {
                    let (sum, gradient) = model.loss_part(batch, &passage, weight)?;
                    loss = sum.f_double_value(&[])?;
                    gradient
                }
            };
            Ok(model.backward_part(batch, passage, &gradient)?)
        });
        self.loss += loss;
        match &mut self.before {
            Some(before) => before.give(gradient.flatten().as_ref()),
            None => Ok(()),
        }
    }

    fn evaluate(&mut self, batch: impl FnOnce() -> Result<TokenBatch>, sums: &mut Sums) -> Result<()> {
        let model = self.model;
        let hidden = self.before.as_mut().map(Link::take).transpose()?;
        let found = self.attempt(|| {
            let batch = batch()?;
            let output = model.output_part(&batch, hidden.as_ref())?;
            let scores = if model.stage().is_last() { Some(model.evaluate_output(&batch, &output)?) } else { None };
            Ok((output, scores.map(|(loss, right)| Sums { loss, right, tokens: batch.trained() })))
        });
        if let Some(after) = &mut self.after {
            after.give(found.as_ref().map(|(output, _)| output))?;
        }
        if let Some((_, Some(own))) = found {
            sums.add(&own);
        }
        Ok(())
    }

    /// What this stage computes, unless it has failed before.
    fn attempt<T>(&mut self, compute: impl FnOnce() -> Result<T>) -> Option<T> {
        if self.failed.is_some() {
            return None;
        }
        compute().map_err(|error| self.failed = Some(error)).ok()
    }

    /// Waits until the neighbours have taken what they were given.
    fn end(self) -> Result<f64> {
        for link in [self.before, self.after].into_iter().flatten() {
            link.end()?;
        }
        self.failed.map_or(Ok(self.loss), Err)
    }
}
