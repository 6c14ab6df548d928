//! `[lora]`: the adapters. Names and meaning of the keys are those of PEFT's `LoraConfig`.

use super::keys::{Kind, Range, choice, section};
use lora_format::{AdaLoraConfig, Method, VeraConfig};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

choice! {
    /// The type of the adapters.
    PeftType {
        /// Low-rank pairs.
        Lora = "LORA",
        /// Vectors around a random pair that all layers share.
        Vera = "VERA",
        /// Triplets, of which the least important are pruned.
        AdaLora = "ADALORA",
    }
}

choice! {
    /// Which biases of the base model are trained beside the adapters.
    Bias {
        /// None of them.
        None = "none",
        /// All of them.
        All = "all",
        /// Those of layers with an adapter.
        LoraOnly = "lora_only",
    }
}

choice! {
    /// What the adapted model is for.
    TaskType {
        /// Predicting the next token.
        CausalLm = "CAUSAL_LM",
        /// Telling the labels of texts apart.
        SeqCls = "SEQ_CLS",
    }
}

/// How the matrix A is drawn. B starts at zero unless this is [`InitLoraWeights::Random`] or a part of the base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// `true`: Kaiming uniform with a = sqrt(5), as PEFT's default.
    Kaiming,
    /// `"gaussian"`: normal with a standard deviation of 1/r.
    Gaussian,
    /// `false`: as `true`, and B is drawn too, so the adapted model differs from the base from the start. For tests.
    Random,
    /// `"pissa"`, `"pissa_niter_N"`, `"olora"`: as a part of the base's weight, which is taken out of the base while
    /// training. What is saved is a plain adapter of twice the rank over the unchanged base.
    Principal(String),
    /// `"loftq"`: as what the base loses when its adapted layers are packed into 4 bits, which they are from then on, here
    /// and wherever the adapter is loaded.
    LoftQ,
}

impl Serialize for InitLoraWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Kaiming => serializer.serialize_bool(true),
            Self::Gaussian => serializer.serialize_str("gaussian"),
            Self::Random => serializer.serialize_bool(false),
            Self::Principal(name) => serializer.serialize_str(name),
            Self::LoftQ => serializer.serialize_str(lora_core::LoftQ::NAME),
        }
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match toml::Value::deserialize(deserializer)? {
            toml::Value::Boolean(true) => Ok(Self::Kaiming),
            toml::Value::Boolean(false) => Ok(Self::Random),
            toml::Value::String(s) if s == "gaussian" => Ok(Self::Gaussian),
            toml::Value::String(s) if s == lora_core::LoftQ::NAME => Ok(Self::LoftQ),
            toml::Value::String(s) if lora_core::Principal::named(&s).is_some() => Ok(Self::Principal(s)),
            other => Err(de::Error::custom(format!(
                "must be true, false, \"gaussian\", \"pissa\", \"pissa_niter_N\", \"olora\" or \"loftq\", got {other}"
            ))),
        }
    }
}

/// Modules by name or by pattern, as PEFT matches them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Modules {
    /// A regular expression for the whole path of a module, or the word `all-linear`.
    Pattern(String),
    /// Names: a module is meant when its path is one of them or ends with a dot and one of them.
    Names(Vec<String>),
}

impl Modules {
    /// Whether this is the word `all-linear`: every linear layer except the output head.
    pub fn is_all_linear(&self) -> bool {
        matches!(self, Modules::Pattern(word) if word == "all-linear")
    }
}

/// Tokens whose rows are trained: of the embedding, or by the name of embedding and head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Tokens {
    /// Ids of the embedding, which a tied head follows.
    Embedding(Vec<u32>),
    /// Ids by module.
    ByModule(std::collections::BTreeMap<String, Vec<u32>>),
}

