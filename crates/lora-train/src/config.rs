//! What the user asks for: one typed configuration, read from TOML or YAML, with every fault reported at once.

mod check;
mod checkpointing;
mod data;
mod faults;
pub(crate) mod keys;
mod lora;
mod model;
mod objective;
mod ordered;
mod reference;
mod rules;
mod source;
mod train;
mod unknown;
mod watch;

pub use checkpointing::Checkpointing;
pub use data::{BadRecords, Cache, DataConfig, Mixing, Preference, SourceConfig, TextBy, Truncation};
pub use faults::{ConfigErrors, Fault, FaultKind, Place};
pub(crate) use keys::choice;
pub use lora::{Bias, InitLoraWeights, LoraConfig, Modules, PeftType, TaskType, Tokens};
pub use model::{DType, Kernels, ModelConfig, Quantization, Weights};
pub use objective::{ObjectiveConfig, ObjectiveName, Reference, RewardName};
pub use train::{BestMetric, FinetuningType, Length, Optim, PipelineDType, TrainConfig};
pub use watch::WatchConfig;

use crate::overrides::Override;
use keys::{Key, Kind};
use serde::{Deserialize, Serialize};
pub(crate) use source::Places;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// The configuration of a run.
///
/// Relative paths in it are relative to the current folder, not to the configuration's file, as in Hugging Face's tools.
///
/// ```
/// use lora_train::{Override, RunConfig};
///
/// let settings = ["output_dir=runs/x", "model.path=base", "data.train=train.jsonl", "lora.r=16"];
/// let settings: Vec<Override> = settings.iter().map(|s| s.parse()).collect::<Result<_, _>>()?;
/// let config = RunConfig::load(None, &settings)?;
/// assert_eq!(config.lora.r, 16);
/// # Ok::<(), lora_train::ConfigErrors>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Folder of the run: the adapter, metrics and checkpoints go there.
    pub output_dir: PathBuf,
    /// Seed of everything random: the order of the data, dropout, and what adapters start from.
    pub seed: u64,
    /// The base model.
    pub model: ModelConfig,
    /// The adapters.
    pub lora: LoraConfig,
    /// The data.
    pub data: DataConfig,
    /// What is minimised.
    #[serde(skip_serializing_if = "ObjectiveConfig::is_usual")]
    pub objective: ObjectiveConfig,
    /// The training itself.
    pub train: TrainConfig,
    /// Rounds on files as they arrive.
    #[serde(skip_serializing_if = "WatchConfig::is_usual")]
    pub watch: WatchConfig,
}

/// The rank of VeRA where none is given, as in PEFT.
const VERA_RANK: u32 = 256;

/// The keys outside every section.
pub(crate) const TOP_KEYS: &[Key] = &[
    Key {
        name: "output_dir",
        kind: Kind::Text,
        doc: "Folder of the run: the adapter, metrics and checkpoints go there.",
    },
    Key {
        name: "seed",
        kind: Kind::Integer { min: 0, max: i64::MAX },
        doc: "Seed of everything random: the order of the data, dropout, and what adapters start from.",
    },
];

/// The sections, with their keys.
pub(crate) const SECTIONS: &[(&str, &[Key])] = &[
    ("model", ModelConfig::KEYS),
    ("lora", LoraConfig::KEYS),
    ("data", DataConfig::KEYS),
    ("objective", ObjectiveConfig::KEYS),
    ("train", TrainConfig::KEYS),
    ("watch", WatchConfig::KEYS),
];

/// The key with this dotted name.
pub(crate) fn key(dotted: &str) -> Option<&'static Key> {
    let (keys, name) = match dotted.split_once('.') {
        Some((section, name)) => (SECTIONS.iter().find(|(s, _)| *s == section)?.1, name),
        None => (TOP_KEYS, dotted),
    };
    keys.iter().find(|key| key.name == name)
}

impl RunConfig {
    /// Reads a configuration: TOML, or YAML when the file ends in `.yaml` or `.yml`. Overrides go before what the file
    /// says; without a file they are all there is.
    ///
    /// # Errors
    /// Every fault of the file and of the overrides: unknown keys, wrong types, values out of range, keys that contradict
    /// each other, and keys that are missing.
    pub fn load(path: Option<&Path>, overrides: &[Override]) -> Result<Self, ConfigErrors> {
        let (mut tree, mut places) = match path {
            Some(path) => source::read(path)?,
            None => (Table::new(), Places::program()),
        };
        crate::overrides::apply(overrides, &mut tree, &mut places)?;
        Self::from_tree(tree, &places)
    }

    /// Checks a configuration that was made by a program as [`RunConfig::load`] checks a file.
    ///
    /// # Errors
    /// Every fault of it.
    pub fn validate(&self) -> Result<(), ConfigErrors> {
        Self::from_tree(self.tree()?, &Places::program()).map(drop)
    }

    fn from_tree(mut tree: Table, places: &Places) -> Result<Self, ConfigErrors> {
        let mut faults = check::check(&mut tree, places);
        let mut config: Self = Value::Table(tree.clone()).try_into().map_err(|e: toml::de::Error| {
            ConfigErrors(vec![places.fault("", None, FaultKind::Syntax { message: e.message().to_string() })])
        })?;
        rules::check(&config, &tree, places, &mut faults);
        if !faults.is_empty() {
            return Err(ConfigErrors(faults));
        }
        // So that the resolved configuration says which rank it is: VeRA's default is another than LoRA's.
        let given = tree.get("lora").and_then(|section| section.get("r")).is_some();
        if config.lora.peft_type == PeftType::Vera && !given {
            config.lora.r = VERA_RANK;
        }
        let given = tree.get("train").and_then(|section| section.get("adam_beta2")).is_some();
        if config.train.optim == Optim::Lion && !given {
            config.train.adam_beta2 = train::LION_BETA2;
        }
        // So that the resolved configuration says how long the run is.
        if let Length::Epochs(epochs) = config.train.length() {
            config.train.num_train_epochs = Some(epochs);
        }
        Ok(config)
    }

    /// The configuration as TOML with every default written out; [`RunConfig::load`] reads it back equal.
    ///
    /// # Errors
    /// A number that TOML cannot hold, such as a seed above 2^63 - 1.
    pub fn to_toml(&self) -> Result<String, ConfigErrors> {
        Ok(self.tree()?.to_string())
    }

    /// Every key with its value as TOML, by dotted name: what a checkpoint remembers of the configuration.
    ///
    /// # Errors
    /// As [`RunConfig::to_toml`].
    pub fn flat(&self) -> Result<BTreeMap<String, String>, ConfigErrors> {
        let mut flat = BTreeMap::new();
        for (name, value) in self.tree()? {
            match value {
                Value::Table(section) => {
                    flat.extend(section.iter().map(|(key, value)| (format!("{name}.{key}"), value.to_string())));
                }
                value => {
                    flat.insert(name, value.to_string());
                }
            }
        }
        Ok(flat)
    }

    /// A Markdown table of every key: what it may hold, its default, what it means.
    pub fn reference() -> String {
        reference::reference()
    }

    fn tree(&self) -> Result<Table, ConfigErrors> {
        Table::try_from(self).map_err(|e| {
            ConfigErrors(vec![Places::program().fault(
                "",
                None,
                FaultKind::Syntax { message: format!("not writable as TOML: {e}") },
            )])
        })
    }
}

#[cfg(test)]
mod tests;
