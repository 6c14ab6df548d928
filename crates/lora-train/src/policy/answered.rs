//! Answers that the model wrote, with what became of them.

use crate::error::{Error, Result};
use lora_data::{Batch, Tokenizer};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// An answer, with its prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct OneAnswer {
    /// Prompt and answer.
    pub(super) input_ids: Vec<i64>,
    /// Tokens of the prompt.
    pub(super) prompt: usize,
    /// Whether it came to its end.
    pub(super) ended: bool,
    /// The answer of the example; only for the reward.
    pub(super) right: Vec<u32>,
    pub(super) reward: f64,
    pub(super) advantage: f64,
    /// Its log-probabilities under the model that wrote it, where they are needed.
    pub(super) old: Vec<f64>,
    /// Its log-probabilities under the reference, where they are needed.
    pub(super) reference: Vec<f64>,
}

impl OneAnswer {
    /// Tokens that the model wrote.
    pub(super) fn new_tokens(&self) -> usize {
        self.input_ids.len() - self.prompt
    }

    /// Prompt, answer, and the answer of the example.
    pub(super) fn texts(&self, tokenizer: &Tokenizer) -> Result<[String; 3]> {
        let ids: Vec<u32> = self.input_ids.iter().filter_map(|id| u32::try_from(*id).ok()).collect();
        let (prompt, completion) = ids.split_at(self.prompt.min(ids.len()));
        Ok([
            tokenizer.decode(prompt, false)?,
            tokenizer.decode(completion, true)?,
            tokenizer.decode(&self.right, true)?,
        ])
    }
}

/// Answers end to end, as the model takes them. Nothing is predicted from the last token of one, so it is left out.
pub(super) fn batch(list: &[OneAnswer]) -> Batch {
    let mut batch = Batch::default();
    for answer in list {
        let (start, length) = (batch.input_ids.len() as i64, answer.input_ids.len() - 1);
        batch.input_ids.extend(&answer.input_ids[..length]);
        batch.position_ids.extend(0..length as i64);
        batch.segment_lens.push(length as i64);
        batch.target_rows.extend((answer.prompt - 1..length).map(|row| start + row as i64));
        batch.targets.extend(&answer.input_ids[answer.prompt..]);
    }
    batch
}

/// The answers of a step, by micro-batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Answered {
    pub(super) batches: Vec<Vec<OneAnswer>>,
    /// Steps that have learnt from them.
    pub(super) uses: u32,
}

/// Names in a checkpoint's state.
const PREFIX: &str = "answered.";

