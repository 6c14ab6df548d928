//! A model that answers prompts itself and is rewarded: what a step learns from, and the way of it through the loss.

mod answered;

use crate::answering::{last_answer, stop_ids};
use crate::comparing::{Rewards, numbers_of_each, to_host, token_batch};
use crate::config::{ObjectiveConfig, Reference};
use crate::error::{Error, Result};
use crate::eval::EvalReport;
use crate::events::{Event, EventSink};
use crate::loader::Laid;
use crate::params::FlatParams;
use crate::plan::{RunPlan, Trained};
use crate::policy_loss::{PolicyJudgement, PolicyLoss, Rewarded, StepSize, advantages, mean, spread};
use crate::reward::{Completion, Reward, RewardFault};
use answered::{Answered, OneAnswer};
use lora_data::{Rows, Tokenizer};
use lora_format::{AdapterModule, InitLoraWeights as PeftInit, Method};
use lora_model::{Decoder, GenerateOptions, Recompute, Sampling};
use lora_torch::mix_seed;
use std::collections::BTreeMap;
use tch::Tensor;

/// Tells the draws of answers from those of dropout.
const ANSWERS: u64 = 0x616e_7377;

/// What rewards a policy, and what it learns from at present.
pub(crate) struct Policy {
    reward: Box<dyn Reward>,
    loss: PolicyLoss,
    config: ObjectiveConfig,
    /// The trained parameters of the reference, where the divergence from it counts: with them the model is the reference, so
    /// that no second model is needed.
    reference: Option<Tensor>,
    /// The answers that the present step learns from, and the ones after it where there are several to a set of answers.
    answered: Option<Answered>,
    /// What the loss has said of the present step.
    judged: PolicyJudgement,
}

impl std::fmt::Debug for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Policy").field("loss", &self.loss).field("answered", &self.answered).finish_non_exhaustive()
    }
}

/// Checks that the model has a reference to be kept near to, and that every example has a prompt.
///
/// # Errors
/// [`Error::NoPrompt`], or of the model what cannot be switched off.
pub(crate) fn check_policy(
    config: &ObjectiveConfig,
    trained: &Trained,
    softcap: Option<f64>,
    rows: [&Rows; 2],
) -> Result<()> {
    let fault = |field, value: String, reason: &str| -> Result<()> {
        Err(lora_model::Error::Adapter { field, value, reason: reason.into() }.into())
    };
    if softcap.is_some() && config.temperature != 1.0 {
        let reason = "the logits of this model are capped, and probabilities are taken at 1 only; set it to 1";
        return fault("objective.temperature", config.temperature.to_string(), reason);
    }
    let kept_near = config.policy_loss().beta > 0.0;
    if kept_near && config.reference == Reference::Base && !has_base(trained) {
        let reason = "this adapter changes more than low-rank pairs, which alone can be switched off; use \"start\", or beta = 0";
        return fault("objective.reference", config.reference.name().into(), reason);
    }
    for rows in rows {
        for row in 0..rows.len() {
            let example = rows.example(row)?;
            if last_answer(&example).is_none() {
                return Err(Error::NoPrompt { origin: example.origin.to_string() });
            }
        }
    }
    Ok(())
}

/// Whether the base is what is left when every B is zero.
fn has_base(trained: &Trained) -> bool {
    let is_pair = |module: &AdapterModule| match module {
        AdapterModule::Linear(lora) | AdapterModule::Embedding(lora) => {
            lora.magnitude.is_none() && lora.bias.is_none() && lora.base_bias.is_none() && lora.base_weight.is_none()
        }
        AdapterModule::Stacked(_) => true,
        _ => false,
    };
    match trained {
        // It begins as the base, and that is what is kept.
        Trained::Everything => true,
        Trained::Fresh(plan) => plan.config.init_lora_weights != PeftInit::Random || !plan.config.use_dora,
        Trained::Existing(folder) => {
            matches!(folder.config.method, Method::Lora)
                && matches!(folder.config.init_lora_weights, PeftInit::Default | PeftInit::Random)
                && folder.modules.values().all(is_pair)
        }
    }
}

