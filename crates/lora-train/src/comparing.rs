//! The way of a batch of answers through an objective.

mod known;

use crate::answers::Answers;
use crate::digest::hex;
use crate::error::{Error, Result};
use crate::eval::{EvalReport, on_device};
use crate::events::{Event, EventSink};
use crate::loader::Laid;
use crate::objective::{Answer, Judgement, Objective};
use known::{Known, REFERENCE_FILE, read_known, write_known};
use lora_data::Batch;
use lora_model::{ClassTargets, Decoder, ModelConfig, Recompute, TokenBatch};
use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};
use std::ops::Range;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// What the policy stands for, in the terms of the objective.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rewards {
    /// Mean reward of the better answers.
    pub chosen: Option<f64>,
    /// Mean reward of the worse answers.
    pub rejected: Option<f64>,
    /// The first less the second.
    pub margin: Option<f64>,
    /// Share of the pairs whose better answer has the higher reward.
    pub accuracy: Option<f64>,
    /// Mean drift from the reference on unrelated answers, in nats.
    pub drift: Option<f64>,
    /// Of answers that the model writes: their mean reward.
    pub mean: Option<f64>,
    /// Mean over the prompts of the standard deviation among the answers.
    pub spread: Option<f64>,
    /// Share of the prompts whose answers are all worth the same, so that nothing is learnt from them.
    pub alike: Option<f64>,
    /// Mean over the tokens of the divergence from the reference, in nats.
    pub kl: Option<f64>,
    /// Share of the tokens whose probability has moved out of bounds.
    pub clipped: Option<f64>,
    /// Mean tokens of the answers.
    pub length: Option<f64>,
    /// Share of the answers that came to their end.
    pub ended: Option<f64>,
}

impl Rewards {
    /// Each that is known, by its name in `metrics.jsonl`.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let all = [
            ("reward_chosen", self.chosen),
            ("reward_rejected", self.rejected),
            ("reward_margin", self.margin),
            ("reward_accuracy", self.accuracy),
            ("reward_drift", self.drift),
            ("reward", self.mean),
            ("reward_std", self.spread),
            ("reward_alike", self.alike),
            ("kl", self.kl),
            ("clip_ratio", self.clipped),
            ("completion_length", self.length),
            ("completion_ended", self.ended),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?)))
    }
}

impl Serialize for Rewards {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.named())
    }
}

/// Sums of which [`Rewards`] are the means.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) loss: f64,
    pub(crate) items: usize,
    sums: [f64; 2],
    counts: [usize; 2],
    right: usize,
    pairs: bool,
    drifts: (f64, usize),
}

impl Tally {
    fn add(&mut self, judged: &Judgement, answers: &[Answer<'_>], each: usize, drift: Option<f64>) {
        self.loss += judged.loss;
        self.items += answers.len() / each;
        self.pairs = each == 2;
        for (answer, reward) in answers.iter().zip(&judged.rewards) {
            self.sums[usize::from(answer.good)] += reward;
            self.counts[usize::from(answer.good)] += 1;
        }
        if self.pairs {
            self.right += judged.rewards.chunks_exact(2).filter(|pair| pair[0] > pair[1]).count();
        }
        if let Some(drift) = drift {
            self.drifts = (self.drifts.0 + drift, self.drifts.1 + 1);
        }
    }

    pub(crate) fn join(&mut self, other: &Tally) {
        self.loss += other.loss;
        self.items += other.items;
        self.pairs |= other.pairs;
        self.right += other.right;
        self.drifts = (self.drifts.0 + other.drifts.0, self.drifts.1 + other.drifts.1);
        for side in 0..2 {
            self.sums[side] += other.sums[side];
            self.counts[side] += other.counts[side];
        }
    }

    /// Everything as numbers whose sums are those of [`Tally::join`].
    pub(crate) fn numbers(&self) -> [f64; 10] {
        let [worse, better] = self.counts.map(|n| n as f64);
        let (pairs, drifts) = (f64::from(u8::from(self.pairs)), self.drifts.1 as f64);
        let (items, right) = (self.items as f64, self.right as f64);
        [self.loss, items, self.sums[0], self.sums[1], worse, better, right, pairs, self.drifts.0, drifts]
    }

    /// The tally of such numbers.
    pub(crate) fn of_numbers(numbers: &[f64]) -> Self {
        let at = |i: usize| numbers.get(i).copied().unwrap_or(0.0);
        let count = |i: usize| at(i) as usize;
        Self {
            loss: at(0),
            items: count(1),
            sums: [at(2), at(3)],
            counts: [count(4), count(5)],
            right: count(6),
            pairs: at(7) > 0.0,
            drifts: (at(8), count(9)),
        }
    }

    pub(crate) fn rewards(&self) -> Rewards {
        let mean = |side: usize| (self.counts[side] > 0).then(|| self.sums[side] / self.counts[side] as f64);
        let (rejected, chosen) = (mean(0), mean(1));
        Rewards {
            chosen,
            rejected,
            margin: chosen.zip(rejected).map(|(w, l)| w - l),
            accuracy: (self.pairs && self.items > 0).then(|| self.right as f64 / self.items as f64),
            drift: (self.drifts.1 > 0).then(|| self.drifts.0 / self.drifts.1 as f64),
            ..Rewards::default()
        }
    }
}

/// An objective with what it needs to know of a run's answers.
#[derive(Debug)]
pub(crate) struct Comparing {
    objective: Box<dyn Objective>,
    train: Answers,
    eval: Answers,
    known: [Known; 2],
}

impl Comparing {
    pub(crate) fn new(objective: Box<dyn Objective>, train: Answers, eval: Answers) -> Self {
        Self { objective, train, eval, known: Default::default() }
    }

