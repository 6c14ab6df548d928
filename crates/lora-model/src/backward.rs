//! Forward and backward of one micro-batch, with activations kept or recomputed, through a whole model or a stage of one.

use crate::batch::TokenBatch;
use crate::classify::Head;
use crate::decoder::{Decoder, Mode, ModuleRef};
use crate::error::Result;
use crate::inputs::BlockInputs;
use crate::rope::RotaryTables;
use lora_torch::{backward, give_back_freed_memory};
use std::ops::Range;
use tch::{Device, Kind, Tensor, no_grad};

/// What a batch's tokens count for.
pub(crate) enum Count<'a> {
    /// Each the same.
    Alike(f64),
    /// What is made of their log-probabilities: the derivative of the objective by each.
    By(Slopes<'a>),
}

/// What the way of a batch through the blocks that are here leaves for the way back.
#[derive(Debug)]
pub struct Passage {
    /// What the first of the blocks read.
    entry: Tensor,
    /// Whether it was given, so that its gradient is asked for.
    given: bool,
    /// What the last of them gave: `[tokens, hidden]`, or the trained rows of it behind the last block of all.
    pub output: Tensor,
    /// The blocks that are computed again.
    again: Range<usize>,
    /// What each of them read.
    inputs: BlockInputs,
    /// What the blocks behind those read, whose activations were kept.
    kept: Tensor,
    mode: Mode,
}

/// Which blocks are computed again on the way back, of which only the inputs are kept until then: so many, the lowest that a
/// gradient reaches. When a block is computed again, those behind it have already given back what they kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recompute(pub usize);

impl Recompute {
    /// Every block.
    pub const ALL: Self = Self(usize::MAX);
    /// No block.
    pub const NONE: Self = Self(0);
}

impl From<bool> for Recompute {
    /// All or none.
    fn from(all: bool) -> Self {
        if all { Self::ALL } else { Self::NONE }
    }
}

/// Takes the log-probability of each trained token, `[trained]`, and returns the derivative of what is minimised by each. Of
/// a classifier it takes the scores, `[texts, labels]`.
pub type Slopes<'a> = &'a mut dyn FnMut(&Tensor) -> Result<Tensor>;

