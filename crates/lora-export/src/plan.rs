//! What merging will change, checked against the base before anything is written.

use crate::change::{Change, Delta, Magnitude, Packed, Step, blocks};
use crate::error::{Error, Result};
use crate::orient::Orientation;
use crate::plain::{input_of, plain};
use crate::tied::{TiedPair, tied_pair};
use lora_core::{LoftQ, Lora, LoraSpec, Principal};
use lora_format::{
    AdapterConfig, AdapterFolder, AdapterModule, Checkpoint, InitLoraWeights, LabelSettings, Labels, LoraTensors,
    names_classifier, read_adapter,
};
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
    /// What the result tells apart, where an adapter was trained to classify.
    pub(crate) labels: Option<Labels>,
}

impl Plan {
    /// Reads the adapters and lays out what they change.
    pub(crate) fn make(base: &Checkpoint, config: &Map<String, Value>, adapters: &[PathBuf]) -> Result<Self> {
        if adapters.is_empty() {
            return Err(Error::NoAdapter);
        }
        let orientation = Orientation::new(base, config);
        let mut planner = Planner { base, orientation, changes: BTreeMap::new(), labels: own_labels(base, config)? };
        let mut named_bases = Vec::new();
        for dir in adapters {
            let folder = read_adapter(dir)?;
            let folder = plain(folder, &|module, out| planner.input_width(dir, module, out))?;
            if let Some(labels) = Labels::of_adapter(dir, &folder, planner.labels.as_ref())? {
                planner.labels = Some(labels);
            }
            planner.begin_adapter(dir, &folder)?;
            // A classifier has no language head that could share the embedding's weight.
            let tied = tied_pair(base, config).filter(|_| planner.labels.is_none());
            let follows = tied.filter(|pair| !has_own_rows(&folder.modules, pair.head));
            for (module, content) in folder.modules {
                if let AdapterModule::Tokens(rows) = &content {
                    let follows = follows.filter(|pair| pair.embedding == format!("{module}.weight"));
                    planner.add_tokens(dir, &folder.config, &module, rows, follows)?;
                    continue;
                }
                planner.add(dir, &folder.config, &module, content)?;
            }
            named_bases.push(folder.config.base_model_name_or_path);
        }
        // A classifier has no language head that could share the embedding's weight.
        let tied = tied_pair(base, config).filter(|_| planner.labels.is_none());
        let mut plan = Plan { changes: planner.changes, untied: None, named_bases, labels: planner.labels };
        if let Some(pair) = tied {
            plan.settle_tie(base, pair)?;
        }
        Ok(plan)
    }

    /// Whether a tensor of the base has no place in the result: another head than that of the classifier that it becomes.
    pub(crate) fn drops(&self, name: &str) -> bool {
        let heads = ["lm_head.", "embed_out.", "cls."];
        self.labels.is_some() && heads.iter().any(|start| name.starts_with(start))
    }

    /// The tensors of a head that the base lacks, sorted.
    pub(crate) fn new_tensors<'a>(&'a self, base: &'a Checkpoint) -> impl Iterator<Item = (&'a str, &'a Change)> {
        let new = |(name, change): &(&String, &Change)| change.trained && !base.contains(name);
        let all = self.changes.iter().filter(new).map(|(name, change)| (name.as_str(), change));
        all.filter(|_| self.labels.is_some())
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

/// Whether an adapter has rows of tokens for a head by itself.
fn has_own_rows(modules: &BTreeMap<String, AdapterModule>, head: &str) -> bool {
    let module = head.strip_suffix(".weight").and_then(|module| modules.get(module));
    matches!(module, Some(AdapterModule::Tokens(_)))
}

pub(crate) struct Planner<'a> {
    pub(crate) base: &'a Checkpoint,
    orientation: Orientation,
    changes: BTreeMap<String, Change>,
    labels: Option<Labels>,
}

/// The labels of a base that is a classifier already.
fn own_labels(base: &Checkpoint, config: &Map<String, Value>) -> Result<Option<Labels>> {
    let names = config.get("architectures").and_then(Value::as_array).into_iter().flatten();
    let names: Vec<String> = names.filter_map(|name| name.as_str().map(str::to_string)).collect();
    if !names_classifier(&names) {
        return Ok(None);
    }
    Ok(Some(LabelSettings::of(&base.dir().join("config.json"), config)?.or_default()))
}

