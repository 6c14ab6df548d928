//! Forward and backward of one micro-batch, with activations kept or recomputed, through a whole model or a stage of one.

use crate::batch::TokenBatch;
use crate::classify::Head;
use crate::decoder::{Decoder, Mode, ModuleRef};
use crate::error::Result;
use crate::rope::RotaryTables;
use lora_torch::backward;
use tch::{Kind, Tensor, no_grad};

/// What a batch's tokens count for.
enum Count<'a> {
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
    /// What those blocks read that are computed again, the last ones; none where activations were kept.
    inputs: Option<Vec<Tensor>>,
    mode: Mode,
}

/// Takes the log-probability of each trained token, `[trained]`, and returns the derivative of what is minimised by each. Of
/// a classifier it takes the scores, `[texts, labels]`.
pub type Slopes<'a> = &'a mut dyn FnMut(&Tensor) -> Result<Tensor>;

impl Decoder {
    /// Adds the gradient of `weight · (summed loss)` to the trained parameters, and returns the summed loss (a scalar on
    /// the device, not yet read).
    ///
    /// With `checkpointing` only the input of each block is kept; the rest of a block is computed again on the way back.
    /// Both ways give the same bits, dropout included.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn loss_and_backward(&self, batch: &TokenBatch, seed: u64, weight: f64, checkpointing: bool) -> Result<Tensor> {
        self.pass(batch, Mode::Train { seed }, &mut Count::Alike(weight), checkpointing)
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
        checkpointing: bool,
        slopes: Slopes<'_>,
    ) -> Result<()> {
        self.pass(batch, Mode::Train { seed }, &mut Count::By(slopes), checkpointing).map(|_| ())
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

    fn pass(&self, batch: &TokenBatch, mode: Mode, count: &mut Count<'_>, checkpointing: bool) -> Result<Tensor> {
        let passage = self.passage(batch, None, mode, checkpointing)?;
        let (loss, gradient) = self.head_gradient(&passage.output, batch, count)?;
        self.backward_part(batch, passage, &gradient)?;
        Ok(loss)
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
        checkpointing: bool,
    ) -> Result<Passage> {
        self.passage(batch, hidden, Mode::Train { seed }, checkpointing)
    }

    fn passage(&self, batch: &TokenBatch, hidden: Option<&Tensor>, mode: Mode, checkpointing: bool) -> Result<Passage> {
        let given = hidden.is_some();
        let entry = match hidden {
            // Whoever gave it wants its gradient.
            Some(hidden) => hidden.f_detach()?.f_set_requires_grad(true)?,
            None => self.embed_batch(batch, mode)?,
        };
        let rows = Some(&batch.target_rows);
        if !checkpointing {
            let output = self.through_blocks(entry.shallow_clone(), batch, mode, rows)?;
            return Ok(Passage { entry, given, output, inputs: None, mode });
        }
        let tables = RotaryTables::new(&self.config, &batch.position_ids, batch.longest(), self.kind())?;
        let first = if given { self.stage.blocks().start } else { self.first_trained_block() };
        let (mut x, mut inputs) = (entry.f_detach()?, Vec::new());
        for i in self.stage.blocks() {
            let next = no_grad(|| self.block(i, &x, batch, &tables, mode, rows))?;
            if i >= first {
                inputs.push(x);
            }
            x = next;
        }
        Ok(Passage { entry, given, output: x, inputs: Some(inputs), mode })
    }

    /// The summed loss of a batch (a scalar on the device, not yet read) from what the last of all blocks gave, and the gradient of
    /// `weight` times it by that; what is trained in the head gets its own.
    ///
    /// # Errors
    /// [`Error::PartOfModel`](crate::Error::PartOfModel) where the head is elsewhere, or what an operation reports.
    pub fn loss_part(&self, batch: &TokenBatch, passage: &Passage, weight: f64) -> Result<(Tensor, Tensor)> {
        self.head_gradient(&passage.output, batch, &mut Count::Alike(weight))
    }

    fn head_gradient(&self, output: &Tensor, batch: &TokenBatch, count: &mut Count<'_>) -> Result<(Tensor, Tensor)> {
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
        let Passage { entry, given, output, inputs, mode } = passage;
        let Some(mut inputs) = inputs else {
            if output.requires_grad() {
                backward(&[&output], &[gradient])?;
            }
            self.stage.blocks().try_for_each(|i| self.release_block(i))?;
            return if given { Ok(Some(entry.f_grad()?)) } else { Ok(None) };
        };
        drop(output);
        let tables = RotaryTables::new(&self.config, &batch.position_ids, batch.longest(), self.kind())?;
        let (rows, mut gradient) = (Some(&batch.target_rows), gradient.shallow_clone());
        // Each block is computed again, with its graph this time.
        for i in self.stage.blocks().rev() {
            let Some(input) = inputs.pop() else { break };
            let passes_on = !inputs.is_empty() || entry.requires_grad();
            let input = input.f_set_requires_grad(passes_on)?;
            let output = self.block(i, &input, batch, &tables, mode, rows)?;
            backward(&[&output], &[&gradient])?;
            self.release_block(i)?;
            if passes_on {
                gradient = input.f_grad()?;
            }
        }
        if given {
            return Ok(Some(gradient));
        }
        if entry.requires_grad() {
            backward(&[&entry], &[&gradient])?;
        }
        Ok(None)
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
    fn first_trained_block(&self) -> usize {
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
