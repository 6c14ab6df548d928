//! What is kept of a run: its checkpoints and its result.

use super::Trainer;
use crate::allocation::Budgeting;
use crate::checkpoint::{Found, save_checkpoint};
use crate::error::{Error, Result};
use crate::events::EventSink;
use crate::policy::Policy;
use crate::resume_point::{find_resume_point, identity};
use lora_format::{TensorFile, write_adapter, write_adapter_tensors, write_tensors};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// The parameters and moments of a checkpoint.
const STATE_FILE: &str = "trainer_state.safetensors";

impl Trainer {
    /// Saves a checkpoint of the present step: the adapter as PEFT reads it, and the exact state to go on from.
    ///
    /// # Errors
    /// [`Error::AdapterNotFinite`] when a parameter is not finite: such a state is never saved. What writing reports.
    pub fn save(&self) -> Result<PathBuf> {
        let bytes = self.plan.checkpoint_bytes();
        let keep = self.plan.config.train.save_total_limit as usize;
        save_checkpoint(
            &self.plan.config.output_dir,
            &identity(&self.plan, &self.team)?,
            &self.state,
            bytes,
            keep,
            |dir| {
                self.write_result(dir)?;
                let file = dir.join(STATE_FILE);
                let written = match self.is_staged() {
                    true => write_tensors(&file, &self.collected()?.state, &BTreeMap::new()),
                    false => write_tensors(&file, &self.tensors()?, &BTreeMap::new()),
                };
                Ok(written?)
            },
        )
    }

    /// The tensors that a checkpoint keeps, by name.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = self.params.state()?;
        tensors.extend(self.budgeting.as_ref().map_or(Ok(Vec::new()), Budgeting::state)?);
        tensors.extend(self.policy.as_ref().map_or(Ok(Vec::new()), Policy::state)?);
        Ok(tensors)
    }

    /// Writes what the run is for: the adapter, or the weights of a full training.
    ///
    /// # Errors
    /// As [`Trainer::save`].
    pub fn write_result(&self, dir: &Path) -> Result<()> {
        if !self.params.is_finite()? {
            return Err(Error::AdapterNotFinite { step: self.state.step });
        }
        if let Some(labels) = &self.plan.model.labels {
            std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
            labels.write(dir)?;
        }
        match self.plan.adapter_config() {
            Some(config) if self.is_staged() => Ok(write_adapter_tensors(dir, &config, &self.collected()?.adapter)?),
            Some(mut config) => {
                let mut modules = self.model.adapter_modules()?;
                if let Some(budgeting) = &self.budgeting {
                    budgeting.prune(&mut config, &mut modules)?;
                }
                Ok(write_adapter(dir, &config, &modules)?)
            }
            None => Ok(self.model.save_weights(dir)?),
        }
    }

    /// Goes on from the newest good checkpoint of the run's folder. `allowed` are keys that the user changed on purpose.
    ///
    /// # Errors
    /// [`Error::NothingToResume`] when there is none, [`Error::ResumeMismatch`] when it belongs to another run.
    pub fn resume(&mut self, allowed: &[String], sink: &mut dyn EventSink) -> Result<()> {
        let found = match self.team.leads() {
            true => find_resume_point(&self.plan, &self.team, allowed, sink).map(Some),
            false => Ok(None),
        };
        self.go_on(found)
    }

    /// Takes what rank 0 has found. Others need not see its disk.
    pub(crate) fn go_on(&mut self, found: Result<Option<Found>>) -> Result<()> {
        if self.is_staged() {
            return self.go_on_in_stages(found);
        }
        let team = self.team.clone();
        let taken = found.and_then(|found| found.map_or(Ok(()), |found| self.go_on_from(found)));
        team.agree(taken)?;
        if team.is_alone() {
            return Ok(());
        }
        let (mut tensors, state) = team.share(self.tensors()?, &self.state)?;
        if let Some(budgeting) = &mut self.budgeting {
            budgeting.take_state(&mut tensors)?;
        }
        self.params.load_state(tensors)?;
        self.state = state;
        Ok(())
    }

    /// The tensors of a checkpoint.
    pub(super) fn read_state(found: &Found) -> Result<BTreeMap<String, Tensor>> {
        let file = TensorFile::open(&found.dir.join(STATE_FILE))?;
        let names: Vec<String> = file.names().map(String::from).collect();
        names.into_iter().map(|n| Ok((n.clone(), file.read(&n)?))).collect()
    }

    /// Takes the parameters, moments and place of a checkpoint.
    fn go_on_from(&mut self, found: Found) -> Result<()> {
        let mut state = Self::read_state(&found)?;
        if let Some(budgeting) = &mut self.budgeting {
            budgeting.take_state(&mut state)?;
        }
        if let Some(policy) = &mut self.policy {
            policy.take_state(&mut state)?;
        }
        self.params.load_state(state)?;
        self.state = found.manifest.state;
        Ok(())
    }
}
