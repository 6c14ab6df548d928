//! `adapter_config.json`: every key of PEFT's `LoraConfig`, `VeraConfig` and `AdaLoraConfig`.

mod keys;
mod method;
mod tokens;

pub use method::{AdaLoraConfig, Method, VeraConfig};

use crate::error::{Error, Result};
use crate::fields::{Fields, finite};
use crate::json::read_json_object;
use crate::pattern::{ending, first_match, whole};
use crate::target::TargetModules;
use keys::{OTHER, changed_others, refuse_unknown, unsupported};
use serde_json::{Map, Value, json};
use std::path::Path;
use tokens::TOKENS_ALONE;

pub use tokens::TokenIndices;

/// No matrix of a model is wider, so no rank is larger.
const MAX_RANK: i64 = 65_536;
/// The version of PEFT whose files are written.
const PEFT_VERSION: &str = "0.21.2";
/// What `bias` may be.
const BIASES: [&str; 3] = ["none", "all", "lora_only"];
/// What `init_lora_weights` may be as a string; `pissa_niter_N` besides.
const INITS: [&str; 9] = ["gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica", "lora_ga"];

/// How the adapter's weights begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// `true`: Kaiming-uniform A, zero B.
    Default,
    /// `false`: A and B random, so that the output changes at once.
    Random,
    /// A named scheme: `gaussian`, `pissa`, ...
    Named(String),
}

/// The configuration of an adapter as PEFT reads and writes it. Keys that a type has not stay at their defaults.
///
/// [`Default`] gives PEFT's own defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// `peft_type`, with the keys of its own.
    pub method: Method,
    /// The base model's name, for information only: it is never opened.
    pub base_model_name_or_path: Option<String>,
    /// `CAUSAL_LM`, ...
    pub task_type: Option<String>,
    /// The version of PEFT that wrote the file.
    pub peft_version: Option<String>,
    /// The rank, where `rank_pattern` does not say otherwise.
    pub r: i64,
    /// The numerator of the scale, where `alpha_pattern` does not say otherwise.
    pub lora_alpha: f64,
    /// The share of inputs dropped in training, in [0, 1).
    pub lora_dropout: f64,
    /// The modules that have adapters.
    pub target_modules: Option<TargetModules>,
    /// The modules that have none though they are targets.
    pub exclude_modules: Option<TargetModules>,
    /// `none`, `all` or `lora_only`.
    pub bias: String,
    /// Whether the base weights are stored as `[in, out]` (GPT-2).
    pub fan_in_fan_out: bool,
    /// Whether the scale is alpha / sqrt(r) and not alpha / r.
    pub use_rslora: bool,
    /// Whether the adapter also learns a magnitude per output (DoRA).
    pub use_dora: bool,
    /// Whether B has a bias.
    pub lora_bias: bool,
    /// How the adapter's weights began.
    pub init_lora_weights: InitLoraWeights,
    /// Regex over the end of a module path to its rank; the first that matches counts.
    pub rank_pattern: Vec<(String, i64)>,
    /// Regex over the end of a module path to its alpha; the first that matches counts.
    pub alpha_pattern: Vec<(String, f64)>,
    /// The layers that have adapters; all if absent.
    pub layers_to_transform: Option<Vec<i64>>,
    /// The names before a layer's number.
    pub layers_pattern: Option<Vec<String>>,
    /// Modules trained and saved in full.
    pub modules_to_save: Option<Vec<String>>,
    /// Tokens whose rows of the embedding alone are trained.
    pub trainable_token_indices: Option<TokenIndices>,
    /// Whether tied layers must stay tied where `trainable_token_indices` names both.
    pub ensure_weight_tying: bool,
    /// Parameters that are no module's `weight`, such as the stacked matrices of experts, with adapters of their own.
    pub target_parameters: Option<Vec<String>>,
    /// The other known keys that are not at their default, as they were written.
    pub other: Map<String, Value>,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        AdapterConfig {
            method: Method::Lora,
            base_model_name_or_path: None,
            task_type: None,
            peft_version: Some(PEFT_VERSION.into()),
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: None,
            exclude_modules: None,
            bias: "none".into(),
            fan_in_fan_out: false,
            use_rslora: false,
            use_dora: false,
            lora_bias: false,
            init_lora_weights: InitLoraWeights::Default,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            layers_to_transform: None,
            layers_pattern: None,
            modules_to_save: None,
            trainable_token_indices: None,
            ensure_weight_tying: false,
            target_parameters: None,
            other: Map::new(),
        }
    }
}

