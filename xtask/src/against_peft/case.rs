//! What is compared with PEFT.

use clap::ValueEnum;
use serde_json::{Value, json};

#[derive(Clone, Copy, ValueEnum, PartialEq)]
pub(super) enum Case {
    /// 135M, 4 x 512 random tokens
    Step,
    /// The same, activations computed again
    Checkpointing,
    /// The same, a part of the blocks computed again here, and nothing there
    Lean,
    /// The same, everything computed again, and the base mapped here
    Least,
    /// The same, every weight trained
    Full,
    /// 360M, 2 x 512
    #[value(name = "360m")]
    Larger,
    /// 1B, bfloat16 on disk, 1 x 512; mapped here
    #[value(name = "1b")]
    Billion,
    /// The same, everything computed again, and the base mapped here
    Streamed,
    /// 135M, instructions: packed here, padded there
    Ragged,
    /// From the command to the end of the first step of those
    Start,
    /// 135M, 64 tokens, the most likely each time
    Generate,
    /// 135M, an adapter merged and saved
    Merge,
}

/// A model that is made for the comparison: Llama's, with random weights.
pub(super) struct Shape {
    pub(super) name: &'static str,
    vocab: u64,
    hidden: u64,
    intermediate: u64,
    layers: u64,
    heads: u64,
    kv_heads: u64,
    pub(super) dtype: &'static str,
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "135m",
        vocab: 50304,
        hidden: 576,
        intermediate: 1536,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        dtype: "float32",
    },
    Shape {
        name: "360m",
        vocab: 49152,
        hidden: 960,
        intermediate: 2560,
        layers: 32,
        heads: 15,
        kv_heads: 5,
        dtype: "float32",
    },
    Shape {
        name: "1b",
        vocab: 128_256,
        hidden: 2048,
        intermediate: 8192,
        layers: 16,
        heads: 32,
        kv_heads: 8,
        dtype: "bfloat16",
    },
];

impl Case {
    pub(super) fn shape(self) -> &'static Shape {
        match self {
            Self::Larger => &SHAPES[1],
            Self::Billion | Self::Streamed => &SHAPES[2],
            _ => &SHAPES[0],
        }
    }

    /// Rows of 512 tokens of a step.
    pub(super) fn batch(self) -> u64 {
        match self {
            Self::Larger => 2,
            Self::Billion | Self::Streamed => 1,
            _ => 4,
        }
    }

    /// Whether theirs computes activations again.
    pub(super) fn checkpoints(self) -> bool {
        matches!(self, Self::Checkpointing | Self::Least | Self::Streamed)
    }

    /// What of a step is kept here, and how the base is.
    pub(super) fn settings(self) -> &'static [&'static str] {
        match self {
            Self::Checkpointing => &["--checkpointing", "full"],
            Self::Lean => &["--checkpointing", "selective", "--recompute-layers", "9"],
            Self::Least | Self::Streamed => &["--checkpointing", "full", "--weights", "mapped"],
            Self::Billion => &["--checkpointing", "selective", "--weights", "mapped"],
            _ => &[],
        }
    }

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Step => "135M, 4 x 512",
            Self::Checkpointing => "135M, 4 x 512, activations computed again",
            Self::Lean => "135M, 4 x 512, a quarter of the blocks computed again here",
            Self::Least => "135M, 4 x 512, activations computed again, base mapped here",
            Self::Full => "135M, 4 x 512, every weight",
            Self::Larger => "360M, 2 x 512",
            Self::Billion => "1B, 1 x 512, base in bfloat16, mapped here",
            Self::Streamed => "1B, 1 x 512, activations computed again, base mapped here",
            Self::Ragged => "135M, instructions",
            Self::Start => "from the command to the end of the first step",
            Self::Generate => "135M, 64 tokens written",
            Self::Merge => "135M, merged and saved",
        }
    }

    /// The figures that are compared, and whether more of it is better.
    pub(super) fn figures(self) -> &'static [(&'static str, &'static str, bool)] {
        match self {
            Self::Start | Self::Merge => &[("seconds", "s", false)],
            Self::Generate => &[("tok_s", "tokens/s", true)],
            Self::Ragged => &[("tok_s", "tokens/s", true), ("rss_mb", "MB at most", false)],
            _ => &[
                ("tok_s", "tokens/s", true),
                ("of_matmul_rate", "of the rate of products", true),
                ("rss_mb", "MB at most", false),
            ],
        }
    }
}

impl Shape {
    pub(super) fn config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": self.vocab, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 100_000.0,
            "max_position_embeddings": 8192, "tie_word_embeddings": true, "initializer_range": 0.02, "bos_token_id": 0,
            "eos_token_id": 0, "attention_bias": false, "mlp_bias": false,
        })
    }
}
