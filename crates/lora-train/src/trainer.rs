//! The trainer: a model, its trained parameters, the data's order, and THE step.

mod evaluating;
mod keeping;
mod staged;

use crate::allocation::Budgeting;
use crate::answers::Answers;
use crate::checkpoint::TrainState;
use crate::classes::class_batch;
use crate::comparing::Comparing;
use crate::config::Reference;
use crate::error::{Error, Result};
use crate::eval::on_device;
use crate::events::{Event, EventSink};
use crate::exchange::{Asks, Part, exchange, join};
use crate::loader::{Laid, Loader, Step, sampler_of};
use crate::metrics::StepRecord;
use crate::objective::Objective;
use crate::params::FlatParams;
use crate::pipeline::{Micro, Pipeline};
use crate::plan::{RunPlan, Trained};
use crate::policy::Policy;
use crate::reward::{Reward, reward_of};
use crate::share::Share;
use crate::team::Team;
use lora_core::RankAllocator;
use lora_data::{Cursor, Origin};
use lora_model::{Decoder, Keeping, Stage, Storage, TokenBatch};
use lora_torch::{AdamWScalars, catching, device_memory, mix_seed, peak_rss_bytes};
use staged::Collected;
use std::time::Instant;

/// Where the result of the best evaluation is kept, in the run's folder.
pub(crate) const BEST_FOLDER: &str = "best";
/// This many steps in a row without a finite loss and gradient end the run.
const MAX_SKIPPED_IN_A_ROW: u32 = 3;
/// So many rows of a step without an update are named.
const NAMED_ROWS: usize = 8;

/// A run in progress.
#[derive(Debug)]
pub struct Trainer {
    plan: RunPlan,
    model: Decoder,
    params: FlatParams,
    /// For AdaLoRA.
    budgeting: Option<Budgeting>,
    /// Where answers are compared or rated.
    comparing: Option<Comparing>,
    /// Where the model answers prompts itself and is rewarded.
    policy: Option<Policy>,
    /// Where each process has some of the blocks.
    pipeline: Option<Pipeline>,
    /// What the stages brought to rank 0 last.
    collected: Option<Collected>,
    loader: Loader,
    state: TrainState,
    /// Whether parameters and state are those of the same step.
    whole: bool,
    /// How long the last step waited for its batches.
    data_seconds: f64,
    team: Team,
    /// What any of several processes asked for in the last step.
    agreed: Asks,
}

/// What a step did.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
pub enum StepOutcome {
    /// The parameters were updated.
    Updated(StepRecord),
    /// Loss or gradient were not finite, and the parameters are as before.
    Skipped {
        /// The step.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
        /// Its rows, the first of them where there are many.
        rows: Vec<Origin>,
    },
}

impl Trainer {
    /// Loads the base weights and puts adapters beside them.
    ///
    /// # Errors
    /// What loading reports.
    pub fn new(plan: RunPlan, sink: &mut dyn EventSink) -> Result<Self> {
        Self::in_team(plan, Team::default(), sink)
    }

    /// The same as one of several processes, each of which has the whole model. All of them make the same calls.
    ///
    /// # Errors
    /// As [`Trainer::new`], or [`Error::TooFewMicroBatches`].
    pub fn in_team(plan: RunPlan, team: Team, sink: &mut dyn EventSink) -> Result<Self> {
        team.check(&plan.config)?;
        let objective = plan.config.objective.objective();
        // Before a weight is read: what cannot be started is told at once.
        let reward = reward_of(&plan.config.objective).map_err(|source| Error::RewardProgram { source })?;
        Self::prepare(plan, team, objective, reward, sink)
    }

