//! What merging will change, checked against the base before anything is written.

use crate::change::{Change, Delta, blocks};
use crate::error::{Error, Result};
use crate::tied::{TiedPair, tied_pair};
use lora_core::LoraSpec;
use lora_format::{AdapterConfig, AdapterModule, Checkpoint, read_adapter};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// Names that are suggested for one that is missing.
const SUGGESTIONS: usize = 3;

/// All changes of a merge.
pub(crate) struct Plan {
    pub(crate) changes: BTreeMap<String, Change>,
    /// Embedding and head share a weight in the base and will not in the result.
    pub(crate) untied: Option<TiedPair>,
    /// The adapters' `base_model_name_or_path`.
    pub(crate) named_bases: Vec<Option<String>>,
}

impl Plan {
    /// Reads the adapters and lays out what they change.
    pub(crate) fn make(base: &Checkpoint, config: &Map<String, Value>, adapters: &[PathBuf]) -> Result<Self> {
        if adapters.is_empty() {
            return Err(Error::NoAdapter);
        }
        let tied = tied_pair(base, config);
        let stores_transposed = matches!(config.get("model_type").and_then(Value::as_str), Some("gpt2" | "openai-gpt"));
        let mut planner = Planner { base, tied, stores_transposed, changes: BTreeMap::new() };
        let mut named_bases = Vec::new();
        for dir in adapters {
            let folder = read_adapter(dir)?;
            planner.begin_adapter(dir, &folder.modules)?;
            for (module, content) in folder.modules {
                planner.add(dir, &folder.config, &module, content)?;
            }
            named_bases.push(folder.config.base_model_name_or_path);
        }
        let mut plan = Plan { changes: planner.changes, untied: None, named_bases };
        if let Some(pair) = tied {
            plan.settle_tie(base, pair)?;
        }
        Ok(plan)
    }

    /// A tied weight that is changed in one of its two roles only, or differently in both, has to become two.
    fn settle_tie(&mut self, base: &Checkpoint, pair: TiedPair) -> Result<()> {
        if !self.changes.contains_key(pair.embedding) && !self.changes.contains_key(pair.head) {
            return Ok(());
        }
        for name in [pair.embedding, pair.head] {
            self.changes.entry(name.into()).or_insert_with(|| Change::of(pair.embedding));
        }
        let mut same = true;
        for (first, count) in blocks(&base.info(pair.embedding)?.shape) {
            let of = |name: &str| self.changes[name].rows(name, base, first, count);
            same &= of(pair.embedding)?.f_equal(&of(pair.head)?).map_err(|e| Error::merge(pair.head, e))?;
        }
        if !same {
            self.untied = Some(pair);
        } else if !base.contains(pair.head) {
            self.changes.remove(pair.head);
        }
        Ok(())
    }
}

struct Planner<'a> {
    base: &'a Checkpoint,
    tied: Option<TiedPair>,
    /// The family stores the weights of its blocks as `[in, out]`.
    stores_transposed: bool,
    changes: BTreeMap<String, Change>,
}