/// Whether a parameter is what makes an adapter differ from nothing.
fn is_b(name: &str) -> bool {
    name.contains("lora_B") || name.contains("lora_embedding_B")
}

impl Policy {
    /// For a model as it begins.
    ///
    /// # Errors
    /// What libtorch reports.
    pub(crate) fn new(
        reward: Box<dyn Reward>,
        plan: &RunPlan,
        model: &mut Decoder,
        params: &FlatParams,
    ) -> Result<Self> {
        let config = plan.config.objective.clone();
        let loss = config.policy_loss();
        // Answers are drawn from these logits and their probabilities taken of them.
        model.config.logits_scale /= config.temperature;
        let reference = match (loss.beta > 0.0, config.reference) {
            (false, _) => None,
            (true, Reference::Base) if plan.starts_apart() => Some(params.values_without(is_b)?),
            (true, _) => Some(params.values_without(|_| false)?),
        };
        Ok(Self { reward, loss, config, reference, answered: None, judged: PolicyJudgement::default() })
    }

    /// Lets the model answer the prompts of a step, unless there are answers that are to be learnt from once more.
    ///
    /// # Errors
    /// What the model, the tokenizer or the reward reports.
    pub(crate) fn answer(
        &mut self,
        model: &Decoder,
        params: &FlatParams,
        plan: &RunPlan,
        batches: &[Laid],
        step: u64,
    ) -> Result<()> {
        self.judged = PolicyJudgement::default();
        if self.answered.as_ref().is_some_and(|answered| answered.uses < self.config.num_iterations) {
            return Ok(());
        }
        let mut answered = Answered::default();
        for (micro, laid) in batches.iter().enumerate() {
            let mut list = Vec::new();
            for (place, &row) in laid.examples.iter().enumerate() {
                let seeds: Vec<u64> = (0..u64::from(self.config.num_generations))
                    .map(|i| mix_seed(&[plan.config.seed, step, micro as u64, place as u64, i, ANSWERS]))
                    .collect();
                list.extend(self.ask(model, plan, &plan.train, row, &seeds)?);
            }
            answered.batches.push(list);
        }
        let mut list: Vec<&mut OneAnswer> = answered.batches.iter_mut().flatten().collect();
        let rewards = score(&mut *self.reward, &plan.tokenizer, &list)?;
        let advantages = advantages(&rewards, self.config.num_generations as usize, self.config.scale_rewards);
        for ((answer, reward), advantage) in list.iter_mut().zip(rewards).zip(advantages) {
            (answer.reward, answer.advantage) = (reward, advantage);
        }
        for list in &mut answered.batches {
            if self.config.num_iterations > 1 {
                let logps = logps(model, list)?;
                list.iter_mut().zip(logps).for_each(|(answer, logps)| answer.old = logps);
            }
            if let Some(reference) = &self.reference {
                let logps = params.with_values(reference, || logps(model, list))?;
                list.iter_mut().zip(logps).for_each(|(answer, logps)| answer.reference = logps);
            }
        }
        self.answered = Some(answered);
        Ok(())
    }

    /// The answers of a row's prompt, one for each seed; with none the most likely tokens.
    fn ask(&self, model: &Decoder, plan: &RunPlan, rows: &Rows, row: usize, seeds: &[u64]) -> Result<Vec<OneAnswer>> {
        let example = rows.example(row)?;
        let none = || Error::NoPrompt { origin: example.origin.to_string() };
        let (begin, end) = last_answer(&example).ok_or_else(none)?;
        let prompt: Vec<i64> = example.input_ids[..begin].iter().map(|&id| i64::from(id)).collect();
        let (temperature, top_p) = if seeds.is_empty() { (0.0, 1.0) } else { (1.0, self.config.top_p) };
        let options = GenerateOptions {
            max_new_tokens: self.config.max_completion_length as usize,
            stop_ids: stop_ids(model, &plan.tokenizer),
            sampling: Sampling { temperature, top_p, seed: 0 },
        };
        let texts = model.generate_group(&prompt, &options, if seeds.is_empty() { &[0] } else { seeds })?;
        let of = |completion: Vec<i64>| OneAnswer {
            ended: completion.last().is_some_and(|id| options.stop_ids.contains(id)),
            prompt: prompt.len(),
            input_ids: [prompt.as_slice(), &completion].concat(),
            right: example.input_ids[begin..end].to_vec(),
            ..OneAnswer::default()
        };
        Ok(texts.into_iter().map(of).collect())
    }

