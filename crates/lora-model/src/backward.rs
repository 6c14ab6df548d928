//! Forward and backward of one micro-batch, with activations kept or recomputed.

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
                Head::Language(_) => Ok(self.token_losses_of(&hidden, batch)?.f_neg()?),
            }
        })
    }

    fn pass(&self, batch: &TokenBatch, mode: Mode, count: &mut Count<'_>, checkpointing: bool) -> Result<Tensor> {
        if checkpointing {
            return self.checkpointed(batch, mode, count);
        }
        let hidden = self.hidden(batch, mode, Some(&batch.target_rows))?;
        let loss = self.head_backward(&hidden, batch, count)?;
        (0..self.blocks.len()).try_for_each(|i| self.release_block(i))?;
        Ok(loss)
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
            (Count::By(slopes), Head::Language(_)) => {
                let logps = self.token_losses_of(&hidden.f_detach()?, batch)?.f_neg()?;
                (self.loss_of(hidden, batch, Some(&slopes(&logps)?.f_neg()?))?, 1.0)
            }
        };
        backward(&[&loss], &[&loss.f_full_like(weight)?])?;
        Ok(loss.f_detach()?)
    }

    fn checkpointed(&self, batch: &TokenBatch, mode: Mode, count: &mut Count<'_>) -> Result<Tensor> {
        let tables = RotaryTables::new(&self.config, &batch.position_ids, batch.longest(), self.kind())?;
        let rows = Some(&batch.target_rows);
        let first = self.first_trained_block();

        // Forward: keep the input of each block that a gradient must pass.
        let embedded = self.embed_batch(batch, mode)?;
        let mut x = embedded.f_detach()?;
        let mut inputs = Vec::with_capacity(self.blocks.len());
        for i in 0..self.blocks.len() {
            let next = no_grad(|| self.block(i, &x, batch, &tables, mode, rows))?;
            inputs.push(if i >= first { Some(x) } else { None });
            x = next;
        }

        // The head, and the gradient of the last block's output.
        let last = x.f_set_requires_grad(true)?;
        let loss = self.head_backward(&self.final_norm(&last)?, batch, count)?;
        let mut gradient = last.f_grad()?;

        // Backward: compute each block again, with its graph this time, and go through it.
        for i in (first..self.blocks.len()).rev() {
            let Some(input) = inputs[i].take() else { continue };
            let passes_on = i > first || embedded.requires_grad();
            let input = input.f_set_requires_grad(passes_on)?;
            let output = self.block(i, &input, batch, &tables, mode, rows)?;
            backward(&[&output], &[&gradient])?;
            self.release_block(i)?;
            if passes_on {
                gradient = input.f_grad()?;
            }
        }
        if embedded.requires_grad() {
            backward(&[&embedded], &[&gradient])?;
        }
        Ok(loss)
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
        (0..self.blocks.len()).find(|&i| of_block(i)).unwrap_or(self.blocks.len())
    }

    /// Token-weighted evaluation of a batch: summed loss, and how many trained tokens the model ranks first.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn evaluate(&self, batch: &TokenBatch) -> Result<(f64, i64)> {
        no_grad(|| {
            let hidden = self.hidden(batch, Mode::Eval, Some(&batch.target_rows))?;
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
