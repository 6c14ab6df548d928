//! What the types of adapters have besides what all have: VeRA and AdaLoRA.

use super::{AdapterConfig, MAX_RANK, number};
use crate::error::Result;
use crate::fields::{Fields, int_within};
use serde_json::{Map, Value, json};

/// `peft_type`, with the keys of its own.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Method {
    /// `LORA`.
    #[default]
    Lora,
    /// `VERA`.
    Vera(VeraConfig),
    /// `ADALORA`.
    AdaLora(AdaLoraConfig),
}

/// The keys of PEFT's `VeraConfig` that LoRA has not. `vera_dropout` is [`AdapterConfig::lora_dropout`].
#[derive(Debug, Clone, PartialEq)]
pub struct VeraConfig {
    /// What the shared pair is drawn from.
    pub projection_prng_key: u64,
    /// Whether the shared pair is saved along.
    pub save_projection: bool,
    /// What `vera_lambda_d` begins with.
    pub d_initial: f64,
    /// Whether the vectors began with their defaults; nothing to a saved adapter.
    pub init_weights: bool,
}

impl Default for VeraConfig {
    fn default() -> Self {
        Self { projection_prng_key: 0, save_projection: true, d_initial: 0.1, init_weights: true }
    }
}

impl VeraConfig {
    /// The rank where none is given.
    pub const DEFAULT_R: i64 = 256;
}

/// The keys of PEFT's `AdaLoraConfig` that LoRA has not.
#[derive(Debug, Clone, PartialEq)]
pub struct AdaLoraConfig {
    /// The mean number of triplets at the end.
    pub target_r: i64,
    /// The number of triplets of each module at the start.
    pub init_r: i64,
    /// Steps before the first pruning.
    pub tinit: i64,
    /// Steps after the last.
    pub tfinal: i64,
    /// `deltaT`: steps from one pruning to the next.
    pub delta_t: i64,
    /// Smoothing of the sensitivity.
    pub beta1: f64,
    /// Smoothing of the uncertainty.
    pub beta2: f64,
    /// What the departure of A and B from orthogonality weighs in the loss.
    pub orth_reg_weight: f64,
    /// Steps of the training.
    pub total_step: Option<i64>,
    /// Module path to which of its triplets are left; absent before anything was pruned.
    pub rank_pattern: Option<Vec<(String, Vec<bool>)>>,
}

impl Default for AdaLoraConfig {
    fn default() -> Self {
        Self {
            target_r: 8,
            init_r: 12,
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
            total_step: None,
            rank_pattern: None,
        }
    }
}

/// What PEFT puts after a module's path in AdaLoRA's `rank_pattern`.
const PATTERN_SUFFIX: &str = ".lora_E";
/// Keys that only AdaLoRA has.
pub(super) const ADALORA_KEYS: [&str; 9] =
    ["beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"];
/// Every key of `VeraConfig`.
pub(super) const VERA_KEYS: [&str; 19] = [
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "d_initial",
    "fan_in_fan_out",
    "inference_mode",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "projection_prng_key",
    "r",
    "revision",
    "save_projection",
    "target_modules",
    "task_type",
    "vera_dropout",
];