impl Planner<'_> {
    /// An adapter that saved a module in full has no common starting point with another that changes it.
    fn begin_adapter(&self, adapter: &Path, modules: &BTreeMap<String, AdapterModule>) -> Result<()> {
        for (module, content) in modules {
            let names: Vec<String> = match content {
                AdapterModule::Saved { tensors } => tensors.keys().map(|name| format!("{module}.{name}")).collect(),
                _ => vec![format!("{module}.weight")],
            };
            for tensor in names {
                let saves = matches!(content, AdapterModule::Saved { .. });
                if self.changes.get(&tensor).is_some_and(|before| before.trained || saves) {
                    return Err(Error::Conflict { adapter: adapter.into(), tensor });
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, adapter: &Path, config: &AdapterConfig, module: &str, content: AdapterModule) -> Result<()> {
        let weight = format!("{module}.weight");
        let (left, right, base_weight) = match content {
            AdapterModule::Saved { tensors } => {
                for (name, tensor) in tensors {
                    let name = format!("{module}.{name}");
                    self.check(adapter, &name, tensor.size())?;
                    let change = self.change(&name);
                    (change.replacement, change.trained) = (Some(tensor), true);
                }
                return Ok(());
            }
            AdapterModule::Linear { a, b, base_weight } if self.is_transposed(config, &weight, &a, &b) => {
                (turn(&weight, &a)?, turn(&weight, &b)?, base_weight)
            }
            AdapterModule::Linear { a, b, base_weight } => (b, a, base_weight),
            AdapterModule::Embedding { a, b, base_weight } => (turn(&weight, &a)?, turn(&weight, &b)?, base_weight),
        };
        self.check(adapter, &weight, vec![left.size()[0], right.size()[1]])?;
        let spec = LoraSpec::new(config.rank_of(module)?, config.alpha_of(module)?, config.use_rslora);
        let scale = spec.map_err(|e| Error::merge(&weight, e))?.scale();
        let change = self.change(&weight);
        if let Some(saved) = base_weight {
            match &change.replacement {
                Some(other) if !other.f_equal(&saved).map_err(|e| Error::merge(&weight, e))? => {
                    return Err(Error::Conflict { adapter: adapter.into(), tensor: weight });
                }
                _ => change.replacement = Some(saved),
            }
        }
        change.deltas.push(Delta { left, right, scale });
        Ok(())
    }

    /// The tensor of the base whose value `name` begins with: a tied head begins with the embedding.
    fn source(&self, name: &str) -> String {
        match self.tied {
            Some(pair) if pair.head == name => pair.embedding.into(),
            _ => name.into(),
        }
    }

    fn change(&mut self, name: &str) -> &mut Change {
        let source = self.source(name);
        self.changes.entry(name.into()).or_insert_with(|| Change::of(&source))
    }

    /// Whether a linear layer's weight is stored as `[in, out]`.
    ///
    /// The shape tells, except for a square one. `fan_in_fan_out` is then right where it is true, but false says little:
    /// PEFT clears it for the whole adapter as soon as one target is an ordinary linear layer, such as GPT-2's head.
    fn is_transposed(&self, config: &AdapterConfig, weight: &str, a: &Tensor, b: &Tensor) -> bool {
        let (out, input) = (b.size()[0], a.size()[1]);
        match self.base.info(&self.source(weight)) {
            Ok(info) if out != input => info.shape == [input, out],
            _ => config.fan_in_fan_out || (self.stores_transposed && !weight.starts_with("lm_head.")),
        }
    }

    fn check(&self, adapter: &Path, name: &str, got: Vec<i64>) -> Result<()> {
        let source = self.source(name);
        if !self.base.contains(&source) {
            return Err(Error::NoSuchTensor {
                adapter: adapter.into(),
                base: self.base.dir().into(),
                tensor: name.into(),
                nearest: nearest(name, self.base),
            });
        }
        let info = self.base.info(&source)?;
        if info.shape != got {
            let wanted = info.shape.clone();
            return Err(Error::Shape { adapter: adapter.into(), tensor: name.into(), got, wanted });
        }
        if !is_float(info.kind) {
            let got = lora_torch::kind_name(info.kind);
            return Err(Error::NotFloat { base: self.base.dir().into(), tensor: name.into(), got });
        }
        Ok(())
    }
}

pub(crate) fn is_float(kind: Kind) -> bool {
    [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double].contains(&kind)
}

fn turn(name: &str, tensor: &Tensor) -> Result<Tensor> {
    tensor.f_tr().map_err(|e| Error::merge(name, e))
}

/// The names of the base that are most like a missing one.
fn nearest(name: &str, base: &Checkpoint) -> Vec<String> {
    let mut names: Vec<(f64, &str)> = base.names().map(|n| (strsim::jaro_winkler(n, name), n)).collect();
    names.sort_by(|a, b| b.0.total_cmp(&a.0));
    names.into_iter().filter(|(score, _)| *score > 0.7).take(SUGGESTIONS).map(|(_, n)| n.to_string()).collect()
}