impl AdapterConfig {
    /// Reads and checks `adapter_config.json`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`]; [`Error::Field`] for an impossible value; [`Error::UnknownKeys`];
    /// [`Error::Unsupported`] when it is not a LoRA adapter.
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_json(path, &read_json_object(path)?)
    }

    pub(crate) fn from_json(path: &Path, map: &Map<String, Value>) -> Result<Self> {
        let f = Fields::new(path, "", map);
        let peft_type = f.string("peft_type")?.ok_or_else(|| f.wrong("peft_type", "\"LORA\""))?;
        if peft_type == TOKENS_ALONE {
            let config = tokens::from_alone(f, map)?;
            config.check(path)?;
            return Ok(config);
        }
        let Some(method) = Method::read(f, &peft_type)? else {
            let reason = "only LORA, VERA, ADALORA and TRAINABLE_TOKENS adapters are read";
            return Err(unsupported(path, "peft_type", &map["peft_type"], reason));
        };
        refuse_unknown(path, map, &method)?;
        let default = AdapterConfig::default();
        // VeRA has neither alpha nor a rank that must be given, and a name of its own for dropout.
        let (r, lora_alpha, dropout) = match &method {
            Method::Vera(_) => (Some(VeraConfig::DEFAULT_R), Some(default.lora_alpha), "vera_dropout"),
            Method::AdaLora(_) => (Some(default.r), Some(default.lora_alpha), "lora_dropout"),
            Method::Lora => (None, None, "lora_dropout"),
        };
        let no_r = || f.wrong("r", "the rank, a whole number of at least 1");
        let no_alpha = || f.wrong("lora_alpha", "a finite number");
        let config = AdapterConfig {
            rank_pattern: method::ranks(f, &method)?,
            method,
            base_model_name_or_path: f.string("base_model_name_or_path")?,
            task_type: f.string("task_type")?,
            peft_version: f.string("peft_version")?,
            r: f.int("r", 1, MAX_RANK)?.or(r).ok_or_else(no_r)?,
            lora_alpha: f.float("lora_alpha")?.or(lora_alpha).ok_or_else(no_alpha)?,
            lora_dropout: f.float(dropout)?.unwrap_or(default.lora_dropout),
            target_modules: targets(f, "target_modules")?,
            exclude_modules: targets(f, "exclude_modules")?,
            bias: f.string("bias")?.unwrap_or(default.bias),
            fan_in_fan_out: f.bool("fan_in_fan_out")?.unwrap_or(false),
            use_rslora: f.bool("use_rslora")?.unwrap_or(false),
            use_dora: f.bool("use_dora")?.unwrap_or(false),
            lora_bias: f.bool("lora_bias")?.unwrap_or(false),
            init_lora_weights: init(f)?,
            alpha_pattern: f.table("alpha_pattern", "a finite number", finite)?,
            layers_to_transform: f.ints("layers_to_transform", 0, i32::MAX.into())?,
            layers_pattern: f.strings("layers_pattern")?,
            modules_to_save: f.strings("modules_to_save")?,
            trainable_token_indices: tokens::read(f)?,
            ensure_weight_tying: f.bool("ensure_weight_tying")?.unwrap_or(false),
            target_parameters: f.strings("target_parameters")?,
            other: changed_others(map),
        };
        f.bool("inference_mode")?;
        config.check(path)?;
        Ok(config)
    }

    /// Checks what the types cannot say; `path` is the file that errors name.
    ///
    /// # Errors
    /// [`Error::Field`].
    pub fn check(&self, path: &Path) -> Result<()> {
        let map = self.to_json();
        let wrong = |field: &str, wanted: &str| Err(Fields::new(path, "", &map).wrong(field, wanted));
        if !(1..=MAX_RANK).contains(&self.r) {
            return wrong("r", "a whole number of at least 1");
        }
        if !self.lora_alpha.is_finite() {
            return wrong("lora_alpha", "a finite number");
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return wrong("lora_dropout", "at least 0 and below 1");
        }
        if let Some((field, wanted)) = self.method.fault(self) {
            return wrong(field, &wanted);
        }
        if !matches!(self.method, Method::Lora) && self.bias != "none" {
            return wrong(
                "bias",
                &format!("none: biases of the base are not trained under {}", self.method.peft_type()),
            );
        }
        if !BIASES.contains(&self.bias.as_str()) {
            return wrong("bias", "none, all or lora_only");
        }
        if self.rank_pattern.iter().any(|(_, r)| !(1..=MAX_RANK).contains(r)) {
            return wrong("rank_pattern", "a table of whole numbers of at least 1");
        }
        if self.alpha_pattern.iter().any(|(_, alpha)| !alpha.is_finite()) {
            return wrong("alpha_pattern", "a table of finite numbers");
        }
        if self.use_dora && self.lora_bias {
            return wrong("lora_bias", "false when use_dora is true: DoRA has no bias of its own");
        }
        if matches!(self.target_modules, Some(TargetModules::Pattern(_))) {
            for (field, given) in [
                ("layers_to_transform", self.layers_to_transform.is_some()),
                ("layers_pattern", self.layers_pattern.is_some()),
            ] {
                if given {
                    return wrong(field, "absent when target_modules is a regex: put the layers into the regex");
                }
            }
        }
        if self.layers_pattern.as_ref().is_some_and(|p| !p.is_empty()) && self.layers_to_transform.is_none() {
            return wrong("layers_to_transform", "given when layers_pattern is");
        }
        if let Some(wanted) = self.trainable_token_indices.as_ref().and_then(tokens::fault) {
            return wrong("trainable_token_indices", &wanted);
        }
        if self.has_target_parameters() {
            // As PEFT: an adapter of a bare parameter is a change of it, and sees neither inputs nor outputs.
            let without = "absent or at its default where target_parameters is given, which cannot be combined with it";
            let excluded = [
                ("lora_dropout", self.lora_dropout > 0.0),
                ("lora_bias", self.lora_bias),
                ("use_dora", self.use_dora),
                ("fan_in_fan_out", self.fan_in_fan_out),
                ("init_lora_weights", matches!(&self.init_lora_weights, InitLoraWeights::Named(n) if n != "gaussian")),
            ];
            if let Some((field, _)) = excluded.into_iter().find(|(_, is)| *is) {
                return wrong(field, without);
            }
        }
        let keys = self.rank_pattern.iter().map(|(key, _)| ("rank_pattern", key));
        for (field, key) in keys.chain(self.alpha_pattern.iter().map(|(key, _)| ("alpha_pattern", key))) {
            if let Err(Error::Pattern { source, .. }) = ending(key) {
                return wrong(field, &format!("a table whose keys are regular expressions; `{key}`: {source}"));
            }
        }
        for (field, targets) in [("target_modules", &self.target_modules), ("exclude_modules", &self.exclude_modules)] {
            if let Some(TargetModules::Pattern(pattern)) = targets
                && let Err(Error::Pattern { source, .. }) = whole(pattern)
            {
                return wrong(field, &format!("a list of names or a regular expression: {source}"));
            }
        }
        Ok(())
    }

    /// The rank of a module, which AdaLoRA may have pruned to 0: the first key of `rank_pattern` that matches its path to the end, else `r`.
    ///
    /// # Errors
    /// [`Error::Pattern`].
    pub fn rank_of(&self, module_path: &str) -> Result<i64> {
        match self.method.rank_of(module_path) {
            Some(r) => Ok(r),
            None => Ok(*first_match(&self.rank_pattern, module_path)?.unwrap_or(&self.r)),
        }
    }

    /// Whether parameters have adapters of their own; PEFT writes an empty list where it looked for such and found none.
    pub fn has_target_parameters(&self) -> bool {
        self.target_parameters.as_ref().is_some_and(|names| !names.is_empty())
    }

    /// The alpha of a module: the first key of `alpha_pattern` that matches its path to the end, else `lora_alpha`.
    ///
    /// # Errors
    /// [`Error::Pattern`].
    pub fn alpha_of(&self, module_path: &str) -> Result<f64> {
        Ok(*first_match(&self.alpha_pattern, module_path)?.unwrap_or(&self.lora_alpha))
    }

    /// The file's content as PEFT writes it: every key, sorted, `inference_mode` true.
    ///
    /// Tokens alone are written as PEFT's method of that name, for its LoRA needs a target.
    pub fn to_json(&self) -> Map<String, Value> {
        if let Some(map) = self.alone_json() {
            return map;
        }
        let mut map = Map::new();
        for (key, default, _) in OTHER {
            let default = serde_json::from_str(default).unwrap_or_default();
            map.insert(key.into(), self.other.get(key).cloned().unwrap_or(default));
        }
        let typed = [
            ("alpha_pattern", Value::Object(self.alpha_pattern.iter().map(|(k, v)| (k.clone(), number(*v))).collect())),
            ("base_model_name_or_path", json!(self.base_model_name_or_path)),
            ("bias", json!(self.bias)),
            ("ensure_weight_tying", json!(self.ensure_weight_tying)),
            ("exclude_modules", json!(self.exclude_modules.as_ref().map(TargetModules::to_json))),
            ("fan_in_fan_out", json!(self.fan_in_fan_out)),
            ("inference_mode", json!(true)),
            (
                "init_lora_weights",
                match &self.init_lora_weights {
                    InitLoraWeights::Default => json!(true),
                    InitLoraWeights::Random => json!(false),
                    InitLoraWeights::Named(name) => json!(name),
                },
            ),
            ("layers_pattern", one_or_list(self.layers_pattern.as_deref())),
            ("layers_to_transform", json!(self.layers_to_transform)),
            ("lora_alpha", number(self.lora_alpha)),
            ("lora_bias", json!(self.lora_bias)),
            ("lora_dropout", json!(self.lora_dropout)),
            ("modules_to_save", json!(self.modules_to_save)),
            ("peft_version", json!(PEFT_VERSION)),
            ("r", json!(self.r)),
            // The order of the patterns decides which one counts, so it is kept and not sorted.
            ("rank_pattern", Value::Object(self.rank_pattern.iter().map(|(k, v)| (k.clone(), json!(v))).collect())),
            ("target_modules", json!(self.target_modules.as_ref().map(TargetModules::to_json))),
            ("target_parameters", json!(self.target_parameters)),
            ("task_type", json!(self.task_type)),
            ("trainable_token_indices", json!(self.trainable_token_indices.as_ref().map(TokenIndices::to_json))),
            ("use_dora", json!(self.use_dora)),
            ("use_rslora", json!(self.use_rslora)),
        ];
        map.extend(typed.map(|(key, value)| (key.to_string(), value)));
        self.method.write(self, &mut map);
        map.sort_keys();
        map
    }
}

