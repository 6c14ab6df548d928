//! Answers that are compared or rated, as rows of tokens.

use crate::digest::hex;
use crate::error::Result;
use lora_data::{Example, PreferencePair, RatedExample, RowPlan, Rows};
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
    pub unrelated: Option<Rows>,
}

impl Answers {
    /// Pairs.
    pub fn of_pairs(pairs: Vec<PreferencePair>) -> Self {
        let good = [true, false].repeat(pairs.len());
        let rows: Vec<Example> = pairs.into_iter().flat_map(|p| [p.chosen, p.rejected]).collect();
        Self { rows: rows.into(), good, each: 2, unrelated: None }
    }

    /// Answers that are rated one by one. Rows of unrelated answers are cut at `max_length` tokens.
    pub fn of_rated(rated: Vec<RatedExample>, max_length: usize) -> Self {
        let good = rated.iter().map(|r| r.desirable).collect();
        let rows: Vec<Example> = rated.into_iter().map(|r| r.example).collect();
        let unrelated =
            (0..rows.len()).map(|i| crossed(&rows[i], &rows[(i + rows.len() - 1) % rows.len()], max_length));
        let unrelated = unrelated.collect::<Vec<_>>();
        Self { rows: rows.into(), good, each: 1, unrelated: Some(unrelated.into()) }
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
            unrelated: self.unrelated.as_ref().map(|u| u.select(rows.clone())).transpose()?,
            rows: self.rows.select(rows)?,
            each: self.each,
        })
    }

    pub(crate) fn digest(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(format!("{} {} {:?}\n", self.rows.digest(), self.each, self.good));
        self.unrelated.iter().for_each(|rows| hash.update(rows.digest()));
        hex(&hash.finalize())
    }
}

/// The prompt of one row with the answer of another.
fn crossed(prompt: &Example, answer: &Example, max_length: usize) -> Example {
    let begin = |e: &Example| e.trained.iter().position(|trained| *trained).unwrap_or(e.trained.len());
    let (p, a) = (begin(prompt), begin(answer));
    let mut input_ids = [&prompt.input_ids[..p], &answer.input_ids[a..]].concat();
    let mut trained = [&prompt.trained[..p], &answer.trained[a..]].concat();
    input_ids.truncate(max_length);
    trained.truncate(max_length);
    Example { input_ids, trained, origin: prompt.origin.clone() }
}