impl Answered {
    /// As tensors: a row of `shape` for each answer with its micro-batch, its tokens, those of its prompt, and whether it ended;
    /// the rest end to end.
    pub(super) fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut shape = Vec::new();
        for (micro, list) in self.batches.iter().enumerate() {
            for a in list {
                let (tokens, prompt) = (a.input_ids.len() as i64, a.prompt as i64);
                shape.extend([micro as i64, tokens, prompt, i64::from(a.ended)]);
            }
        }
        let all = || self.batches.iter().flatten();
        let ids: Vec<i64> = all().flat_map(|a| a.input_ids.iter().copied()).collect();
        let numbers = |of: fn(&OneAnswer) -> &[f64]| -> Vec<f64> { all().flat_map(of).copied().collect() };
        let each = |of: fn(&OneAnswer) -> f64| -> Vec<f64> { all().map(of).collect() };
        let list = [
            ("uses", Tensor::f_from_slice(&[i64::from(self.uses)])?),
            ("shape", Tensor::f_from_slice(&shape)?),
            ("input_ids", Tensor::f_from_slice(&ids)?),
            ("reward", Tensor::f_from_slice(&each(|a| a.reward))?),
            ("advantage", Tensor::f_from_slice(&each(|a| a.advantage))?),
            ("old", Tensor::f_from_slice(&numbers(|a| &a.old))?),
            ("reference", Tensor::f_from_slice(&numbers(|a| &a.reference))?),
        ];
        Ok(list.into_iter().map(|(name, tensor)| (format!("{PREFIX}{name}"), tensor)).collect())
    }

    /// Takes its part out of a checkpoint's state, if it has one.
    pub(super) fn take(state: &mut BTreeMap<String, Tensor>) -> Result<Option<Self>> {
        if !state.contains_key("answered.shape") {
            return Ok(None);
        }
        let mismatch = |name: &str, expected: &str, found: String| Error::StateMismatch {
            name: format!("{PREFIX}{name}"),
            expected: expected.into(),
            found,
        };
        let mut take = |name: &str, kind: Kind| {
            let tensor = state.remove(&format!("{PREFIX}{name}"));
            let found = tensor.as_ref().map_or("nothing".into(), |t| format!("{:?} {:?}", t.kind(), t.size()));
            let fits = tensor.filter(|t| t.kind() == kind && t.dim() == 1);
            fits.ok_or_else(|| mismatch(name, "a list of numbers", found))
        };
        let integers = |t: Tensor| Vec::<i64>::try_from(&t);
        let uses = integers(take("uses", Kind::Int64)?)?.first().copied().unwrap_or(0);
        let shape = integers(take("shape", Kind::Int64)?)?;
        let mut ids = integers(take("input_ids", Kind::Int64)?)?.into_iter();
        let mut numbers = |name: &str| -> Result<std::vec::IntoIter<f64>> {
            Ok(Vec::<f64>::try_from(&take(name, Kind::Double)?)?.into_iter())
        };
        let (mut reward, mut advantage) = (numbers("reward")?, numbers("advantage")?);
        let (mut old, mut reference) = (numbers("old")?, numbers("reference")?);
        let (has_old, has_reference) = (old.len() > 0, reference.len() > 0);
        let mut answered = Self { batches: Vec::new(), uses: u32::try_from(uses).unwrap_or(u32::MAX) };
        for row in shape.chunks_exact(4) {
            let [micro, tokens, prompt] = [row[0], row[1], row[2]].map(|n| usize::try_from(n).unwrap_or(usize::MAX));
            let new = tokens.saturating_sub(prompt);
            let answer = OneAnswer {
                input_ids: ids.by_ref().take(tokens).collect(),
                prompt,
                ended: row[3] != 0,
                right: Vec::new(),
                reward: reward.next().unwrap_or(0.0),
                advantage: advantage.next().unwrap_or(0.0),
                old: old.by_ref().take(if has_old { new } else { 0 }).collect(),
                reference: reference.by_ref().take(if has_reference { new } else { 0 }).collect(),
            };
            if prompt == 0 || new == 0 || answer.input_ids.len() != tokens || micro > answered.batches.len() {
                return Err(mismatch("shape", "the answers of a step", format!("{row:?}")));
            }
            if micro == answered.batches.len() {
                answered.batches.push(Vec::new());
            }
            if let Some(list) = answered.batches.get_mut(micro) {
                list.push(answer);
            }
        }
        Ok(Some(answered))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(prompt: usize, tokens: usize, with: bool) -> OneAnswer {
        let numbers = |by: f64| (0..tokens - prompt).filter(|_| with).map(|i| i as f64 * by).collect();
        OneAnswer {
            input_ids: (0..tokens as i64).collect(),
            prompt,
            ended: tokens.is_multiple_of(2),
            reward: 0.25 * tokens as f64,
            advantage: -0.5,
            old: numbers(-0.5),
            reference: numbers(-0.25),
            ..OneAnswer::default()
        }
    }

    #[test]
    fn answers_come_back_from_a_checkpoint() {
        for with in [true, false] {
            let batches = vec![vec![answer(2, 5, with), answer(2, 3, with)], vec![answer(1, 2, with)]];
            let answered = Answered { batches, uses: 1 };
            let mut state: BTreeMap<_, _> = answered.state().unwrap().into_iter().collect();
            state.insert("other".into(), Tensor::from(1.0));
            assert_eq!(Answered::take(&mut state).unwrap(), Some(answered));
            assert_eq!(state.keys().collect::<Vec<_>>(), ["other"]);
            assert_eq!(Answered::take(&mut state).unwrap(), None);
        }
    }

    #[test]
    fn what_does_not_belong_together_is_refused() {
        let answered = Answered { batches: vec![vec![answer(2, 5, false)]], uses: 1 };
        let fault = |name: &str, tensor: Option<Tensor>| {
            let mut state: BTreeMap<_, _> = answered.state().unwrap().into_iter().collect();
            state.remove(name);
            state.extend(tensor.map(|t| (name.to_string(), t)));
            Answered::take(&mut state).unwrap_err().to_string()
        };
        assert!(fault("answered.input_ids", None).contains("answered.input_ids"));
        assert!(fault("answered.input_ids", Some(Tensor::from_slice(&[1i64]))).contains("the answers of a step"));
        assert!(fault("answered.reward", Some(Tensor::from_slice(&[1i64]))).contains("Int64"));
        assert!(fault("answered.shape", Some(Tensor::from_slice(&[3i64, 5, 2, 0]))).contains("[3, 5, 2, 0]"));
    }

    #[test]
    fn the_last_token_of_an_answer_predicts_nothing() {
        let batch = batch(&[answer(2, 5, false), answer(1, 2, false)]);
        assert_eq!(batch.input_ids, [0, 1, 2, 3, 0]);
        assert_eq!((batch.segment_lens, batch.position_ids), (vec![4, 1], vec![0, 1, 2, 3, 0]));
        assert_eq!((batch.target_rows, batch.targets), (vec![1, 2, 3, 4], vec![2, 3, 4, 1]));
    }
}