section! {
    /// The adapters.
    LoraConfig {
        /// The type of the adapters: `LORA` with all its options, `VERA` (trained vectors around one frozen random pair) or
        /// `ADALORA` (ranks that are pruned by importance while training).
        peft_type: PeftType = PeftType::Lora, Kind::Choice(PeftType::NAMES);
        /// Rank of the adapters; 256 with VeRA when absent. AdaLoRA has `init_r` and `target_r`.
        r: u32 = 8, Kind::Integer { min: 1, max: 65536 };
        /// The product B A is scaled by `lora_alpha / r`, or by `lora_alpha / sqrt(r)` with `use_rslora`.
        lora_alpha: f64 = 16.0, Kind::Number(Range::Positive);
        /// Probability with which an element of an adapter's input is dropped while training.
        lora_dropout: f64 = 0.0, Kind::Number(Range::ZeroToBelowOne);
        /// Which modules get an adapter: a list of names, a regular expression for the whole module path, or `all-linear`
        /// (every linear layer except the output head and those of experts), or `peft-default` (what PEFT takes for the family
        /// when nothing is said).
        target_modules: Modules = Modules::Pattern("all-linear".into()), Kind::Modules;
        /// Modules that get no adapter although they are targets: a list of names or a regular expression.
        #[serde(skip_serializing_if = "Option::is_none")]
        exclude_modules: Option<Modules> = None, Kind::Modules;
        /// Which biases of the base are trained: `none`, `all`, or those of layers with an adapter (`lora_only`).
        bias: Bias = Bias::None, Kind::Choice(Bias::NAMES);
        /// Scale by `lora_alpha / sqrt(r)` (rank-stabilised LoRA), which suits high ranks.
        use_rslora: bool = false, Kind::Bool;
        /// Also train the length of each output's weights (DoRA), which costs time and often helps low ranks.
        use_dora: bool = false, Kind::Bool;
        /// Also train a bias of each B.
        lora_bias: bool = false, Kind::Bool;
        /// How A is drawn: `true` (Kaiming uniform) or `gaussian`, both with B at zero; `pissa`, `pissa_niter_N` (by a fast
        /// SVD with N power iterations) and `olora` begin as a part of the base; `loftq` packs the adapted layers into 4 bits
        /// and begins as what that loses; `false` draws B too, for tests.
        init_lora_weights: InitLoraWeights = InitLoraWeights::Kaiming, Kind::BoolOr(&["gaussian", "pissa", "pissa_niter_*", "olora", "loftq"]);
        /// LoftQ: how often a layer is packed and its loss taken into the adapter; 1 when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        loftq_iter: Option<u32> = None, Kind::Integer { min: 1, max: 100 };
        /// Ranks that differ from `r`: a table from module name or regular expression to rank. The first entry that matches
        /// counts.
        #[serde(with = "super::ordered", skip_serializing_if = "Vec::is_empty")]
        rank_pattern: Vec<(String, u32)> = Vec::new(), Kind::Map(&Kind::Integer { min: 1, max: 65536 });
        /// Values of `lora_alpha` that differ: a table from module name or regular expression to number. The first entry
        /// that matches counts.
        #[serde(with = "super::ordered", skip_serializing_if = "Vec::is_empty")]
        alpha_pattern: Vec<(String, f64)> = Vec::new(), Kind::Map(&Kind::Number(Range::Positive));
        /// Indices of the layers whose modules get adapters, from 0; all layers when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        layers_to_transform: Option<Vec<u32>> = None, Kind::Indices;
        /// Name of the list of layers, where it is not one of the usual ones; needs `layers_to_transform`.
        #[serde(skip_serializing_if = "Option::is_none")]
        layers_pattern: Option<Vec<String>> = None, Kind::Texts;
        /// Modules that are trained in full and saved beside the adapters, as `lm_head`.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        modules_to_save: Vec<String> = Vec::new(), Kind::Texts;
        /// Ids of tokens whose rows of the embedding are trained, and no others; a tied head follows. A list, or a table from
        /// `embed_tokens` and `lm_head` to lists. New rows must be in the checkpoint already.
        #[serde(skip_serializing_if = "Option::is_none")]
        trainable_token_indices: Option<Tokens> = None, Kind::IndicesOrMap;
        /// Refuse other tokens for a tied head than for its embedding, instead of untying the two.
        ensure_weight_tying: bool = false, Kind::Bool;
        /// Stacked matrices of experts that get adapters, as `experts.gate_up_proj` and `experts.down_proj`. With
        /// `target_modules = []` they are all that is trained.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        target_parameters: Vec<String> = Vec::new(), Kind::Texts;
        /// What the adapted model is for; written to `adapter_config.json`. `SEQ_CLS` trains a classifier: its head is trained
        /// and saved in full, and `data` has texts with labels.
        task_type: TaskType = TaskType::CausalLm, Kind::Choice(TaskType::NAMES);
        /// Folder of an adapter to start from. Its own ranks, scales and targets count.
        #[serde(skip_serializing_if = "Option::is_none")]
        init_adapter: Option<std::path::PathBuf> = None, Kind::Text;
        /// VeRA: what the shared random pair is drawn from; 0 when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        projection_prng_key: Option<u64> = None, Kind::Integer { min: 0, max: i64::MAX };
        /// VeRA: whether the shared random pair is saved along, which makes the adapter larger and sure to load everywhere;
        /// true when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        save_projection: Option<bool> = None, Kind::Bool;
        /// VeRA: probability with which an element of an adapter's input is dropped while training.
        #[serde(skip_serializing_if = "Option::is_none")]
        vera_dropout: Option<f64> = None, Kind::Number(Range::ZeroToBelowOne);
        /// VeRA: what the vector over the ranks begins with; 0.1 when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        d_initial: Option<f64> = None, Kind::Number(Range::Positive);
        /// AdaLoRA: mean rank at the end; 8 when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        target_r: Option<u32> = None, Kind::Integer { min: 1, max: 65536 };
        /// AdaLoRA: rank at the start; 12 when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        init_r: Option<u32> = None, Kind::Integer { min: 1, max: 65536 };
        /// AdaLoRA: optimizer steps before pruning begins; 0 when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        tinit: Option<u64> = None, Kind::Integer { min: 0, max: i64::MAX };
        /// AdaLoRA: optimizer steps at the end in which the ranks stay; 0 when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        tfinal: Option<u64> = None, Kind::Integer { min: 0, max: i64::MAX };
        /// AdaLoRA: optimizer steps from one pruning to the next; 1 when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        deltaT: Option<u64> = None, Kind::Integer { min: 1, max: i64::MAX };
        /// AdaLoRA: smoothing of the sensitivity; 0.85 when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        beta1: Option<f64> = None, Kind::Number(Range::ZeroToBelowOne);
        /// AdaLoRA: smoothing of its uncertainty; 0.85 when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        beta2: Option<f64> = None, Kind::Number(Range::ZeroToBelowOne);
        /// AdaLoRA: what the departure of the triplets from orthogonality weighs in the loss; 0.5 when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        orth_reg_weight: Option<f64> = None, Kind::Number(Range::NotNegative);
        /// AdaLoRA: optimizer steps of its schedule; those of the run when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        total_step: Option<u64> = None, Kind::Integer { min: 1, max: i64::MAX };
    }
}

