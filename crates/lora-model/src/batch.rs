//! A batch on its device: examples end to end, no padding.

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use lora_torch::Segments;
use tch::{Device, Tensor};

/// Token ids of several examples laid end to end, and what is to be predicted.
#[derive(Debug)]
pub struct TokenBatch {
    /// `[tokens]` int64
    pub input_ids: Tensor,
    /// `[tokens]` int64; restarts at 0 in each example.
    pub position_ids: Tensor,
    /// `[tokens]` int64: which text of a pair a token belongs to; absent where all belong to the first.
    pub token_types: Option<Tensor>,
    /// Lengths of the examples.
    pub segments: Segments,
    /// `[trained]` int64: the rows whose next token is trained; in a classifier, the row that stands for each text.
    pub target_rows: Tensor,
    /// `[trained]` int64: those next tokens; in a classifier, `[texts]` int64 or `[texts, labels]` float32, or nothing.
    pub targets: Tensor,
    /// The length that `dynamic` and `longrope` positions are computed for.
    longest: i64,
}

impl TokenBatch {
    /// Checks the numbers on the host and moves them to `device`.
    ///
    /// # Errors
    /// [`Error::Input`] when lengths do not sum to the tokens, or an id or row is out of range.
    pub fn new(
        config: &ModelConfig,
        input_ids: &[i64],
        segment_lens: &[i64],
        target_rows: &[i64],
        targets: &[i64],
        device: Device,
    ) -> Result<Self> {
        let segments = Segments::new(segment_lens)?;
        let tokens = input_ids.len() as i64;
        let outside = |what, expected: String, got: String| Err(Error::Input { what, expected, got });
        if segments.total() != tokens {
            return outside("segment lengths", format!("{tokens} in sum"), segments.total().to_string());
        }
        if target_rows.len() != targets.len() {
            return outside("targets", format!("{} ids", target_rows.len()), targets.len().to_string());
        }
        if let Some(id) = input_ids.iter().chain(targets).find(|id| !(0..config.vocab_size).contains(id)) {
            return outside(
                "token id",
                format!("in the model's vocabulary [0, {})", config.vocab_size),
                id.to_string(),
            );
        }
        if let Some(row) = target_rows.iter().find(|row| !(0..tokens).contains(row)) {
            return outside("target row", format!("in [0, {tokens})"), row.to_string());
        }
        let positions: Vec<i64> = segment_lens.iter().flat_map(|&n| 0..n).collect();
        let place = |v: &[i64]| -> Result<Tensor> { Ok(Tensor::f_from_slice(v)?.f_to_device(device)?) };
        Ok(Self {
            input_ids: place(input_ids)?,
            position_ids: place(&positions)?,
            token_types: None,
            segments,
            target_rows: place(target_rows)?,
            targets: place(targets)?,
            longest: segment_lens.iter().copied().max().unwrap_or(0),
        })
    }

    /// The batch as a part of one whose longest text has `longest` tokens: `dynamic` and `longrope` positions depend on
    /// that in transformers, and no others do.
    #[must_use]
    pub fn beside(self, longest: i64) -> Self {
        Self { longest: self.longest.max(longest), ..self }
    }

    /// The tokens of the longest example, or of a longer one in the batch that this is a part of.
    pub fn longest(&self) -> i64 {
        self.longest
    }

    /// How many tokens, or texts of a classifier, are trained.
    pub fn trained(&self) -> i64 {
        self.targets.size()[0]
    }
}
