//! A base whose blocks lie in the memory of the host: each comes to the device when it is computed, while the one before it is.

use crate::decoder::{Decoder, ModuleRef};
use crate::error::{Error, Result};
use lora_torch::{Coming, OnHost, set_data};
use std::cell::RefCell;
use tch::Tensor;

/// The matrices of the blocks on the host, and which of them are on the device: those of one block, and those of another on their
/// way.
#[derive(Debug)]
pub(crate) struct HostedBase {
    blocks: Vec<Vec<Matrix>>,
    state: RefCell<State>,
}

/// A matrix that a layer has, and where its numbers are when its block is not computed.
#[derive(Debug)]
struct Matrix {
    layers: Tensor,
    host: OnHost,
}

#[derive(Debug, Default)]
struct State {
    here: Option<usize>,
    coming: Option<(usize, Vec<Coming>)>,
}

/// Which block is likely to be next after `i`: the one in the direction of the way, which turns at both ends.
fn next(before: Option<usize>, i: usize, blocks: usize) -> Option<usize> {
    let back = before.is_some_and(|before| before > i);
    let (up, down) = ((i + 1 < blocks).then_some(i + 1), i.checked_sub(1));
    if back { down.or(up) } else { up.or(down) }
}

impl HostedBase {
    /// Brings a block's matrices to the device and lets go of those of the block before, then begins with the next one's: before
    /// anything of this block is computed, so that they come while it is.
    fn enter(&self, i: usize) -> Result<()> {
        let mut state = self.state.borrow_mut();
        if state.here == Some(i) {
            return Ok(());
        }
        let before = state.here.take();
        for matrix in before.and_then(|before| self.blocks.get(before)).into_iter().flatten() {
            set_data(&matrix.layers, matrix.host.host())?;
        }
        let coming = match state.coming.take() {
            Some((of, coming)) if of == i => coming,
            _ => self.fetch(i)?,
        };
        for (matrix, coming) in self.blocks.get(i).into_iter().flatten().zip(coming) {
            set_data(&matrix.layers, &coming.arrive()?)?;
        }
        state.here = Some(i);
        state.coming =
            next(before, i, self.blocks.len()).map(|next| Ok::<_, Error>((next, self.fetch(next)?))).transpose()?;
        Ok(())
    }

    fn fetch(&self, i: usize) -> Result<Vec<Coming>> {
        let matrices = self.blocks.get(i).into_iter().flatten();
        Ok(matrices.map(|matrix| matrix.host.fetch()).collect::<lora_torch::Result<_>>()?)
    }
}

impl Decoder {
    /// Takes the frozen matrices of the blocks, which are on the host ([`Storage::Host`](crate::Storage::Host)), into memory that
    /// the device reads by itself; from here on each comes when its block is computed. At most two blocks are on the device.
    ///
    /// Call it after [`inject`](Self::inject). Where it learns, every block must be computed again on the way back
    /// ([`Recompute::ALL`](crate::Recompute::ALL)).
    ///
    /// # Errors
    /// What libtorch reports, as where the host has not enough memory.
    pub fn keep_on_host(&mut self) -> Result<()> {
        let (device, stage) = (self.device(), self.stage().blocks());
        let mut blocks: Vec<Vec<Matrix>> = stage.clone().map(|_| Vec::new()).collect();
        for (path, module) in self.modules() {
            let block = stage.clone().position(|i| path.starts_with(&self.config.in_block(i, "")));
            let (ModuleRef::Linear(layer), Some(block)) = (module, block) else { continue };
            let Some(weight) = layer.weight.plain().filter(|w| !w.requires_grad()) else { continue };
            let host = OnHost::keep(weight, device)?;
            set_data(weight, host.host())?;
            blocks[block].push(Matrix { layers: weight.shallow_clone(), host });
        }
        self.hosted = Some(HostedBase { blocks, state: RefCell::default() });
        Ok(())
    }

    /// Makes sure that the matrices of block `i` are where they are computed with.
    pub(crate) fn enter_block(&self, i: usize) -> Result<()> {
        match &self.hosted {
            Some(hosted) => hosted.enter(i - self.stage.blocks().start),
            None => Ok(()),
        }
    }

    /// Refuses to keep activations of blocks whose matrices will have left when they are needed.
    pub(crate) fn check_recomputed(&self, all: bool) -> Result<()> {
        if self.hosted.is_some() && !all {
            let (expected, got) = ("full: the base is on the host".to_string(), "none, or a part of the blocks".into());
            return Err(Error::Input { what: "gradient_checkpointing", expected, got });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::next;

    #[test]
    fn the_way_goes_up_and_comes_down() {
        let mut before = None;
        let mut told = Vec::new();
        for i in [0, 1, 2, 1, 0, 1] {
            told.push(next(before, i, 3));
            before = Some(i);
        }
        assert_eq!(told, [1, 2, 1, 0, 1, 2].map(Some));
        assert_eq!(next(None, 0, 1), None);
    }
}
