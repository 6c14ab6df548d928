//! AdaLoRA's part of a run: the regulariser, the allocation after each step, and the pruned form that is saved.

use crate::error::Result;
use lora_core::{AdaLora, BudgetSchedule, RankAllocator, orthogonality};
use lora_format::{AdapterConfig, AdapterModule, Method};
use lora_model::Decoder;
use std::collections::BTreeMap;
use tch::Tensor;

/// What AdaLoRA adds to a step.
#[derive(Debug)]
pub(crate) struct Budgeting {
    /// Absent where ranks were settled by an earlier run.
    allocator: Option<RankAllocator>,
    orth_reg_weight: f64,
}

impl Budgeting {
    /// For a model with AdaLoRA's adapters; `None` for another one. An adapter that was pruned before keeps its ranks.
    ///
    /// # Errors
    /// Settings that leave nothing to prune.
    pub(crate) fn of(config: Option<&AdapterConfig>, model: &Decoder, total_steps: u64) -> Result<Option<Self>> {
        let Some(AdapterConfig { method: Method::AdaLora(own), .. }) = config else { return Ok(None) };
        let schedule = BudgetSchedule {
            initial: 0,
            target: 0,
            tinit: own.tinit,
            tfinal: own.tfinal,
            delta_t: own.delta_t,
            total_step: own.total_step.unwrap_or_else(|| i64::try_from(total_steps).unwrap_or(i64::MAX)),
        };
        let allocator = match own.rank_pattern {
            Some(_) => None,
            None => Some(RankAllocator::new(model.triplets(), own.target_r, schedule, own.beta1, own.beta2)?),
        };
        Ok(Some(Self { allocator, orth_reg_weight: own.orth_reg_weight }))
    }

    /// Adds the gradient of the regulariser, and returns what it adds to the loss of the step.
    ///
    /// # Errors
    /// What libtorch reports.
    pub(crate) fn regularise(&self, model: &Decoder) -> Result<f64> {
        let layers = model.adalora();
        let layers: Vec<&AdaLora> = layers.iter().map(|(_, l)| *l).collect();
        let mean = orthogonality(&layers, self.orth_reg_weight)?;
        Ok(self.orth_reg_weight * mean)
    }

    /// After the optimizer's part of step `step` (from 0): importance, budget, pruning. Returns the budget.
    ///
    /// # Errors
    /// What libtorch reports.
    pub(crate) fn allocate(&mut self, step: u64) -> Result<Option<u64>> {
        let Some(allocator) = &mut self.allocator else { return Ok(None) };
        let step = i64::try_from(step).unwrap_or(i64::MAX);
        let allocation = allocator.step(step)?;
        Ok(Some(allocation.budget.unsigned_abs()))
    }

    /// The adapter as PEFT saves it: without the triplets that the last allocation left out.
    ///
    /// # Errors
    /// What libtorch reports.
    pub(crate) fn prune(
        &self,
        config: &mut AdapterConfig,
        modules: &mut BTreeMap<String, AdapterModule>,
    ) -> Result<()> {
        let pattern = self.allocator.as_ref().map(RankAllocator::rank_pattern).transpose()?;
        let Some(pattern) = pattern.flatten() else { return Ok(()) };
        for (path, kept) in &pattern {
            let Some(AdapterModule::AdaLora(tensors)) = modules.get_mut(path) else { continue };
            let places: Vec<i64> = (0..).zip(kept).filter_map(|(i, kept)| kept.then_some(i)).collect();
            let cut = |t: &Tensor, dim: i64| -> std::result::Result<Tensor, lora_torch::Error> {
                Ok(t.f_detach()?.f_index_select(dim, &Tensor::f_from_slice(&places)?.f_to_device(t.device())?)?)
            };
            (tensors.a, tensors.b, tensors.e) = (cut(&tensors.a, 0)?, cut(&tensors.b, 1)?, cut(&tensors.e, 0)?);
        }
        if let Method::AdaLora(own) = &mut config.method {
            own.rank_pattern = Some(pattern);
        }
        Ok(())
    }

    /// What goes on from step to step.
    ///
    /// # Errors
    /// What libtorch reports.
    pub(crate) fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(self.allocator.as_ref().map_or(Ok(Vec::new()), RankAllocator::state)?)
    }

    /// Takes its part out of a checkpoint's state.
    ///
    /// # Errors
    /// A tensor that is missing or of another shape.
    pub(crate) fn take_state(&mut self, state: &mut BTreeMap<String, Tensor>) -> Result<()> {
        match &mut self.allocator {
            Some(allocator) => Ok(allocator.take_state(state)?),
            None => Ok(()),
        }
    }

    /// The allocator, to be looked at.
    pub(crate) fn allocator(&self) -> Option<&RankAllocator> {
        self.allocator.as_ref()
    }
}
