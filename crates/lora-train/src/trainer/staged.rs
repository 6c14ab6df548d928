//! What is different where each process has some of the blocks: what a run keeps is brought to rank 0 first, and what it goes
//! on from comes from there.

use super::Trainer;
use crate::checkpoint::Found;
use crate::error::{Error, Result};
use crate::eval::EvalReport;
use crate::events::EventSink;
use crate::gathering::{Named, gather, spread};
use crate::pipeline::Pipeline;
use crate::plan::RunPlan;
use crate::stages::stages_of;
use crate::team::Team;
use lora_format::adapter_tensors;

/// The parameters of all stages at a step; nothing behind rank 0.
#[derive(Debug)]
pub(super) struct Collected {
    step: u64,
    /// As an adapter's folder has them.
    pub(super) adapter: Named,
    /// With their moments, as a checkpoint has them.
    pub(super) state: Named,
}

impl Pipeline {
    /// This process's place in a run that goes in stages.
    pub(super) fn of(plan: &RunPlan, team: &Team) -> Result<Option<Self>> {
        let stages = stages_of(&plan.config, &plan.model, &plan.trained)?;
        let own = stages.into_iter().nth(team.rank() as usize).filter(|stage| !stage.is_whole());
        Ok(own.map(|stage| Self::new(team.clone(), stage, plan.config.train.pipeline_dtype)))
    }
}

impl Trainer {
    /// Whether each process has some of the blocks.
    pub(crate) fn is_staged(&self) -> bool {
        self.pipeline.is_some()
    }

    /// Brings what rank 0 writes of this step there, where others have parts of it. Every process calls it before rank 0
    /// saves or writes a result.
    ///
    /// # Errors
    /// [`Error::AdapterNotFinite`] on every process when a parameter of one is not finite, or a process that is lost.
    pub(crate) fn collect(&mut self) -> Result<()> {
        let step = self.state.step;
        if self.pipeline.is_none() || self.collected.as_ref().is_some_and(|collected| collected.step == step) {
            return Ok(());
        }
        let (adapter, state) = self.team.agree(self.own_parts())?;
        let (adapter, state) = (gather(&self.team, adapter)?, gather(&self.team, state)?);
        self.collected = Some(Collected { step, adapter, state });
        Ok(())
    }

    fn own_parts(&self) -> Result<(Named, Named)> {
        if !self.params.is_finite()? {
            return Err(Error::AdapterNotFinite { step: self.state.step });
        }
        let Some(config) = self.plan.adapter_config() else { return Ok((Vec::new(), Vec::new())) };
        let adapter = adapter_tensors(&self.plan.config.output_dir, &config, &self.model.adapter_modules()?)?;
        Ok((adapter, self.params.state()?))
    }

    /// What was brought here of this step.
    ///
    /// # Errors
    /// [`Error::NotCollected`].
    pub(super) fn collected(&self) -> Result<&Collected> {
        let step = self.state.step;
        self.collected.as_ref().filter(|collected| collected.step == step).ok_or(Error::NotCollected { step })
    }

    /// Evaluates in stages: every process has the same report, and comes to the same judgement of it.
    pub(super) fn evaluate_in_stages(&mut self, sink: &mut dyn EventSink) -> Result<Option<EvalReport>> {
        let Some(report) = self.measure(sink)? else { return Ok(None) };
        if self.judge(&report)? && self.plan.config.train.load_best_model_at_end {
            self.collect()?;
            let written = if self.team.leads() { self.write_best() } else { Ok(()) };
            self.team.agree(written)?;
        }
        Ok(Some(report))
    }

    /// Takes what rank 0 has found, each process its own part of it.
    pub(super) fn go_on_in_stages(&mut self, found: Result<Option<Found>>) -> Result<()> {
        let team = self.team.clone();
        let read = found.and_then(|found| {
            let Some(found) = found else { return Ok(Default::default()) };
            Ok((Self::read_state(&found)?, found.manifest.state))
        });
        let (tensors, state) = team.agree(read)?;
        let own = spread(&team, &self.params.state()?, tensors)?;
        let (_, state) = team.share(Vec::new(), &state)?;
        self.params.load_state(own)?;
        self.state = state;
        Ok(())
    }
}