    /// The same with an objective of the caller's own, over the answers of the plan; where the data has neither pairs nor
    /// ratings, every row is an answer that is rated good.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub fn with_objective(plan: RunPlan, objective: Box<dyn Objective>, sink: &mut dyn EventSink) -> Result<Self> {
        Self::with_objective_in_team(plan, Team::default(), objective, sink)
    }

    /// The same as one of several processes.
    pub(crate) fn with_objective_in_team(
        plan: RunPlan,
        team: Team,
        objective: Box<dyn Objective>,
        sink: &mut dyn EventSink,
    ) -> Result<Self> {
        team.check(&plan.config)?;
        Self::prepare(plan, team, Some(objective), None, sink)
    }

    /// The same with a reward of the caller's own for what the model answers, in a run whose objective is `grpo`. What
    /// `objective.reward` names is not asked.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub fn with_reward(plan: RunPlan, reward: Box<dyn Reward>, sink: &mut dyn EventSink) -> Result<Self> {
        Self::prepare(plan, Team::default(), None, Some(reward), sink)
    }

    fn prepare(
        plan: RunPlan,
        team: Team,
        objective: Option<Box<dyn Objective>>,
        reward: Option<Box<dyn Reward>>,
        sink: &mut dyn EventSink,
    ) -> Result<Self> {
        let mut progress = |done, of| sink.event(Event::Loading { done, of });
        let (storage, mut packing) = plan.keeping();
        let on_host = storage == Storage::Host;
        let keeping = Keeping { kind: plan.kind, device: plan.device, storage };
        let pipeline = Pipeline::of(&plan, &team)?;
        let stage = pipeline.as_ref().map_or_else(|| Stage::whole(&plan.model), |pipeline| pipeline.stage().clone());
        let (seed, whole) = (plan.config.seed, plan.model.clone());
        let mut model = Decoder::load_stage(&plan.model_dir, whole, stage, seed, keeping, &mut progress)?;
        let mut comparing = objective.map(|objective| {
            let alone = || [&plan.train, &plan.eval].map(|rows| Answers::alone(rows.clone()));
            let [train, eval] = plan.answers.clone().unwrap_or_else(alone);
            Comparing::new(objective, train, eval)
        });
        let mut asks = comparing.as_mut().filter(|comparing| comparing.needs_reference());
        if plan.starts_apart()
            && plan.config.objective.reference == Reference::Base
            && let Some(comparing) = asks.take()
        {
            // Before there is an adapter.
            if let Some(packing) = packing.take() {
                model.pack(packing, &mut progress)?;
            }
            if on_host {
                model.keep_on_host()?;
            }
            ask_reference(comparing, &model, &plan, ("base", team.leads()), sink)?;
        }
        let mut progress = |done, of| sink.event(Event::Loading { done, of });
        match &plan.trained {
            Trained::Fresh(injection) => model.inject(injection, plan.config.seed)?,
            Trained::Existing(folder) => model.load_adapter(folder)?,
            Trained::Everything => model.train_everything()?,
        }
        if let Some(packing) = packing {
            model.pack(packing, &mut progress)?;
        }
        if on_host {
            model.keep_on_host()?;
        }
        model.lora_dropout = plan.config.lora.dropout();
        model.remake = plan.config.train.gradient_checkpointing.remakes();
        model.offload = plan.config.train.gradient_checkpointing.offloads();
        model.neftune_noise_alpha = plan.config.train.neftune_noise_alpha;
        let params = FlatParams::new(model.parameters(), plan.config.train.lora_plus(), plan.config.train.optim)?;
        if let Some(comparing) = asks {
            ask_reference(comparing, &model, &plan, (params.digest()?.as_str(), team.leads()), sink)?;
        }
        let policy = reward.map(|reward| Policy::new(reward, &plan, &mut model, &params)).transpose()?;
        let budgeting = Budgeting::of(plan.adapter_config().as_ref(), &model, plan.total_steps)?;
        let sampler = sampler_of(&plan);
        let (batch, micro) =
            (plan.config.train.per_device_train_batch_size, plan.config.train.gradient_accumulation_steps);
        // Every stage takes every micro-batch.
        let sharing = if pipeline.is_some() { 1 } else { team.world() };
        let share = Share::of(team.rank(), sharing, || plan.row_lengths());
        let loader = Loader::new((plan.train.clone(), plan.rows.clone()), sampler, batch as usize, micro, share);
        Ok(Self {
            plan,
            model,
            params,
            budgeting,
            comparing,
            policy,
            pipeline,
            collected: None,
            loader,
            state: TrainState::default(),
            whole: true,
            data_seconds: 0.0,
            team,
            agreed: Asks::default(),
        })
    }

    /// One optimizer step: the gradient of the mean loss over all trained tokens of its micro-batches, clipped, applied.
    ///
    /// # Errors
    /// [`Error::NotFinite`] after three steps in a row without a finite loss and gradient, or what the model reports.
    pub fn step(&mut self) -> Result<StepOutcome> {
        self.step_asking(&|_| Asks::default())
    }

    /// The same. Where several processes train together, what any of them `asks` for goes along with the gradients.
    pub(crate) fn step_asking(&mut self, asks: &dyn Fn(&Self) -> Asks) -> Result<StepOutcome> {
        let start = Instant::now();
        // What tch panics with is told to the others, too.
        let own = catching(|| self.own_part()).map_err(Error::from).flatten();
        let own = own.map(|(own, part)| (own, Part { asks: asks(self), ..part }));
        let (Step { batches, next: mut cursor, .. }, whole) = match &self.pipeline {
            Some(_) => join(&self.team, &self.params, own)?,
            None if self.team.is_alone() => own?,
            None => exchange(&self.team, &self.params, own)?,
        };
        let (config, step) = (&self.plan.config.train, self.state.step);
        let Part { trained, tokens, tally, .. } = whole;
        let regulariser = self.budgeting.as_ref().map_or(Ok(0.0), |b| b.regularise(&self.model))?;
        let loss = (whole.loss + tally.loss) / whole.count as f64 + regulariser;
        let grad_norm = whole.squares.map_or_else(|| self.params.grad_norm(), |squares| Ok(squares.sqrt()))?;
        self.params.clip_grad(grad_norm, config.max_grad_norm)?;
        let learning_rate = self.plan.schedule.lr_at(step);
        let finite = loss.is_finite() && grad_norm.is_finite();
        if finite {
            self.whole = false;
            self.params.update(&AdamWScalars {
                lr: learning_rate,
                beta1: config.adam_beta1,
                beta2: config.adam_beta2,
                eps: config.adam_epsilon,
                weight_decay: config.weight_decay,
                step: (step - self.state.skipped_steps) as i64 + 1,
            })?;
        }
        let rank_budget = match &mut self.budgeting {
            Some(budgeting) if finite => budgeting.allocate(step)?,
            _ => None,
        };

        if self.policy.as_mut().is_some_and(|policy| !policy.used()) {
            // The next step learns from the same answers.
            cursor = self.cursor();
        }
        let rewards = match &self.policy {
            Some(policy) => Some(policy.figures()),
            None => self.comparing.is_some().then(|| tally.rewards()),
        };
        let seconds = start.elapsed().as_secs_f64();
        self.state.step += 1;
        (self.state.cursor_epoch, self.state.cursor_row) = (cursor.epoch, cursor.row);
        self.state.trained_tokens += trained;
        self.state.tokens += tokens;
        self.state.seconds += seconds;
        self.whole = true;
        self.agreed = whole.asks;
        if self.state.step.is_multiple_of(self.plan.config.train.ddp_check_steps) {
            self.check_parameters()?;
        }
        if !finite {
            return self.skip(loss, grad_norm, &batches);
        }
        self.state.skipped_in_a_row = 0;
        Ok(StepOutcome::Updated(StepRecord {
            step: self.state.step,
            epoch: self.epoch(),
            loss,
            grad_norm,
            rank_budget,
            rewards,
            learning_rate,
            trained_tokens: trained,
            tokens,
            seconds: self.state.seconds,
            data_seconds: self.data_seconds,
            tokens_per_second: tokens as f64 / seconds,
            peak_memory_bytes: self.peak_memory()?,
        }))
    }

    /// The gradients of this process's micro-batches, and what there is to tell of them.
    fn own_part(&mut self) -> Result<(Step, Part)> {
        let start = Instant::now();
        let own = self.loader.step_at(self.cursor());
        // A stage without its batches could not even fail in step with the others.
        let own = if self.pipeline.is_some() { self.team.agree(own)? } else { own? };
        self.data_seconds = start.elapsed().as_secs_f64();
        let (step, batches) = (self.state.step, &own.batches);
        if let Some(policy) = &mut self.policy {
            policy.answer(&self.model, &self.params, &self.plan, batches, step)?;
        }
        let (tokens, trained) = self.tokens(batches);
        let count = self.count(batches, trained);
        let mut part = Part { trained, tokens, count, ..Part::default() };
        // The count of all is known when all have told theirs, and gradients are divided then.
        let known = self.team.is_alone() || self.pipeline.is_some();
        let weight = if known { 1.0 / count as f64 } else { 1.0 };

        self.params.zero_grad()?;
        let train = &self.plan.config.train;
        let recompute = train.gradient_checkpointing.recompute(train.recompute_layers);
        // From the micro-batch's number in the whole step, whichever process computes it.
        let seed_of = |micro: u64| mix_seed(&[self.plan.config.seed, step, micro]);
        if self.pipeline.is_some() || train.accumulate_by_block {
            let micro =
                |(laid, micro): (&Laid, &u64)| Ok(Micro { batch: self.token_batch(laid)?, seed: seed_of(*micro) });
            let micros = batches.iter().zip(&own.numbers).map(micro).collect::<Result<Vec<_>>>();
            part.loss = match &self.pipeline {
                Some(pipeline) => pipeline.step(&self.model, &self.team.agree(micros)?, weight, recompute)?,
                None => by_block(&self.model, &micros?, weight)?,
            };
            return Ok((own, part));
        }
        for (laid, micro) in batches.iter().zip(&own.numbers) {
            let seed = seed_of(*micro);
            if let Some(policy) = &mut self.policy {
                part.loss += policy.backward(&self.model, *micro as usize, seed, recompute)?;
                continue;
            }
            if let Some(comparing) = &self.comparing {
                part.tally.join(&comparing.backward(&self.model, laid, seed, weight, recompute)?);
                continue;
            }
            let batch = self.token_batch(laid)?;
            let sum = self.model.loss_and_backward(&batch, seed, weight, recompute)?;
            part.loss += sum.f_double_value(&[]).map_err(lora_torch::Error::from)?;
        }
        Ok((own, part))
    }

    /// The place in the data.
    fn cursor(&self) -> Cursor {
        Cursor { epoch: self.state.cursor_epoch, row: self.state.cursor_row }
    }

    fn skip(&mut self, loss: f64, grad_norm: f64, batches: &[Laid]) -> Result<StepOutcome> {
        self.state.skipped_steps += 1;
        self.state.skipped_in_a_row += 1;
        let step = self.state.step;
        if self.state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW {
            return Err(Error::NotFinite { step, loss, grad_norm, learning_rate: self.plan.schedule.lr_at(step - 1) });
        }
        let places = batches.iter().flat_map(|laid| &laid.examples).take(NAMED_ROWS);
        let rows = places.map(|&row| self.plan.train.origin(row)).collect::<std::result::Result<_, _>>()?;
        Ok(StepOutcome::Skipped { step, loss, grad_norm, rows })
    }

    /// Tokens of a step, and those of them that are trained; of a classifier its texts. A step never crosses the end of an
    /// epoch, so the last one of an epoch may be smaller; its tokens still weigh what they weigh elsewhere in the step.
    fn tokens(&self, batches: &[Laid]) -> (u64, u64) {
        if let Some(policy) = &self.policy {
            return policy.tokens();
        }
        let of = |laid: &Laid| match self.plan.classes {
            None => laid.batch.trained_tokens(),
            Some(_) => laid.examples.len(),
        };
        let sum = |of: &dyn Fn(&Laid) -> usize| batches.iter().map(of).sum::<usize>() as u64;
        (sum(&|laid| laid.batch.tokens()), sum(&of))
    }

    /// What the summed loss of a step is divided by: trained tokens or texts, or pairs or answers. A policy's is a mean as it
    /// is.
    fn count(&self, batches: &[Laid], trained: u64) -> u64 {
        match (&self.policy, &self.comparing) {
            (Some(_), _) => 1,
            (None, Some(comparing)) => comparing.count(batches) as u64,
            (None, None) => trained,
        }
    }

    fn token_batch(&self, laid: &Laid) -> Result<TokenBatch> {
        let (model, device) = (&self.plan.model, self.plan.device);
        match &self.plan.classes {
            None => on_device(model, &laid.batch, device),
            Some(classes) => class_batch(model, &laid.batch, laid.examples.iter().map(|&i| &classes.train[i]), device),
        }
    }

    /// Refuses to go on where processes have come to different parameters.
    ///
    /// # Errors
    /// [`Error::RanksApart`].
    pub(crate) fn check_parameters(&self) -> Result<()> {
        if self.pipeline.is_some() {
            return Ok(());
        }
        self.team.same_parameters(self.state.step, || self.params.digest())
    }

    /// The processes that train together.
    pub fn team(&self) -> &Team {
        &self.team
    }

    /// What all of several processes know that one of them asked for; `None` for a process alone.
    pub(crate) fn agreed(&self) -> Option<Asks> {
        (!self.team.is_alone()).then_some(self.agreed)
    }

    /// Whether parameters and state are those of the same step: not where a step failed while it changed them.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole
    }

    /// Passes over the data, with the part of the present one.
    fn epoch(&self) -> f64 {
        self.state.cursor_epoch as f64 + self.state.cursor_row as f64 / self.plan.rows_per_pass().max(1) as f64
    }

    fn peak_memory(&self) -> Result<u64> {
        Ok(device_memory(self.plan.device)?.map_or_else(peak_rss_bytes, |m| m.peak))
    }

    /// Where the run stands.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// What it was started from.
    pub fn plan(&self) -> &RunPlan {
        &self.plan
    }

    /// The model; where it is divided, this process's part of it.
    pub fn model(&self) -> &Decoder {
        &self.model
    }

    /// What prunes AdaLoRA's triplets, where that is trained.
    pub fn rank_allocator(&self) -> Option<&RankAllocator> {
        self.budgeting.as_ref().and_then(Budgeting::allocator)
    }

    /// How many numbers are trained, those of other stages with them.
    pub(crate) fn trained_parameters(&self) -> i64 {
        if self.is_staged() { self.plan.trained_parameters() } else { self.params.len() }
    }

    /// The trained parameters; of a divided model those of this process's blocks.
    pub fn params(&self) -> &FlatParams {
        &self.params
    }
}

/// What the reference says of a run's answers: that of `model` as it stands, which `state` tells apart from others.
fn ask_reference(
    comparing: &mut Comparing,
    model: &Decoder,
    plan: &RunPlan,
    (state, keep): (&str, bool),
    sink: &mut dyn EventSink,
) -> Result<()> {
    let belongs_to = format!("{state} {:?} {:?} {:?}", plan.digests, plan.kind, plan.config.model.quantization);
    let rows = plan.config.train.per_device_eval_batch_size as usize;
    comparing.ask_reference(model, &belongs_to, rows, (plan.config.output_dir.as_path(), keep), sink)
}

/// Adds the gradients of micro-batches that go through each block together, and returns their summed loss.
fn by_block(model: &Decoder, micros: &[Micro], weight: f64) -> Result<f64> {
    let side_by_side: Vec<_> = micros.iter().map(|micro| (&micro.batch, micro.seed)).collect();
    let mut loss = 0.0;
    for sum in model.loss_and_backward_by_block(&side_by_side, weight)? {
        loss += sum.f_double_value(&[]).map_err(lora_torch::Error::from)?;
    }
    Ok(loss)
}
