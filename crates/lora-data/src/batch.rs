//! Examples laid end to end, as the model takes them.

use crate::example::Example;

/// Examples end to end without padding; neither positions nor targets cross from one to the next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// The tokens of all examples.
    pub input_ids: Vec<i64>,
    /// Positions; each example begins at 0.
    pub position_ids: Vec<i64>,
    /// The lengths of the examples; attention stays inside each.
    pub segment_lens: Vec<i64>,
    /// Rows of `input_ids` whose next token, of the same example, is trained.
    pub target_rows: Vec<i64>,
    /// For each of those, the next token.
    pub targets: Vec<i64>,
}

impl Batch {
    /// Lays examples end to end.
    pub fn from_examples<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let mut batch = Self::default();
        for example in examples {
            let start = batch.input_ids.len();
            let length = example.input_ids.len();
            batch.input_ids.extend(example.input_ids.iter().map(|&id| i64::from(id)));
            batch.position_ids.extend(0..length as i64);
            batch.segment_lens.push(length as i64);
            for t in (1..length).filter(|&t| example.trained[t]) {
                batch.target_rows.push((start + t - 1) as i64);
                batch.targets.push(i64::from(example.input_ids[t]));
            }
        }
        batch
    }

    /// All tokens.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Trained tokens.
    pub fn trained_tokens(&self) -> usize {
        self.targets.len()
    }
}
