//! The processes that train together, and how they stay together: all go on, or none.

use crate::checkpoint::{RunIdentity, TrainState, compare_for_resume};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use lora_torch::distributed::{Collective, Single};
use std::collections::BTreeMap;
use std::sync::Arc;
use tch::{Device, Tensor};

/// The processes of a run, each with a copy of the model. Rank 0 leads: it evaluates, and it alone writes.
#[derive(Clone, Debug)]
pub struct Team(Arc<dyn Collective>);

impl Default for Team {
    /// A process alone.
    fn default() -> Self {
        Self(Arc::new(Single))
    }
}

impl Team {
    /// Those of a collective.
    pub fn of(collective: impl Collective + 'static) -> Self {
        Self(Arc::new(collective))
    }

    /// The place of this process.
    pub fn rank(&self) -> u32 {
        self.0.rank()
    }

    /// How many there are.
    pub fn world(&self) -> u32 {
        self.0.world()
    }

    /// Whether this process is the one that evaluates and writes.
    pub fn leads(&self) -> bool {
        self.rank() == 0
    }

    /// Whether there is no other.
    pub fn is_alone(&self) -> bool {
        self.world() < 2
    }

    /// What they exchange by.
    pub(crate) fn collective(&self) -> &dyn Collective {
        &*self.0
    }

    /// Refuses a run whose steps cannot be shared. To be called before anything that takes time.
    ///
    /// # Errors
    /// [`Error::TooFewMicroBatches`], [`Error::StagesAndRanks`], or [`Error::OneProcess`] where the model answers prompts itself.
    pub fn check(&self, config: &RunConfig) -> Result<()> {
        let (stages, world) = (config.train.pipeline_stages, self.world());
        if stages > 1 {
            return if stages == world { Ok(()) } else { Err(Error::StagesAndRanks { stages, world }) };
        }
        if !self.is_alone() && config.objective.samples() {
            return Err(Error::OneProcess { name: config.objective.name.name() });
        }
        let (micro_batches, world) = (config.train.gradient_accumulation_steps, self.world());
        let rows = config.train.per_device_train_batch_size;
        if micro_batches < world { Err(Error::TooFewMicroBatches { rows, micro_batches, world }) } else { Ok(()) }
    }

    /// Lets everyone go on with what it has, if everyone has something. Every process calls it, the one that failed too.
    ///
    /// # Errors
    /// Its own; or [`Error::Peer`] with that of another.
    pub fn agree<T>(&self, own: Result<T>) -> Result<T> {
        self.follow(own, 0).map(|(own, _)| own)
    }

    /// The same, with a number of rank 0's that everyone takes.
    pub(crate) fn follow<T>(&self, own: Result<T>, number: u32) -> Result<(T, u32)> {
        if self.is_alone() {
            return Ok((own?, number));
        }
        let number = if self.leads() { f64::from(number) } else { 0.0 };
        let mut slots = Tensor::f_from_slice(&[f64::from(u8::from(own.is_err())), number])?;
        let own = self.settle(own, |team| {
            team.all_reduce_sum(&mut slots)?;
            Ok(slots.f_double_value(&[0])? > 0.0)
        })?;
        Ok((own, slots.f_double_value(&[1])? as u32))
    }

    /// Runs an exchange that tells whether anyone has failed, and if so, hears what of whom.
    pub(crate) fn settle<T>(
        &self,
        own: Result<T>,
        exchange: impl FnOnce(&dyn Collective) -> Result<bool>,
    ) -> Result<T> {
        let failed = match (exchange(&*self.0), own.is_err()) {
            (Ok(failed), _) => failed,
            // What went wrong here first is what to tell.
            (Err(_), true) => return own,
            (Err(error), false) => return Err(error),
        };
        if !failed {
            return own;
        }
        let text = own.as_ref().err().map(ToString::to_string).unwrap_or_default();
        let texts = self.0.gather(text.as_bytes());
        let own = own?;
        let texts = texts?;
        match (0..).zip(texts).find(|(_, text)| !text.is_empty()) {
            Some((rank, text)) => Err(Error::Peer { rank, message: String::from_utf8_lossy(&text).into_owned() }),
            None => Ok(own),
        }
    }

    /// Refuses processes of which one is to do another run than rank 0.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`], the same on every one of them.
    pub(crate) fn same_run(&self, mut own: RunIdentity) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        own.config.insert("lora".into(), env!("CARGO_PKG_VERSION").into());
        // Each may compute where and with what it has.
        (own.threads, own.device) = (0, String::new());
        let json = |source| Error::Json { what: "a run's identity", source };
        let all = self.0.gather(&serde_json::to_vec(&own).map_err(json)?)?;
        let all: Vec<RunIdentity> =
            all.iter().map(|text| serde_json::from_slice(text)).collect::<serde_json::Result<_>>().map_err(json)?;
        let Some(lead) = all.first() else { return Ok(()) };
        for (rank, other) in (0..).zip(&all) {
            // What may differ at a resume may not differ here.
            let differences = match compare_for_resume(lead, other, &[]) {
                Ok(taken) => taken,
                Err(Error::ResumeMismatch { differences }) => differences,
                Err(other) => return Err(other),
            };
            if !differences.is_empty() {
                return Err(Error::RanksDiffer { rank, differences });
            }
        }
        Ok(())
    }

    /// Refuses to go on where one has other parameters than rank 0.
    ///
    /// # Errors
    /// [`Error::RanksApart`], the same on every one of them.
    pub(crate) fn same_parameters(&self, step: u64, digest: impl FnOnce() -> Result<String>) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        let all = self.0.gather(digest()?.as_bytes())?;
        match (0..).zip(&all).find(|(_, other)| Some(*other) != all.first()) {
            Some((rank, _)) => Err(Error::RanksApart { rank, step }),
            None => Ok(()),
        }
    }

    /// Gives everyone the tensors and the state of rank 0, which others need not be able to read from its disk.
    pub(crate) fn share(
        &self,
        tensors: Vec<(String, Tensor)>,
        state: &TrainState,
    ) -> Result<(BTreeMap<String, Tensor>, TrainState)> {
        let json = |source| Error::Json { what: "a run's state", source };
        let text = serde_json::to_vec(state).map_err(json)?;
        let texts = self.0.gather(if self.leads() { &text } else { b"" })?;
        let mut shared = BTreeMap::new();
        for (name, tensor) in tensors {
            let mut host = Tensor::f_empty(tensor.size(), (tensor.kind(), Device::Cpu))?;
            host.f_copy_(&tensor.f_detach()?)?;
            self.0.broadcast(&mut host, 0)?;
            shared.insert(name, host.f_to_device(tensor.device())?);
        }
        let state = serde_json::from_slice(texts.first().map_or(&text, |lead| lead)).map_err(json)?;
        Ok((shared, state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_alone_agrees_with_itself() {
        let team = Team::default();
        assert!(team.leads() && team.is_alone());
        assert_eq!(team.agree(Ok(3)).unwrap(), 3);
        assert!(matches!(team.agree::<()>(Err(Error::NothingTrained)), Err(Error::NothingTrained)));
        assert_eq!(team.follow(Ok(()), 7).unwrap().1, 7);
        let tensors = vec![("a".to_string(), Tensor::from_slice(&[1.0f32]))];
        let state = TrainState { step: 4, ..TrainState::default() };
        let (shared, same) = team.share(tensors, &state).unwrap();
        assert_eq!((shared["a"].double_value(&[0]), same), (1.0, state));
    }
}
