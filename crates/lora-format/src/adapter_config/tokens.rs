//! Tokens whose rows alone are trained: PEFT's `trainable_token_indices`, and its method of that name alone.

use super::AdapterConfig;
use crate::error::Result;
use crate::fields::{Fields, int_within};
use crate::json::shorten;
use crate::target::TargetModules;
use serde_json::{Map, Value, json};

/// The largest id that is believed; no vocabulary is larger.
const MAX_ID: i64 = i32::MAX as i64;
/// PEFT's name for adapters that train tokens and nothing else.
pub(super) const TOKENS_ALONE: &str = "TRAINABLE_TOKENS";

/// The value of `trainable_token_indices`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenIndices {
    /// Rows of the input embedding, which a tied head follows.
    Embedding(Vec<i64>),
    /// The name of an embedding or head, or the end of its path, to rows of it.
    ByModule(Vec<(String, Vec<i64>)>),
}

impl TokenIndices {
    /// The ids of a module, if it is meant; a plain list is of every module that asks, for only an embedding does.
    pub fn of(&self, module: &str) -> Option<&[i64]> {
        match self {
            TokenIndices::Embedding(ids) => Some(ids),
            TokenIndices::ByModule(map) => {
                map.iter().find(|(name, _)| module.ends_with(name.as_str())).map(|(_, ids)| ids.as_slice())
            }
        }
    }

    /// Every list of ids, with the name that it is given under.
    pub fn lists(&self) -> Vec<(Option<&str>, &[i64])> {
        match self {
            TokenIndices::Embedding(ids) => vec![(None, ids)],
            TokenIndices::ByModule(map) => map.iter().map(|(name, ids)| (Some(name.as_str()), &ids[..])).collect(),
        }
    }

    pub(super) fn to_json(&self) -> Value {
        match self {
            TokenIndices::Embedding(ids) => json!(ids),
            TokenIndices::ByModule(map) => Value::Object(map.iter().map(|(k, v)| (k.clone(), json!(v))).collect()),
        }
    }
}

fn ids(value: &Value) -> Option<Vec<i64>> {
    value.as_array()?.iter().map(|id| int_within(id, 0, MAX_ID)).collect()
}

/// Reads `trainable_token_indices`.
pub(super) fn read(f: Fields<'_>) -> Result<Option<TokenIndices>> {
    let key = "trainable_token_indices";
    let wanted = format!("a list of token ids from 0 to {MAX_ID}, or a table from names of embeddings to such lists");
    let indices = match f.get(key) {
        None => return Ok(None),
        Some(list @ Value::Array(_)) => TokenIndices::Embedding(ids(list).ok_or_else(|| f.wrong(key, &wanted))?),
        Some(_) => TokenIndices::ByModule(f.table(key, &wanted, ids)?),
    };
    Ok(Some(indices))
}

/// What is wrong with a set of lists: none at all, an empty one, or a token twice, which one row cannot be.
pub(super) fn fault(indices: &TokenIndices) -> Option<String> {
    let lists = indices.lists();
    if lists.is_empty() || lists.iter().any(|(_, ids)| ids.is_empty()) {
        return Some("a list of at least one token id".into());
    }
    let twice = |ids: &[i64]| {
        let mut sorted = ids.to_vec();
        sorted.sort_unstable();
        sorted.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
    };
    let id = lists.iter().find_map(|(_, ids)| twice(ids))?;
    Some(format!("a list that names each token once; {id} is there twice"))
}

/// PEFT's configuration of tokens alone, as one of LoRA without a target.
pub(super) fn from_alone(f: Fields<'_>, map: &Map<String, Value>) -> Result<AdapterConfig> {
    let known = ["auto_mapping", "init_weights", "revision", "inference_mode"];
    let typed =
        ["base_model_name_or_path", "peft_type", "peft_version", "target_modules", "task_type", "token_indices"];
    let known = |key: &str| known.contains(&key) || typed.contains(&key);
    if let Some((key, value)) = map.iter().find(|(key, value)| !known(key) && !value.is_null()) {
        let keys = vec![format!("`{}` = {}", shorten(key), shorten(&value.to_string()))];
        return Err(crate::Error::UnknownKeys { path: f.path().into(), keys });
    }
    let key = "token_indices";
    let ids = f.get(key).and_then(ids).ok_or_else(|| f.wrong(key, "a list of token ids"))?;
    let names = f.strings("target_modules")?.unwrap_or_else(|| vec!["embed_tokens".into()]);
    Ok(AdapterConfig {
        base_model_name_or_path: f.string("base_model_name_or_path")?,
        task_type: f.string("task_type")?,
        peft_version: f.string("peft_version")?,
        target_modules: Some(TargetModules::List(Vec::new())),
        trainable_token_indices: Some(TokenIndices::ByModule(
            names.into_iter().map(|name| (name, ids.clone())).collect(),
        )),
        ..AdapterConfig::default()
    })
}

impl AdapterConfig {
    /// Whether tokens are trained and nothing else: no module, no parameter.
    pub fn is_tokens_alone(&self) -> bool {
        let none = |targets: &Option<TargetModules>| match targets {
            Some(TargetModules::List(names)) => names.is_empty(),
            _ => false,
        };
        let saved = self.modules_to_save.as_ref().is_some_and(|names| !names.is_empty());
        self.trainable_token_indices.is_some()
            && none(&self.target_modules)
            && !self.has_target_parameters()
            && !saved
            && self.bias == "none"
    }

    /// The form in which PEFT keeps tokens alone; `None` where another is needed.
    pub(super) fn alone_json(&self) -> Option<Map<String, Value>> {
        let indices = self.trainable_token_indices.as_ref().filter(|_| self.is_tokens_alone())?;
        let lists = indices.lists();
        let (_, first) = lists.first()?;
        if lists.iter().any(|(_, ids)| ids != first) {
            return None;
        }
        let names: Vec<&str> = lists.iter().filter_map(|(name, _)| *name).collect();
        let targets = match names[..] {
            [] => Value::Null,
            [name] => json!(name),
            _ => json!(names),
        };
        let Value::Object(mut map) = json!({
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "inference_mode": true,
            "init_weights": true,
            "peft_type": TOKENS_ALONE,
            "peft_version": super::PEFT_VERSION,
            "revision": null,
            "target_modules": targets,
            "task_type": self.task_type,
            "token_indices": first,
        }) else {
            return None;
        };
        map.sort_keys();
        Some(map)
    }
}