impl Method {
    /// `LORA`, `VERA` or `ADALORA`.
    pub fn peft_type(&self) -> &'static str {
        match self {
            Method::Lora => "LORA",
            Method::Vera(_) => "VERA",
            Method::AdaLora(_) => "ADALORA",
        }
    }

    /// Reads the keys of its own; `None` for a type that is not known.
    pub(super) fn read(f: Fields<'_>, peft_type: &str) -> Result<Option<Self>> {
        Ok(Some(match peft_type {
            "LORA" => Method::Lora,
            "VERA" => {
                let default = VeraConfig::default();
                let key = f.int("projection_prng_key", 0, i64::MAX)?.map_or(0, i64::unsigned_abs);
                Method::Vera(VeraConfig {
                    projection_prng_key: key,
                    save_projection: f.bool("save_projection")?.unwrap_or(default.save_projection),
                    d_initial: f.float("d_initial")?.unwrap_or(default.d_initial),
                    init_weights: f.bool("init_weights")?.unwrap_or(default.init_weights),
                })
            }
            "ADALORA" => {
                let default = AdaLoraConfig::default();
                let steps = |key| f.int(key, 0, i64::MAX);
                Method::AdaLora(AdaLoraConfig {
                    target_r: f.int("target_r", 1, MAX_RANK)?.unwrap_or(default.target_r),
                    init_r: f.int("init_r", 1, MAX_RANK)?.unwrap_or(default.init_r),
                    tinit: steps("tinit")?.unwrap_or(default.tinit),
                    tfinal: steps("tfinal")?.unwrap_or(default.tfinal),
                    delta_t: f.int("deltaT", 1, i64::MAX)?.unwrap_or(default.delta_t),
                    beta1: f.float("beta1")?.unwrap_or(default.beta1),
                    beta2: f.float("beta2")?.unwrap_or(default.beta2),
                    orth_reg_weight: f.float("orth_reg_weight")?.unwrap_or(default.orth_reg_weight),
                    total_step: f.int("total_step", 1, i64::MAX)?,
                    rank_pattern: kept_triplets(f)?,
                })
            }
            _ => return Ok(None),
        }))
    }

    /// What is wrong with the keys of its own and with others beside them: the field, and what it must be.
    pub(super) fn fault(&self, config: &AdapterConfig) -> Option<(&'static str, String)> {
        let wrong = |field, wanted: &str| Some((field, wanted.to_string()));
        match self {
            Method::Lora => None,
            Method::Vera(v) if !v.d_initial.is_finite() => wrong("d_initial", "a finite number"),
            Method::Vera(_) if config.exclude_modules.is_some() => {
                wrong("exclude_modules", "absent: PEFT's VeRA has no such key; name the modules that are meant")
            }
            Method::Vera(_) => None,
            Method::AdaLora(_) if config.use_dora => wrong("use_dora", "false: AdaLoRA and DoRA cannot be combined"),
            Method::AdaLora(a) => {
                let inside = |x: f64| x > 0.0 && x < 1.0;
                match a {
                    _ if !inside(a.beta1) => wrong("beta1", "above 0 and below 1"),
                    _ if !inside(a.beta2) => wrong("beta2", "above 0 and below 1"),
                    _ if !(a.orth_reg_weight.is_finite() && a.orth_reg_weight >= 0.0) => {
                        wrong("orth_reg_weight", "a finite number of at least 0")
                    }
                    _ if a.total_step.is_some_and(|total| a.tinit >= total - a.tfinal) => {
                        wrong("tinit", "below total_step - tfinal, or no step is left in which to prune")
                    }
                    _ => {
                        let (name, _) =
                            a.rank_pattern.iter().flatten().find(|(_, kept)| kept.len() as i64 != a.init_r)?;
                        Some((
                            "rank_pattern",
                            format!("a table of init_r = {} truth values each; see `{name}`", a.init_r),
                        ))
                    }
                }
            }
        }
    }

    /// Puts the keys of its own into the file's content, and takes out what its configuration has not.
    pub(super) fn write(&self, config: &AdapterConfig, map: &mut Map<String, Value>) {
        map.insert("peft_type".into(), json!(self.peft_type()));
        match self {
            Method::Lora => {}
            Method::Vera(v) => {
                let own = [
                    ("d_initial", number(v.d_initial)),
                    ("init_weights", json!(v.init_weights)),
                    ("projection_prng_key", json!(v.projection_prng_key)),
                    ("save_projection", json!(v.save_projection)),
                    ("vera_dropout", json!(config.lora_dropout)),
                ];
                map.extend(own.map(|(key, value)| (key.to_string(), value)));
                map.retain(|key, _| VERA_KEYS.contains(&key.as_str()));
            }
            Method::AdaLora(a) => {
                let pattern = a.rank_pattern.as_ref().map(|list| {
                    let entry = |(name, kept): &(String, Vec<bool>)| (format!("{name}{PATTERN_SUFFIX}"), json!(kept));
                    Value::Object(list.iter().map(entry).collect())
                });
                let own = [
                    ("beta1", number(a.beta1)),
                    ("beta2", number(a.beta2)),
                    ("deltaT", json!(a.delta_t)),
                    ("init_r", json!(a.init_r)),
                    ("orth_reg_weight", number(a.orth_reg_weight)),
                    ("rank_pattern", pattern.unwrap_or(Value::Null)),
                    ("target_r", json!(a.target_r)),
                    ("tfinal", json!(a.tfinal)),
                    ("tinit", json!(a.tinit)),
                    ("total_step", json!(a.total_step)),
                ];
                map.extend(own.map(|(key, value)| (key.to_string(), value)));
            }
        }
    }

    /// The rank of a module where the type has a rule of its own.
    pub(super) fn rank_of(&self, module: &str) -> Option<i64> {
        let Method::AdaLora(a) = self else { return None };
        let kept = a.rank_pattern.iter().flatten().find(|(name, _)| name == module);
        Some(kept.map_or(a.init_r, |(_, kept)| kept.iter().filter(|k| **k).count() as i64))
    }
}

type KeptTriplets = Vec<(String, Vec<bool>)>;

/// AdaLoRA's `rank_pattern`: which triplets are left, by module.
fn kept_triplets(f: Fields<'_>) -> Result<Option<KeptTriplets>> {
    let wanted = "a list of truth values, one for each triplet";
    let kept = |v: &Value| v.as_array()?.iter().map(Value::as_bool).collect::<Option<Vec<bool>>>();
    let list = f.table("rank_pattern", wanted, kept)?;
    if f.get("rank_pattern").is_none() || list.is_empty() {
        return Ok(None);
    }
    let bare = |name: String| name.strip_suffix(PATTERN_SUFFIX).map(str::to_string).unwrap_or(name);
    Ok(Some(list.into_iter().map(|(name, kept)| (bare(name), kept)).collect()))
}

/// LoRA's `rank_pattern`: ranks by module.
pub(super) fn ranks(f: Fields<'_>, method: &Method) -> Result<Vec<(String, i64)>> {
    match method {
        Method::AdaLora(_) => Ok(Vec::new()),
        _ => {
            let wanted = format!("a whole number from 1 to {MAX_RANK}");
            f.table("rank_pattern", &wanted, |v| int_within(v, 1, MAX_RANK))
        }
    }
}
