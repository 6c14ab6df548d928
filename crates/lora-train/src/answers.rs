//! Answers that are compared or rated, as rows of tokens.

use crate::digest::hex;
use crate::error::Result;
use lora_data::{Batch, Example, RowPlan, Rows};
use sha2::{Digest, Sha256};

/// The answers of a run.
#[derive(Clone, Debug)]
pub struct Answers {
    /// The prompt of each with the answer, which alone is trained; pairs lie next to each other, the better answer first.
    pub rows: Rows,
    /// Whether each is the better of its pair, or rated good.
    pub good: Vec<bool>,
    /// 2 where they are pairs, 1 where they are rated one by one.
    pub each: usize,
    /// Each prompt with the answer to the one before it, where the drift from the reference is measured.
    pub(crate) unrelated: Option<Unrelated>,
}

impl Answers {
    /// Pairs: rows `2 i` and `2 i + 1` are the better and the worse answer.
    pub fn of_pairs(rows: Rows) -> Self {
        Self { good: [true, false].repeat(rows.len() / 2), rows, each: 2, unrelated: None }
    }

    /// Answers that are rated one by one. Rows of unrelated answers are cut at `max_length` tokens.
    ///
    /// # Errors
    /// What choosing among the rows reports.
    pub fn of_rated(rows: Rows, good: Vec<bool>, max_length: usize) -> Result<Self> {
        let before = (0..rows.len()).map(|row| (row + rows.len() - 1) % rows.len());
        let unrelated = Unrelated { answers: rows.select(before.collect())?, prompts: rows.clone(), max_length };
        Ok(Self { rows, good, each: 1, unrelated: Some(unrelated) })
    }

    /// Rows of which every one is an answer that is rated good.
    pub fn alone(rows: Rows) -> Self {
        Self { good: vec![true; rows.len()], rows, each: 1, unrelated: None }
    }

    /// How many pairs, or answers that come alone.
    pub(crate) fn count(&self) -> usize {
        self.rows.len() / self.each
    }

    /// The rows of batches.
    pub(crate) fn plan(&self) -> RowPlan {
        match self.each {
            1 => RowPlan::one_each(self.rows.len()),
            each => RowPlan::groups(self.count(), each),
        }
    }

    /// Some of the pairs or answers, each as often as `order` names it.
    pub(crate) fn select(&self, order: &[usize]) -> Result<Self> {
        let rows: Vec<usize> = order.iter().flat_map(|i| i * self.each..(i + 1) * self.each).collect();
        Ok(Self {
            good: rows.iter().filter_map(|row| self.good.get(*row).copied()).collect(),
            unrelated: self.unrelated.as_ref().map(|unrelated| unrelated.select(&rows)).transpose()?,
            rows: self.rows.select(rows)?,
            each: self.each,
        })
    }

    pub(crate) fn digest(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(format!("{} {} {:?}\n", self.rows.digest(), self.each, self.good));
        if let Some(unrelated) = &self.unrelated {
            hash.update(format!("{} {}", unrelated.answers.digest(), unrelated.max_length));
        }
        hex(&hash.finalize())
    }
}

/// Prompts with answers to others, put together when they are asked for.
#[derive(Clone, Debug)]
pub(crate) struct Unrelated {
    prompts: Rows,
    answers: Rows,
    max_length: usize,
}

impl Unrelated {
    pub(crate) fn len(&self) -> usize {
        self.prompts.len()
    }

    /// Some of them, laid end to end.
    pub(crate) fn batch(&self, rows: impl IntoIterator<Item = usize>) -> Result<Batch> {
        let rows = rows.into_iter().map(|row| self.example(row)).collect::<Result<Vec<_>>>()?;
        Ok(Batch::from_examples(&rows))
    }

    pub(crate) fn example(&self, row: usize) -> Result<Example> {
        let (prompt, answer) = (self.prompts.example(row)?, self.answers.example(row)?);
        let begin = |e: &Example| e.trained.iter().position(|trained| *trained).unwrap_or(e.trained.len());
        let (p, a) = (begin(&prompt), begin(&answer));
        let mut input_ids = [&prompt.input_ids[..p], &answer.input_ids[a..]].concat();
        let mut trained = [&prompt.trained[..p], &answer.trained[a..]].concat();
        input_ids.truncate(self.max_length);
        trained.truncate(self.max_length);
        Ok(Example { input_ids, trained, origin: prompt.origin })
    }

    fn select(&self, rows: &[usize]) -> Result<Self> {
        let (prompts, answers) = (self.prompts.select(rows.to_vec())?, self.answers.select(rows.to_vec())?);
        Ok(Self { prompts, answers, max_length: self.max_length })
    }
}
