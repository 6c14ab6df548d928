//! The micro-batches of a step side by side: all of them go through a block before any goes on, there and back, so that the weights
//! of a mapped block are read twice for a step and not twice for each of its micro-batches.

use crate::backward::Count;
use crate::batch::TokenBatch;
use crate::decoder::{Decoder, Mode};
use crate::error::Result;
use crate::inputs::BlockInputs;
use crate::rope::RotaryTables;
use lora_torch::backward;
use tch::{Tensor, no_grad};

/// A micro-batch, and where it is on its way.
struct Way<'a> {
    batch: &'a TokenBatch,
    mode: Mode,
    tables: RotaryTables,
    entry: Tensor,
    /// What the next block reads; on the way back the gradient of what the next one gave.
    state: Tensor,
    /// What the blocks read that are computed again, the last ones.
    inputs: BlockInputs,
}

impl Decoder {
    /// Adds the gradients that [`Decoder::loss_and_backward`] of these micro-batches, each with its seed, adds one after the other,
    /// and returns their summed losses (scalars on the device, not yet read). Every block is computed again on the way back, and
    /// what each reads is kept of all micro-batches at a time: `[tokens, hidden]` for each block.
    ///
    /// Gradients are added in the same order, so the bits are the same; but for rows of tokens that are trained in table and head
    /// alike, which get those of the head first.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn loss_and_backward_by_block(&self, micros: &[(&TokenBatch, u64)], weight: f64) -> Result<Vec<Tensor>> {
        let (blocks, first) = (self.stage().blocks(), self.first_trained_block());
        let mut ways = micros.iter().map(|(batch, seed)| Way::new(self, batch, *seed)).collect::<Result<Vec<_>>>()?;
        for i in blocks.clone() {
            ways.iter_mut().try_for_each(|way| way.forward(self, i, i >= first))?;
            self.release_block(i)?;
        }
        let losses = self.in_turns(|| ways.iter_mut().map(|way| way.through_head(self, weight)).collect())?;
        for i in (first..blocks.end).rev() {
            ways.iter_mut().try_for_each(|way| way.back(self, i))?;
            self.release_block(i)?;
        }
        ways.into_iter().try_for_each(Way::end)?;
        Ok(losses)
    }
}

impl<'a> Way<'a> {
    fn new(model: &Decoder, batch: &'a TokenBatch, seed: u64) -> Result<Self> {
        let mode = Mode::Train { seed };
        let entry = model.embed_batch(batch, mode)?;
        let tables = RotaryTables::new(&model.config, &batch.position_ids, batch.longest(), model.kind())?;
        Ok(Self { batch, mode, tables, state: entry.f_detach()?, entry, inputs: BlockInputs::new(model.offload) })
    }

    fn forward(&mut self, model: &Decoder, i: usize, keep: bool) -> Result<()> {
        let rows = Some(&self.batch.target_rows);
        let next = no_grad(|| model.block(i, &self.state, self.batch, &self.tables, self.mode, rows))?;
        let read = std::mem::replace(&mut self.state, next);
        if keep {
            self.inputs.push(read)?;
        }
        Ok(())
    }

    fn through_head(&mut self, model: &Decoder, weight: f64) -> Result<Tensor> {
        let (loss, gradient) = model.head_gradient(&self.state, self.batch, &mut Count::Alike(weight))?;
        self.state = gradient;
        Ok(loss)
    }

    fn back(&mut self, model: &Decoder, i: usize) -> Result<()> {
        let Some(input) = self.inputs.pop()? else { return Ok(()) };
        let passes_on = !self.inputs.is_empty() || self.entry.requires_grad();
        let read = input.f_set_requires_grad(passes_on)?;
        if let Some(gradient) = model.block_again(i, &read, &self.state, self.batch, &self.tables, self.mode)? {
            self.state = gradient;
        }
        Ok(())
    }

    fn end(self) -> Result<()> {
        if self.entry.requires_grad() {
            backward(&[&self.entry], &[&self.state])?;
        }
        Ok(())
    }
}
