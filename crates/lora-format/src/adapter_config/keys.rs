//! The keys of `LoraConfig`: which are known, which are honoured.

use super::method::{ADALORA_KEYS, Method, VERA_KEYS};
use super::{AdapterConfig, InitLoraWeights};
use crate::error::{Error, Result};
use crate::json::shorten;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Keys with a field of their own in [`AdapterConfig`].
const TYPED: [&str; 24] = [
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
];

/// Every other key of `LoraConfig`, its default as JSON, and why a value that differs cannot be honoured.
/// No reason: the key has no effect on a saved adapter.
pub(super) const OTHER: [(&str, &str, Option<&str>); 17] = [
    ("alora_invocation_tokens", "null", Some("activated LoRA is not implemented; use a plain LoRA adapter")),
    ("arrow_config", "null", Some("Arrow routing is not implemented; use a plain LoRA adapter")),
    ("auto_mapping", "null", None),
    ("corda_config", "null", None),
    ("eva_config", "null", None),
    ("kasa_config", "null", Some("KaSA is not implemented; use a plain LoRA adapter")),
    (
        "layer_replication",
        "null",
        Some(
            "replicated layers (several that share the weights of one) are not implemented; save the expanded model as the base",
        ),
    ),
    ("loftq_config", "{}", None),
    ("lora_ga_config", "null", None),
    ("megatron_config", "null", Some("Megatron layers are not implemented; use a plain LoRA adapter")),
    ("megatron_core", "\"megatron.core\"", None),
    ("monteclora_config", "null", Some("MonteCLoRA is not implemented; use a plain LoRA adapter")),
    ("qalora_group_size", "16", None),
    ("revision", "null", None),
    ("use_bdlora", "null", Some("block-diagonal LoRA is not implemented; use a plain LoRA adapter")),
    ("use_qalora", "false", Some("QA-LoRA is not implemented; use a plain LoRA adapter")),
    ("velora_config", "null", Some("VeLoRA is not implemented; use a plain LoRA adapter")),
];

/// The key under which LoftQ's settings stand.
const LOFTQ_CONFIG: &str = "loftq_config";

/// Keys of older versions that never had an effect on a saved adapter.
const HARMLESS: [&str; 1] = ["runtime_config"];

impl AdapterConfig {
    /// How often LoftQ packed each weight and took its loss into the adapter; `None` where the adapter did not begin so.
    pub fn loftq_iterations(&self) -> Option<u32> {
        let InitLoraWeights::Named(name) = &self.init_lora_weights else { return None };
        let given = self.other.get(LOFTQ_CONFIG).and_then(|c| c.get("loftq_iter")).and_then(Value::as_u64);
        (name == "loftq").then(|| given.and_then(|n| u32::try_from(n).ok()).unwrap_or(1))
    }

    /// The same configuration, for an adapter that begins by LoftQ with so many iterations.
    #[must_use]
    pub fn with_loftq(mut self, iterations: u32) -> Self {
        self.init_lora_weights = InitLoraWeights::Named("loftq".into());
        self.other.insert(LOFTQ_CONFIG.into(), json!({ "loftq_bits": 4, "loftq_iter": iterations }));
        self
    }

    /// Refuses what is a valid configuration but would be computed wrongly here; `path` is the file that errors name.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the field.
    pub fn check_supported(&self, path: &Path) -> Result<()> {
        let refuse = |field: &str, value: Value, reason| Err(unsupported(path, field, &value, reason));
        if let InitLoraWeights::Named(name) = &self.init_lora_weights
            && (name.starts_with("pissa_niter_") || ["corda", "lora_ga"].contains(&name.as_str()))
        {
            let reason = "this initialisation changed the base weights, so the adapter is valid only with the changed base; \
                          save it again in PEFT with path_initial_model_for_weight_conversion";
            return refuse("init_lora_weights", json!(name), reason);
        }
        if let Some(loftq) = self.other.get(LOFTQ_CONFIG).filter(|_| self.loftq_iterations().is_some()) {
            let given = |key: &str| loftq.get(key).unwrap_or(&Value::Null);
            let (bits, iterations) = (given("loftq_bits"), given("loftq_iter"));
            if !bits.is_null() && bits.as_u64() != Some(4) {
                return refuse(
                    "loftq_config.loftq_bits",
                    bits.clone(),
                    "LoftQ is implemented for 4 bits; begin again with them",
                );
            }
            if !iterations.is_null() && iterations.as_u64().and_then(|n| u32::try_from(n).ok()).is_none_or(|n| n == 0) {
                return refuse("loftq_config.loftq_iter", iterations.clone(), "it must be a whole number from 1 on");
            }
        }
        if self.ensure_weight_tying && self.trainable_token_indices.is_none() {
            let reason =
                "tied adapters are implemented for trainable_token_indices only; save embedding and head apart";
            return refuse("ensure_weight_tying", json!(true), reason);
        }
        for (key, given) in [
            ("trainable_token_indices", self.trainable_token_indices.is_some()),
            ("target_parameters", self.has_target_parameters()),
        ] {
            if given && self.method != Method::Lora {
                let reason = "it is implemented for peft_type LORA only; train it as an adapter of its own";
                return refuse(key, json!(self.method.peft_type()), reason);
            }
        }
        for (key, _, reason) in OTHER {
            if let (Some(value), Some(reason)) = (self.other.get(key), reason)
                && !is_empty(value)
            {
                return refuse(key, value.clone(), reason);
            }
        }
        Ok(())
    }
}

pub(super) fn unsupported(path: &Path, field: &str, value: &Value, reason: &'static str) -> Error {
    Error::Unsupported { path: path.into(), field: field.into(), value: shorten(&value.to_string()), reason }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(s) => s.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// Refuses keys that nobody here knows and whose value says something.
pub(super) fn refuse_unknown(path: &Path, map: &Map<String, Value>, method: &Method) -> Result<()> {
    let of_lora = |key: &str| TYPED.contains(&key) || OTHER.iter().any(|(k, ..)| *k == key);
    let known = |key: &str| {
        HARMLESS.contains(&key)
            || match method {
                Method::Lora => of_lora(key),
                Method::Vera(_) => VERA_KEYS.contains(&key),
                Method::AdaLora(_) => of_lora(key) || ADALORA_KEYS.contains(&key),
            }
    };
    let keys: Vec<String> = map
        .iter()
        .filter(|(key, value)| !known(key) && !is_empty(value))
        .map(|(key, value)| format!("`{}` = {}", shorten(key), shorten(&value.to_string())))
        .take(20)
        .collect();
    if keys.is_empty() { Ok(()) } else { Err(Error::UnknownKeys { path: path.into(), keys }) }
}

/// The known keys without a field of their own that are not at their default.
pub(super) fn changed_others(map: &Map<String, Value>) -> Map<String, Value> {
    let is_default = |value: &Value, default: &str| serde_json::from_str::<Value>(default).ok().as_ref() == Some(value);
    let given = OTHER.iter().filter_map(|(key, default, _)| map.get(*key).map(|value| (key, default, value)));
    given
        .filter(|(_, default, value)| !value.is_null() && !is_default(value, default))
        .map(|(key, _, value)| ((*key).to_string(), value.clone()))
        .collect()
}