    /// Adds the gradient of a micro-batch of the step's answers, and returns its part of the loss.
    ///
    /// # Errors
    /// What the model reports.
    pub(crate) fn backward(&mut self, model: &Decoder, micro: usize, seed: u64, recompute: Recompute) -> Result<f64> {
        let Some(answered) = &self.answered else { return Ok(0.0) };
        let (of, Some(list)) = (self.size(answered), answered.batches.get(micro)) else { return Ok(0.0) };
        let batch = answered::batch(list);
        let (batch, counts) = (token_batch(model, &batch)?, numbers_of_each(model, &batch));
        let mut judged = PolicyJudgement::default();
        model.slopes_and_backward(&batch, seed, recompute, &mut |logps| {
            let numbers = to_host(logps)?;
            let mut rest = numbers.as_slice();
            let known = |list: &'_ [f64]| -> bool { !list.is_empty() };
            let rewarded: Vec<Rewarded<'_>> = list
                .iter()
                .zip(&counts)
                .map(|(answer, &count)| {
                    let (logps, after) = rest.split_at(count.min(rest.len()));
                    rest = after;
                    Rewarded {
                        logps,
                        old: known(&answer.old).then_some(answer.old.as_slice()),
                        reference: known(&answer.reference).then_some(answer.reference.as_slice()),
                        advantage: answer.advantage,
                        counts: self.counts(answer),
                    }
                })
                .collect();
            judged = self.loss.judge(&rewarded, of);
            Ok(Tensor::f_from_slice(&judged.slopes)?.f_to_device(logps.device())?)
        })?;
        self.judged.join(&judged);
        Ok(judged.loss)
    }

    fn counts(&self, answer: &OneAnswer) -> bool {
        answer.ended || !self.config.mask_truncated_completions
    }

    fn size(&self, answered: &Answered) -> StepSize {
        let all = || answered.batches.iter().flatten();
        StepSize {
            answers: all().count(),
            tokens: all().filter(|answer| self.counts(answer)).map(OneAnswer::new_tokens).sum(),
        }
    }

    /// Tokens that the present step computes, and those of them that the model wrote.
    pub(crate) fn tokens(&self) -> (u64, u64) {
        let all = || self.answered.iter().flat_map(|answered| answered.batches.iter().flatten());
        (all().map(|a| a.input_ids.len() as u64).sum(), all().map(|a| a.new_tokens() as u64).sum())
    }

    /// Counts a step; whether the answers are used up, so that the next step has other prompts.
    pub(crate) fn used(&mut self) -> bool {
        let Some(answered) = &mut self.answered else { return true };
        answered.uses += 1;
        answered.uses >= self.config.num_iterations
    }

    /// What there is to tell of the present step.
    pub(crate) fn figures(&self) -> Rewards {
        let Some(answered) = &self.answered else { return Rewards::default() };
        let list: Vec<&OneAnswer> = answered.batches.iter().flatten().collect();
        let rewards: Vec<f64> = list.iter().map(|answer| answer.reward).collect();
        let groups: Vec<f64> = rewards.chunks(self.config.num_generations.max(1) as usize).map(spread).collect();
        let tokens = self.size(answered).tokens.max(1) as f64;
        let alike = groups.iter().filter(|spread| **spread == 0.0).count() as f64 / groups.len().max(1) as f64;
        Rewards {
            spread: Some(mean(&groups)),
            alike: Some(alike),
            kl: self.reference.is_some().then_some(self.judged.divergence / tokens),
            clipped: (self.config.num_iterations > 1).then_some(self.judged.clipped as f64 / tokens),
            ..of_answers(&list)
        }
    }

