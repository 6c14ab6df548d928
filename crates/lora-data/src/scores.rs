//! How near written texts are to the texts that they should be: BLEU, chrF, ROUGE-L and exact match, each against any number of
//! references.

mod bleu;
mod chrf;
mod rouge;

use serde::Serialize;
use std::collections::HashMap;
use std::hash::Hash;

/// A text that was written, and the texts that would have been right.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Written {
    /// The text.
    pub text: String,
    /// At least one.
    pub references: Vec<String>,
}

/// How near texts are to their references, all of them together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Scores {
    /// BLEU of the corpus, 0 to 100, as sacrebleu has it by default: up to four words, tokenizer 13a, exponential smoothing.
    pub bleu: f64,
    /// chrF of the corpus, 0 to 100, as sacrebleu has it by default: up to six characters, beta 2.
    pub chrf: f64,
    /// Mean F of ROUGE-L, 0 to 1, as rouge_score has it without a stemmer.
    pub rouge_l: f64,
    /// Share of the texts that are a reference, white space at both ends apart.
    pub exact_match: f64,
    /// Texts.
    pub texts: usize,
}

impl Scores {
    /// The scores of texts; all are 0 where there are none.
    pub fn of(texts: &[Written]) -> Self {
        let mean = |of: &dyn Fn(&Written) -> f64| texts.iter().map(of).sum::<f64>() / texts.len().max(1) as f64;
        let exact = |one: &Written| one.references.iter().any(|reference| reference.trim() == one.text.trim());
        Self {
            bleu: bleu::corpus(texts),
            chrf: chrf::corpus(texts),
            rouge_l: mean(&rouge::best),
            exact_match: mean(&|one| f64::from(u8::from(exact(one)))),
            texts: texts.len(),
        }
    }
}

/// How often each run of `n` items is there.
fn runs<T: Hash + Eq>(items: &[T], n: usize) -> HashMap<&[T], usize> {
    let mut counts = HashMap::new();
    for run in items.windows(n) {
        *counts.entry(run).or_insert(0) += 1;
    }
    counts
}

/// What Python takes for white space.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

#[cfg(test)]
mod tests;