impl LoraConfig {
    /// The probability with which inputs of adapters are dropped, under whichever name.
    pub fn dropout(&self) -> f64 {
        self.vera_dropout.unwrap_or(self.lora_dropout)
    }

    /// The type of the adapters with the keys of its own.
    pub(crate) fn method(&self) -> Method {
        let steps = |given: Option<u64>, default: i64| given.map_or(default, |n| i64::try_from(n).unwrap_or(i64::MAX));
        let rank = |given: Option<u32>, default: i64| given.map_or(default, i64::from);
        match self.peft_type {
            PeftType::Lora => Method::Lora,
            PeftType::Vera => {
                let default = VeraConfig::default();
                Method::Vera(VeraConfig {
                    projection_prng_key: self.projection_prng_key.unwrap_or(default.projection_prng_key),
                    save_projection: self.save_projection.unwrap_or(default.save_projection),
                    d_initial: self.d_initial.unwrap_or(default.d_initial),
                    ..default
                })
            }
            PeftType::AdaLora => {
                let default = AdaLoraConfig::default();
                Method::AdaLora(AdaLoraConfig {
                    target_r: rank(self.target_r, default.target_r),
                    init_r: rank(self.init_r, default.init_r),
                    tinit: steps(self.tinit, default.tinit),
                    tfinal: steps(self.tfinal, default.tfinal),
                    delta_t: steps(self.deltaT, default.delta_t),
                    beta1: self.beta1.unwrap_or(default.beta1),
                    beta2: self.beta2.unwrap_or(default.beta2),
                    orth_reg_weight: self.orth_reg_weight.unwrap_or(default.orth_reg_weight),
                    total_step: self.total_step.map(|n| i64::try_from(n).unwrap_or(i64::MAX)),
                    rank_pattern: None,
                })
            }
        }
    }
}
