//! Which tensor of a base stands for a module, and how it is stored.

use crate::tied::{TiedPair, tied_pair};
use lora_format::{AdapterConfig, Checkpoint};
use serde_json::{Map, Value};
use tch::Tensor;

/// What a base's configuration says about the storing of its weights.
pub(crate) struct Orientation {
    tied: Option<TiedPair>,
    /// The family stores the weights of its blocks as `[in, out]`.
    stores_transposed: bool,
}

impl Orientation {
    pub(crate) fn new(base: &Checkpoint, config: &Map<String, Value>) -> Self {
        let stores_transposed = matches!(config.get("model_type").and_then(Value::as_str), Some("gpt2" | "openai-gpt"));
        Self { tied: tied_pair(base, config), stores_transposed }
    }

    /// The tensor of the base whose value `name` begins with: a tied head begins with the embedding.
    pub(crate) fn source(&self, name: &str) -> String {
        match self.tied {
            Some(pair) if pair.head == name => pair.embedding.into(),
            _ => name.into(),
        }
    }

    /// Whether the family stores this weight of a linear layer as `[in, out]`.
    pub(crate) fn stores_transposed(&self, weight: &str) -> bool {
        self.stores_transposed && !weight.starts_with("lm_head.")
    }

    /// Whether a linear layer's weight is stored as `[in, out]`.
    ///
    /// The shape tells, except for a square one. `fan_in_fan_out` is then right where it is true, but false says little:
    /// PEFT clears it for the whole adapter as soon as one target is an ordinary linear layer, such as GPT-2's head.
    pub(crate) fn is_transposed(
        &self,
        base: &Checkpoint,
        config: &AdapterConfig,
        weight: &str,
        a: &Tensor,
        b: &Tensor,
    ) -> bool {
        let (out, input) = (b.size()[0], a.size()[1]);
        match base.info(&self.source(weight)) {
            Ok(info) if out != input => info.shape == [input, out],
            _ => config.fan_in_fan_out || self.stores_transposed(weight),
        }
    }
}