/// The form that people write: a single name as it is, several as a list.
fn one_or_list(names: Option<&[String]>) -> Value {
    match names {
        Some([name]) => json!(name),
        names => json!(names),
    }
}

/// A number as Python would write it after reading it: whole ones without a point.
fn number(x: f64) -> Value {
    let whole = x as i64;
    if whole as f64 == x { json!(whole) } else { json!(x) }
}

fn targets(f: Fields<'_>, key: &str) -> Result<Option<TargetModules>> {
    match f.get(key) {
        Some(Value::String(pattern)) => Ok(Some(TargetModules::Pattern(pattern.clone()))),
        _ => Ok(f.strings(key)?.map(TargetModules::List)),
    }
}

fn init(f: Fields<'_>) -> Result<InitLoraWeights> {
    let key = "init_lora_weights";
    match f.get(key) {
        None | Some(Value::Bool(true)) => Ok(InitLoraWeights::Default),
        Some(Value::Bool(false)) => Ok(InitLoraWeights::Random),
        Some(Value::String(name)) if INITS.contains(&name.as_str()) || name.starts_with("pissa_niter_") => {
            Ok(InitLoraWeights::Named(name.clone()))
        }
        Some(_) => Err(f.wrong(key, format!("true, false, pissa_niter_N or one of {}", INITS.join(", ")))),
    }
}

#[cfg(test)]
mod tests;