    /// Rewards the most likely answer to each held-out prompt. The loss is the mean reward with a minus.
    ///
    /// # Errors
    /// What the model, the tokenizer or the reward reports.
    pub(crate) fn evaluate(
        &mut self,
        model: &Decoder,
        plan: &RunPlan,
        rows: usize,
        sink: &mut dyn EventSink,
    ) -> Result<EvalReport> {
        let (mut all, of) = (Vec::new(), plan.eval.len());
        while all.len() < of {
            let mut list = Vec::new();
            for row in all.len()..of.min(all.len() + rows.max(1)) {
                list.extend(self.ask(model, plan, &plan.eval, row, &[])?);
            }
            let rewards = score(&mut *self.reward, &plan.tokenizer, &list.iter_mut().collect::<Vec<_>>())?;
            list.iter_mut().zip(rewards).for_each(|(answer, reward)| answer.reward = reward);
            all.append(&mut list);
            sink.event(Event::Evaluating { done: all.len(), of });
        }
        let all: Vec<&OneAnswer> = all.iter().collect();
        let rewards = of_answers(&all);
        let tokens = all.iter().map(|answer| answer.new_tokens() as u64).sum();
        Ok(EvalReport {
            loss: -rewards.mean.unwrap_or(0.0),
            perplexity: f64::NAN,
            accuracy: f64::NAN,
            tokens,
            examples: all.len(),
            rewards: Some(rewards),
            ..EvalReport::default()
        })
    }

    /// The answers that are to be learnt from once more, for a checkpoint.
    ///
    /// # Errors
    /// What libtorch reports.
    pub(crate) fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let going = self.answered.as_ref().filter(|answered| answered.uses < self.config.num_iterations);
        going.map_or(Ok(Vec::new()), Answered::state)
    }

    /// Takes them out of a checkpoint's state.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] for what does not belong together.
    pub(crate) fn take_state(&mut self, state: &mut BTreeMap<String, Tensor>) -> Result<()> {
        self.answered = Answered::take(state)?;
        Ok(())
    }
}

fn of_answers(list: &[&OneAnswer]) -> Rewards {
    let mean_of = |of: &dyn Fn(&OneAnswer) -> f64| Some(mean(&list.iter().map(|a| of(a)).collect::<Vec<_>>()));
    Rewards {
        mean: mean_of(&|a| a.reward),
        length: mean_of(&|a| a.new_tokens() as f64),
        ended: mean_of(&|a| f64::from(u8::from(a.ended))),
        ..Rewards::default()
    }
}

/// The reward of each answer.
fn score(reward: &mut dyn Reward, tokenizer: &Tokenizer, list: &[&mut OneAnswer]) -> Result<Vec<f64>> {
    let texts = list.iter().map(|answer| answer.texts(tokenizer)).collect::<Result<Vec<_>>>()?;
    let mut completions = Vec::with_capacity(list.len());
    for (answer, [prompt, completion, right]) in list.iter().zip(&texts) {
        completions.push(Completion { prompt, completion, answer: right, ended: answer.ended });
    }
    let rewards = reward.score(&completions).map_err(|source| Error::Reward { source })?;
    let fault = |reason: String| Err(Error::Reward { source: RewardFault::from(reason) });
    if rewards.len() != list.len() {
        return fault(format!("{} rewards for {} answers", rewards.len(), list.len()));
    }
    match rewards.iter().position(|reward| !reward.is_finite()) {
        Some(i) => fault(format!("a reward of {} for {:?}", rewards[i], completions[i].completion)),
        None => Ok(rewards),
    }
}

/// The log-probability of each token that the model wrote, answer by answer.
fn logps(model: &Decoder, list: &[OneAnswer]) -> Result<Vec<Vec<f64>>> {
    let batch = answered::batch(list);
    let numbers = to_host(&model.log_probabilities(&token_batch(model, &batch)?)?)?;
    let mut rest = numbers.as_slice();
    let own = |answer: &OneAnswer| {
        let (own, after) = rest.split_at(answer.new_tokens().min(rest.len()));
        rest = after;
        own.to_vec()
    };
    Ok(list.iter().map(own).collect())
}

#[cfg(test)]
mod tests;