impl Decoder {
    /// Adds the gradient of `weight · (summed loss)` to the trained parameters, and returns the summed loss (a scalar on
    /// the device, not yet read).
    ///
    /// Which blocks are computed again on the way back changes no bit, dropout included.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn loss_and_backward(
        &self,
        batch: &TokenBatch,
        seed: u64,
        weight: f64,
        recompute: impl Into<Recompute>,
    ) -> Result<Tensor> {
        self.pass(batch, Mode::Train { seed }, &mut Count::Alike(weight), recompute.into())
    }

    /// Adds the gradient of any function of the log-probabilities of the trained tokens, of which `slopes` gives the
    /// derivatives: the batch goes through the blocks once, and through the head twice.
    ///
    /// # Errors
    /// What an operation or `slopes` reports.
    pub fn slopes_and_backward(
        &self,
        batch: &TokenBatch,
        seed: u64,
        recompute: impl Into<Recompute>,
        slopes: Slopes<'_>,
    ) -> Result<()> {
        self.pass(batch, Mode::Train { seed }, &mut Count::By(slopes), recompute.into()).map(|_| ())
    }

    /// The log-probability of each trained token of a batch, `[trained]`, fp32 or fp64, without dropout or gradient; of a
    /// classifier the scores, `[texts, labels]`.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn log_probabilities(&self, batch: &TokenBatch) -> Result<Tensor> {
        no_grad(|| {
            let hidden = self.hidden(batch, Mode::Eval, Some(&batch.target_rows))?;
            match &self.head {
                Head::Classes(head) => head.forward(&hidden),
                _ => Ok(self.token_losses_of(&hidden, batch)?.f_neg()?),
            }
        })
    }

    fn pass(&self, batch: &TokenBatch, mode: Mode, count: &mut Count<'_>, recompute: Recompute) -> Result<Tensor> {
        let passage = self.passage(batch, None, mode, recompute)?;
        let mut head = || self.head_gradient(&passage.output, batch, count);
        let (loss, gradient) = if recompute == Recompute::ALL { self.in_turns(head)? } else { head()? };
        self.backward_part(batch, passage, &gradient)?;
        Ok(loss)
    }

    /// Gives back freed memory before and after `head`: logits need it in other sizes than blocks, and where little is to be taken
    /// none of it waits for its next use.
    pub(crate) fn in_turns<T>(&self, head: impl FnOnce() -> Result<T>) -> Result<T> {
        let give_back = || if self.device() == Device::Cpu { give_back_freed_memory() } else { Ok(()) };
        give_back()?;
        let done = head()?;
        give_back()?;
        Ok(done)
    }

    /// Takes a batch through the blocks that are here: from its token ids, or from the `hidden` states, `[tokens, hidden]`, that the
    /// blocks before these made of it. Dropout follows from the seed and a block's number in the whole model.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn forward_part(
        &self,
        batch: &TokenBatch,
        hidden: Option<&Tensor>,
        seed: u64,
        recompute: impl Into<Recompute>,
    ) -> Result<Passage> {
        self.passage(batch, hidden, Mode::Train { seed }, recompute.into())
    }

    fn passage(
        &self,
        batch: &TokenBatch,
        hidden: Option<&Tensor>,
        mode: Mode,
        recompute: Recompute,
    ) -> Result<Passage> {
        let given = hidden.is_some();
        let entry = match hidden {
            // Whoever gave it wants its gradient.
            Some(hidden) => hidden.f_detach()?.f_set_requires_grad(true)?,
            None => self.embed_batch(batch, mode)?,
        };
        let blocks = self.stage.blocks();
        let first = if given || recompute == Recompute::NONE { blocks.start } else { self.first_trained_block() };
        let again = first..first.saturating_add(recompute.0).min(blocks.end);
        let tables = RotaryTables::new(&self.config, &batch.position_ids, batch.longest(), self.kind())?;
        let rows = Some(&batch.target_rows);
        self.check_recomputed(again.end == blocks.end)?;
        let (mut kept, mut inputs) = (entry.shallow_clone(), BlockInputs::new(self.offload));
        if !again.is_empty() {
            let mut x = entry.f_detach()?;
            for i in blocks.start..again.end {
                let next = no_grad(|| self.block(i, &x, batch, &tables, mode, rows))?;
                self.release_block(i)?;
                if again.contains(&i) {
                    inputs.push(x)?;
                }
                x = next;
            }
            kept = x.f_set_requires_grad(again.end < blocks.end)?;
        }
        let output = self.through(self.behind(&again), kept.shallow_clone(), batch, &tables, mode, rows)?;
        Ok(Passage { entry, given, output, again, inputs, kept, mode })
    }

    /// The summed loss of a batch (a scalar on the device, not yet read) from what the last of all blocks gave, and the gradient of
    /// `weight` times it by that; what is trained in the head gets its own.
    ///
    /// # Errors
    /// [`Error::PartOfModel`](crate::Error::PartOfModel) where the head is elsewhere, or what an operation reports.
    pub fn loss_part(&self, batch: &TokenBatch, passage: &Passage, weight: f64) -> Result<(Tensor, Tensor)> {
        self.head_gradient(&passage.output, batch, &mut Count::Alike(weight))
    }

    pub(crate) fn head_gradient(
        &self,
        output: &Tensor,
        batch: &TokenBatch,
        count: &mut Count<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let last = output.f_detach()?.f_set_requires_grad(true)?;
        let loss = self.head_backward(&self.final_norm(&last)?, batch, count)?;
        Ok((loss, last.f_grad()?))
    }

    /// Goes the way back, given the gradient of what the passage gave: adds to the gradients of what is trained here, and returns
    /// that of the hidden states which the passage was given.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn backward_part(&self, batch: &TokenBatch, passage: Passage, gradient: &Tensor) -> Result<Option<Tensor>> {
        let Passage { entry, given, output, again, mut inputs, kept, mode } = passage;
        let mut gradient = gradient.shallow_clone();
        let mut behind = self.behind(&again);
        if !behind.is_empty() {
            if output.requires_grad() {
                backward(&[&output], &[&gradient])?;
            }
            behind.try_for_each(|i| self.release_block(i))?;
            if again.is_empty() {
                return if given { Ok(Some(entry.f_grad()?)) } else { Ok(None) };
            }
            gradient = kept.f_grad()?;
        }
        drop((output, kept));
        let tables = RotaryTables::new(&self.config, &batch.position_ids, batch.longest(), self.kind())?;
        for i in again.clone().rev() {
            let Some(input) = inputs.pop()? else { break };
            let passes_on = i > again.start || entry.requires_grad();
            let input = input.f_set_requires_grad(passes_on)?;
            if let Some(passed_on) = self.block_again(i, &input, &gradient, batch, &tables, mode)? {
                gradient = passed_on;
            }
            self.release_block(i)?;
        }
        if given {
            return Ok(Some(gradient));
        }
        if entry.requires_grad() {
            backward(&[&entry], &[&gradient])?;
        }
        Ok(None)
    }

    /// Computes a block again, with its graph this time, and goes back through it; returns the gradient of what it read, if that
    /// asks for one.
    pub(crate) fn block_again(
        &self,
        i: usize,
        input: &Tensor,
        gradient: &Tensor,
        batch: &TokenBatch,
        tables: &RotaryTables,
        mode: Mode,
    ) -> Result<Option<Tensor>> {
        let output = self.block(i, input, batch, tables, mode, Some(&batch.target_rows))?;
        backward(&[&output], &[gradient])?;
        if input.requires_grad() { Ok(Some(input.f_grad()?)) } else { Ok(None) }
    }

    /// The blocks behind those that are computed again: all, where none is.
    fn behind(&self, again: &Range<usize>) -> Range<usize> {
        let blocks = self.stage.blocks();
        if again.is_empty() { blocks } else { again.end..blocks.end }
    }

    /// The summed loss of hidden states of the trained rows, and its way back through the head and all before it.
    fn head_backward(&self, hidden: &Tensor, batch: &TokenBatch, count: &mut Count<'_>) -> Result<Tensor> {
        let (loss, weight) = match (count, &self.head) {
            (Count::Alike(weight), _) => (self.loss_of(hidden, batch, None)?, *weight),
            (Count::By(slopes), Head::Classes(head)) => {
                let scores = head.forward(hidden)?;
                backward(&[&scores], &[&slopes(&scores.f_detach()?)?.f_to_kind(scores.kind())?])?;
                return Ok(Tensor::f_zeros([0i64; 0], (Kind::Float, hidden.device()))?);
            }
            (Count::By(slopes), _) => {
                let logps = self.token_losses_of(&hidden.f_detach()?, batch)?.f_neg()?;
                (self.loss_of(hidden, batch, Some(&slopes(&logps)?.f_neg()?))?, 1.0)
            }
        };
        backward(&[&loss], &[&loss.f_full_like(weight)?])?;
        Ok(loss.f_detach()?)
    }

    /// The lowest block that a gradient must reach.
    pub(crate) fn first_trained_block(&self) -> usize {
        let trains = |t: &Tensor| t.requires_grad();
        let mut tables = std::iter::once(&self.embed_tokens).chain(&self.embed_positions).chain(&self.embed_types);
        let norm = self.embed_norm.as_ref().is_some_and(|n| trains(&n.weight) || n.bias.as_ref().is_some_and(trains));
        if norm || self.tokens.embedding.is_some() || tables.any(|t| trains(&t.weight) || t.lora.is_some()) {
            return 0;
        }
        let of_block = |i: usize| {
            let prefix = self.config.in_block(i, "");
            let stacked = self.stacked().iter().any(|(path, _)| path.starts_with(&prefix));
            stacked
                || self.modules().iter().filter(|(path, _)| path.starts_with(&prefix)).any(|(_, m)| match m {
                    ModuleRef::Linear(l) => {
                        l.adapter.is_some()
                            || l.weight.plain().is_some_and(trains)
                            || l.bias.as_ref().is_some_and(trains)
                    }
                    ModuleRef::Norm(n) => trains(&n.weight) || n.bias.as_ref().is_some_and(trains),
                    ModuleRef::Embedding(_) => false,
                })
        };
        self.stage.blocks().find(|&i| of_block(i)).unwrap_or(self.stage.blocks().end)
    }

    /// Token-weighted evaluation of a batch: summed loss, and how many trained tokens the model ranks first.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn evaluate(&self, batch: &TokenBatch) -> Result<(f64, i64)> {
        self.evaluate_output(batch, &self.output_part(batch, None)?)
    }

    /// What the blocks that are here make of a batch in an evaluation: from its token ids, or from `hidden` states as
    /// [`Decoder::forward_part`] takes them.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn output_part(&self, batch: &TokenBatch, hidden: Option<&Tensor>) -> Result<Tensor> {
        no_grad(|| {
            let entry = hidden.map_or_else(|| self.embed_batch(batch, Mode::Eval), |hidden| Ok(hidden.f_detach()?))?;
            self.through_blocks(entry, batch, Mode::Eval, Some(&batch.target_rows))
        })
    }

    /// As [`Decoder::evaluate`], from what the last of all blocks gave.
    ///
    /// # Errors
    /// [`Error::PartOfModel`](crate::Error::PartOfModel) where the head is elsewhere, or what an operation reports.
    pub fn evaluate_output(&self, batch: &TokenBatch, output: &Tensor) -> Result<(f64, i64)> {
        no_grad(|| {
            let hidden = self.final_norm(output)?;
            let loss = self.loss_of(&hidden, batch, None)?.f_double_value(&[])?;
            let mut right = 0;
            let (n, chunk) = (hidden.size()[0], crate::decoder::loss_chunk_rows(self.config.vocab_size, true));
            for start in (0..n).step_by(chunk as usize) {
                let rows = chunk.min(n - start);
                let best = self.logits(&hidden.f_narrow(0, start, rows)?)?.f_argmax(-1, false)?;
                right += best
                    .f_eq_tensor(&batch.targets.f_narrow(0, start, rows)?)?
                    .f_sum(Kind::Int64)?
                    .f_int64_value(&[])?;
            }
            Ok((loss, right))
        })
    }
}