    /// Whether the reference must be asked.
    pub(crate) fn needs_reference(&self) -> bool {
        self.objective.needs_reference()
    }

    /// Asks the model as it stands what it says of every answer, unless the run's folder knows it already; what was said is
    /// kept there where `keep` says so.
    pub(crate) fn ask_reference(
        &mut self,
        model: &Decoder,
        belongs_to: &str,
        rows: usize,
        (dir, keep): (&Path, bool),
        sink: &mut dyn EventSink,
    ) -> Result<()> {
        let path = dir.join(REFERENCE_FILE);
        let mut hash = Sha256::new();
        hash.update(format!("{belongs_to} {} {}", self.train.digest(), self.eval.digest()));
        let belongs_to = hex(&hash.finalize());
        if let Some(known) = read_known(&path, &belongs_to)? {
            self.known = known;
            return Ok(());
        }
        let drift = self.objective.needs_drift();
        let unrelated = |answers: &Answers| answers.unrelated.clone().filter(|_| drift);
        let count = |answers: &Answers| answers.rows.len() + unrelated(answers).map_or(0, |rows| rows.len());
        let (mut done, of) = (0, count(&self.train) + count(&self.eval));
        let mut more = |n| {
            done += n;
            sink.event(Event::Reference { done, of });
        };
        for (known, answers) in self.known.iter_mut().zip([&self.train, &self.eval]) {
            let (all, each) = (answers.rows.len(), rows.max(1));
            known.of_rows = sums(model, all, each, &|rows| Ok(answers.rows.batch(rows)?), &mut more)?;
            if let Some(unrelated) = unrelated(answers) {
                known.of_unrelated = sums(model, all, each, &|rows| unrelated.batch(rows), &mut more)?;
            }
        }
        if !keep {
            return Ok(());
        }
        std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        write_known(&path, &belongs_to, &self.known)
    }

    /// The pairs or answers of a step.
    pub(crate) fn count(&self, batches: &[Laid]) -> usize {
        batches.iter().map(|laid| laid.examples.len()).sum::<usize>() / self.train.each
    }

    /// Adds the gradient of `weight` times the summed loss of a micro-batch.
    pub(crate) fn backward(
        &self,
        model: &Decoder,
        laid: &Laid,
        seed: u64,
        weight: f64,
        recompute: Recompute,
    ) -> Result<Tally> {
        let (answers, known) = (&self.train, &self.known[0]);
        let drift = self.drift(model, answers, known, &laid.examples)?;
        let batch = token_batch(model, &laid.batch)?;
        let (mut tally, counts) = (Tally::default(), numbers_of_each(model, &laid.batch));
        model.slopes_and_backward(&batch, seed, recompute, &mut |logps| {
            let (numbers, size) = (to_host(logps)?, logps.size());
            let list = list(&numbers, &counts, &laid.examples, answers, known);
            let judged = self.objective.judge(&list, drift.unwrap_or(0.0));
            tally.add(&judged, &list, answers.each, drift);
            let slopes: Vec<f64> = judged.slopes.iter().flatten().map(|slope| slope * weight).collect();
            Ok(Tensor::f_from_slice(&slopes)?.f_view(size.as_slice())?.f_to_device(logps.device())?)
        })?;
        Ok(tally)
    }