impl Planner<'_> {
    /// An adapter that saved a module in full has no common starting point with another that changes it, and neither have
    /// rows of tokens with another change of the same rows.
    fn begin_adapter(&self, adapter: &Path, folder: &AdapterFolder) -> Result<()> {
        for (module, content) in &folder.modules {
            let names: Vec<String> = match content {
                AdapterModule::Saved { tensors } => tensors.keys().map(|name| format!("{module}.{name}")).collect(),
                AdapterModule::Stacked(_) => self.stacked_tensors(adapter, module)?,
                _ => vec![format!("{module}.weight")],
            };
            let ids = match content {
                AdapterModule::Tokens(_) => folder.config.trainable_token_indices.as_ref().and_then(|t| t.of(module)),
                _ => None,
            };
            for tensor in names {
                let Some(before) = self.changes.get(&tensor) else { continue };
                let saves = matches!(content, AdapterModule::Saved { .. });
                let meets = |step: &Step| match (step, ids) {
                    (Step::Rows(rows), Some(ids)) => ids.iter().any(|id| rows.ids.contains(id)),
                    (Step::Rows(_), None) | (_, Some(_)) => true,
                    _ => false,
                };
                if before.trained || saves || before.steps.iter().any(meets) {
                    return Err(Error::Conflict { adapter: adapter.into(), tensor });
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, adapter: &Path, config: &AdapterConfig, module: &str, content: AdapterModule) -> Result<()> {
        let weight = format!("{module}.weight");
        let (lora, transposed) = match content {
            AdapterModule::Saved { tensors } => {
                for (name, tensor) in tensors {
                    let name = format!("{module}.{name}");
                    if !(self.labels.is_some() && is_head(module)) {
                        self.check(adapter, &name, tensor.size())?;
                    }
                    let change = self.change(&name);
                    (change.replacement, change.trained) = (Some(tensor), true);
                }
                return Ok(());
            }
            AdapterModule::Linear(lora) => {
                let transposed = self.orientation.is_transposed(self.base, config, &weight, &lora.a, &lora.b);
                (lora, transposed)
            }
            AdapterModule::Embedding(lora) => (lora, true),
            // `plain` has made LoRA of them.
            AdapterModule::Vera(_) | AdapterModule::AdaLora(_) => return Ok(()),
            AdapterModule::Stacked(lora) => return self.add_stacked(adapter, config, module, &lora),
            AdapterModule::Tokens(rows) => return self.add_tokens(adapter, config, module, &rows, None),
        };
        let LoraTensors { a, b, bias, magnitude, base_weight, base_bias } = lora;
        // As the tensor is stored: rows are outputs, or inputs where it is transposed.
        let as_stored = |a: &Tensor, b: &Tensor| -> Result<(Tensor, Tensor)> {
            Ok(if transposed { (turn(&weight, a)?, turn(&weight, b)?) } else { (b.shallow_clone(), a.shallow_clone()) })
        };
        let (left, right) = as_stored(&a, &b)?;
        self.check(adapter, &weight, vec![left.size()[0], right.size()[1]])?;
        let spec = LoraSpec::new(config.rank_of(module)?, config.alpha_of(module)?, config.use_rslora);
        let spec = spec.map_err(|e| Error::merge(&weight, e))?;
        let scale = spec.scale();
        self.add_biases(adapter, module, bias, scale, base_bias)?;
        let began = self.start_of(config, &weight, spec, transposed)?;
        let packed = match config.loftq_iterations() {
            Some(iterations) => Some(self.packed(LoftQ { iterations }, &weight, spec, transposed)?),
            None => None,
        };
        let change = self.change(&weight);
        if let Some(saved) = base_weight {
            match &change.replacement {
                Some(other) if !other.f_equal(&saved).map_err(|e| Error::merge(&weight, e))? => {
                    return Err(Error::Conflict { adapter: adapter.into(), tensor: weight });
                }
                _ => change.replacement = Some(saved),
            }
        }
        if let Some(packed) = packed {
            if change.packed.is_some() {
                return Err(Error::Conflict { adapter: adapter.into(), tensor: weight });
            }
            change.packed = Some(packed);
        }
        if let Some(start) = began {
            let (left, right) = as_stored(&start.a, &start.b)?;
            change.steps.push(Step::Delta(Delta { left, right, scale: -scale }));
        }
        change.steps.push(Step::Delta(Delta { left, right, scale }));
        if let Some(m) = magnitude {
            let m = m.f_to_kind(Kind::Double).map_err(|e| Error::merge(&weight, e))?;
            let column_norms = if transposed { Some(self.column_norms(&weight)?) } else { None };
            self.change(&weight).steps.push(Step::Magnitude(Magnitude { m, column_norms }));
        }
        Ok(())
    }

    /// How wide the input of a linear layer of the base is.
    fn input_width(&self, adapter: &Path, module: &str, out: i64) -> Result<i64> {
        let weight = format!("{module}.weight");
        let source = self.source(&weight);
        if !self.base.contains(&source) {
            return Err(self.missing(adapter, &weight));
        }
        let shape = &self.base.info(&source)?.shape;
        let misfit = || Error::Shape { adapter: adapter.into(), tensor: weight, got: vec![out], wanted: shape.clone() };
        input_of(shape, out).ok_or_else(misfit)
    }

    fn missing(&self, adapter: &Path, name: &str) -> Error {
        Error::NoSuchTensor {
            adapter: adapter.into(),
            base: self.base.dir().into(),
            tensor: name.into(),
            nearest: nearest(name, self.base),
        }
    }

    /// The biases that an adapter trained: the layer's own, and that of its B.
    fn add_biases(
        &mut self,
        adapter: &Path,
        module: &str,
        bias: Option<Tensor>,
        scale: f64,
        base_bias: Option<Tensor>,
    ) -> Result<()> {
        let name = format!("{module}.bias");
        if bias.is_some() && !self.base.contains(&name) {
            return Err(Error::NoBias { adapter: adapter.into(), module: module.into() });
        }
        for tensor in bias.iter().chain(&base_bias) {
            self.check(adapter, &name, tensor.size())?;
        }
        if let Some(own) = base_bias {
            let change = self.change(&name);
            (change.replacement, change.trained) = (Some(own), true);
        }
        if let Some(vector) = bias {
            self.change(&name).steps.push(Step::Vector { vector, scale });
        }
        Ok(())
    }

    /// What PEFT took out of the base when an adapter that was saved unconverted began (PiSSA, OLoRA): it is taken out
    /// again, as PEFT does when it loads one.
    fn start_of(&self, config: &AdapterConfig, weight: &str, spec: LoraSpec, transposed: bool) -> Result<Option<Lora>> {
        let Some(principal) = began_as(config) else { return Ok(None) };
        let stored = self.base.read(&self.source(weight))?;
        let oriented = if transposed { turn(weight, &stored)? } else { stored };
        Ok(Some(principal.start(&oriented, spec, 0).map_err(|e| Error::merge(weight, e))?))
    }

    /// What LoftQ puts in the place of a weight of the base.
    fn packed(&self, loftq: LoftQ, weight: &str, spec: LoraSpec, transposed: bool) -> Result<Packed> {
        let stored = self.base.read(&self.source(weight))?;
        let oriented = if transposed { turn(weight, &stored)? } else { stored };
        let codes = loftq.base(&oriented, spec.r()).map_err(|e| Error::merge(weight, e))?;
        Ok(Packed { codes, transposed })
    }

    /// The norm of each column of a tensor with the changes so far.
    fn column_norms(&mut self, name: &str) -> Result<Tensor> {
        let source = self.source(name);
        let change = &self.changes[name];
        let mut sum: Option<Tensor> = None;
        for (first, count) in blocks(&self.base.info(&source)?.shape) {
            let rows = change.rows(name, self.base, first, count)?;
            let squares = rows.f_square().and_then(|t| t.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Double));
            let squares = squares.map_err(|e| Error::merge(name, e))?;
            sum = Some(match sum {
                None => squares,
                Some(sum) => sum.f_add(&squares).map_err(|e| Error::merge(name, e))?,
            });
        }
        sum.unwrap_or_else(|| Tensor::from(1.0)).f_sqrt().map_err(|e| Error::merge(name, e))
    }

    pub(crate) fn source(&self, name: &str) -> String {
        self.orientation.source(name)
    }

    pub(crate) fn change(&mut self, name: &str) -> &mut Change {
        let source = self.source(name);
        self.changes.entry(name.into()).or_insert_with(|| Change::of(&source))
    }

    pub(crate) fn check(&self, adapter: &Path, name: &str, got: Vec<i64>) -> Result<()> {
        let source = self.source(name);
        if !self.base.contains(&source) {
            return Err(self.missing(adapter, name));
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

/// The part of the base that an adapter began as, where PEFT saved it unconverted.
pub(crate) fn began_as(config: &AdapterConfig) -> Option<Principal> {
    match &config.init_lora_weights {
        InitLoraWeights::Named(name) => Principal::named(name),
        _ => None,
    }
}

/// Whether a module is of a classification head, which a base may lack or have for other labels.
fn is_head(module: &str) -> bool {
    ["score", "classifier"].iter().any(|head| module == *head || module.starts_with(&format!("{head}.")))
        || module.ends_with("pooler.dense")
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