    /// Judges the held-out answers, `rows` pairs or answers at a time.
    pub(crate) fn evaluate(&self, model: &Decoder, rows: usize, sink: &mut dyn EventSink) -> Result<EvalReport> {
        let (answers, known, mut tally) = (&self.eval, &self.known[1], Tally::default());
        let (all, step, mut tokens) = (answers.rows.len(), rows.max(1) * answers.each, 0);
        for begin in (0..all).step_by(step) {
            let examples: Vec<usize> = (begin..all.min(begin + step)).collect();
            let batch = answers.rows.batch(examples.iter().copied())?;
            let drift = self.drift(model, answers, known, &examples)?;
            let numbers = to_host(&model.log_probabilities(&token_batch(model, &batch)?)?)?;
            let counts = numbers_of_each(model, &batch);
            let list = list(&numbers, &counts, &examples, answers, known);
            tally.add(&self.objective.judge(&list, drift.unwrap_or(0.0)), &list, answers.each, drift);
            tokens += batch.trained_tokens() as u64;
            sink.event(Event::Evaluating { done: examples.last().map_or(0, |last| last + 1), of: all });
        }
        let (loss, rewards) = (tally.loss / tally.items.max(1) as f64, tally.rewards());
        let accuracy = rewards.accuracy.unwrap_or(f64::NAN);
        let examples = tally.items;
        // It is no mean of log-probabilities, so there is no perplexity.
        let perplexity = f64::NAN;
        let rewards = Some(rewards);
        Ok(EvalReport { loss, perplexity, accuracy, tokens, examples, rewards, ..EvalReport::default() })
    }

    /// How far the policy has moved from the reference on answers to other prompts: the mean of their log ratios, and 0
    /// where that is negative (Ethayarajh et al. 2024, section 4.1).
    fn drift(&self, model: &Decoder, answers: &Answers, known: &Known, examples: &[usize]) -> Result<Option<f64>> {
        let Some(unrelated) = answers.unrelated.as_ref().filter(|_| self.objective.needs_drift()) else {
            return Ok(None);
        };
        let batch = unrelated.batch(examples.iter().copied())?;
        let now: f64 = to_host(&model.log_probabilities(&token_batch(model, &batch)?)?)?.iter().sum();
        let before: f64 = examples.iter().map(|&row| Known::get(&known.of_unrelated, row)).sum();
        Ok(Some(((now - before) / examples.len().max(1) as f64).max(0.0)))
    }
}

/// The answers of a batch with their numbers.
fn list<'a>(
    numbers: &'a [f64],
    counts: &[usize],
    examples: &[usize],
    answers: &Answers,
    known: &Known,
) -> Vec<Answer<'a>> {
    let mut rest = numbers;
    let answer = |(&count, &row): (&usize, &usize)| {
        let (logps, after) = rest.split_at(count.min(rest.len()));
        rest = after;
        let good = answers.good.get(row).copied().unwrap_or(false);
        Answer { logps, reference: Known::get(&known.of_rows, row), good }
    };
    counts.iter().zip(examples).map(answer).collect()
}

/// The sum of the log-probabilities of each of `all` rows, of which `batch` lays some end to end.
fn sums(
    model: &Decoder,
    all: usize,
    each: usize,
    batch: &dyn Fn(Range<usize>) -> Result<Batch>,
    done: &mut dyn FnMut(usize),
) -> Result<Vec<f64>> {
    let mut sums = Vec::with_capacity(all);
    for begin in (0..all).step_by(each) {
        let batch = batch(begin..all.min(begin + each))?;
        let numbers = to_host(&model.log_probabilities(&token_batch(model, &batch)?)?)?;
        let mut rest = numbers.as_slice();
        for count in numbers_of_each(model, &batch) {
            let (own, after) = rest.split_at(count.min(rest.len()));
            sums.push(own.iter().sum());
            rest = after;
        }
        done(batch.segment_lens.len());
    }
    Ok(sums)
}

/// A batch on the model's device; of a reward model a batch of texts.
pub(crate) fn token_batch(model: &Decoder, batch: &Batch) -> Result<TokenBatch> {
    let (config, device) = (&model.config, model.device());
    if !is_classifier(config) {
        return on_device(config, batch, device);
    }
    let targets = ClassTargets::Unknown;
    Ok(TokenBatch::for_classes(config, &batch.input_ids, &[], &batch.segment_lens, targets, device)?)
}

fn is_classifier(config: &ModelConfig) -> bool {
    config.labels.is_some()
}

/// How many numbers the model gives for each row of a batch: one for each trained token, or a score.
pub(crate) fn numbers_of_each(model: &Decoder, batch: &Batch) -> Vec<usize> {
    if is_classifier(&model.config) {
        return vec![1; batch.segment_lens.len()];
    }
    let (mut end, mut rows) = (0, batch.target_rows.iter().peekable());
    let count = |length: &i64| {
        end += length;
        std::iter::from_fn(|| rows.next_if(|row| **row < end)).count()
    };
    batch.segment_lens.iter().map(count).collect()
}

pub(crate) fn to_host(numbers: &Tensor) -> lora_model::Result<Vec<f64>> {
    let wide = numbers.f_to_kind(Kind::Double)?.f_to_device(Device::Cpu)?.f_reshape([-1])?;
    Ok(Vec::try_from(&wide)?)
}

#[cfg(test)]
mod tests;
