//! From a checkpoint folder, or from a seed, to a decoder; and back to a checkpoint.

use crate::block::{Block, Qkv};
use crate::classify::{ClassHead, Head};
use crate::config::ModelConfig;
use crate::decoder::{Decoder, ModuleRef};
use crate::error::{Error, Result};
use crate::keep::{Keeping, MappedBase, Storage};
use crate::layout::{MlpLayout, NormKind, QkvLayout};
use crate::mlp::{Gated, Mlp};
use crate::names::{ModuleKind, ModuleSpec, checkpoint_tensors, head_modules, modules};
use crate::norm::NormLayer;
use crate::stacked::StackedAdapters;
use crate::stage::Stage;
use crate::tokens::TokenAdapters;
use lora_core::{EmbeddingLayer, LinearLayer};
use lora_format::{Checkpoint, is_packed, is_part, packed_weight, read_packed, write_tensors};
use lora_torch::{AttentionRule, Weight, mix_seed};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Progress of a load: bytes read, and bytes in all.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

impl Decoder {
    /// Loads a checkpoint folder (single or sharded safetensors) in `kind` onto `device`.
    ///
    /// # Errors
    /// [`Error::Weights`] listing every tensor that is missing, left over or of another shape than the config says, before
    /// any is read; [`Error::Format`] for files that are damaged.
    pub fn load(dir: &Path, kind: Kind, device: Device, progress: Progress<'_>) -> Result<Self> {
        let config = ModelConfig::read(dir)?;
        if let absent @ [_, ..] = absent_head(dir, &config)?.as_slice() {
            let modules = absent.iter().map(|m| m.path.clone()).collect();
            let remedy = "give an adapter that was trained on it, whose own head goes with it";
            return Err(Error::NoHead { dir: dir.into(), modules, remedy });
        }
        Self::load_as(dir, config, 0, Keeping { kind, device, storage: Storage::Converted }, progress)
    }

    /// Loads a checkpoint folder as what `config` says, such as a language model as a classifier. A head that the folder
    /// lacks ([`absent_head`]) begins as transformers begins it: weights normal with `initializer_range`, biases zero,
    /// drawn from `seed` and the name of the tensor. A mapped base is on the CPU whatever the device; pack it
    /// ([`pack`](Self::pack)) to bring it over. So are the blocks of one that is for the host
    /// ([`keep_on_host`](Self::keep_on_host)).
    ///
    /// # Errors
    /// As [`Decoder::load`].
    pub fn load_as(
        dir: &Path,
        config: ModelConfig,
        seed: u64,
        keeping: Keeping,
        progress: Progress<'_>,
    ) -> Result<Self> {
        let stage = Stage::whole(&config);
        Self::load_stage(dir, config, stage, seed, keeping, progress)
    }

    /// The same of a part of the model: of the others no weight is read, but that of a tied table at both ends.
    ///
    /// # Errors
    /// As [`Decoder::load`].
    pub fn load_stage(
        dir: &Path,
        config: ModelConfig,
        stage: Stage,
        seed: u64,
        Keeping { kind, device, storage }: Keeping,
        progress: Progress<'_>,
    ) -> Result<Self> {
        check_weights(dir, &config)?;
        let absent = absent_head(dir, &config)?;
        let fresh: BTreeSet<String> = absent.iter().flat_map(ModuleSpec::tensors).map(|(name, _)| name).collect();
        let checkpoint = Arc::new(Checkpoint::open(dir)?);
        let mapped = (storage == Storage::Mapped).then(|| Arc::new(MappedBase::new(checkpoint.clone(), &config)));
        let (in_blocks, std) = (format!("{}.", config.layout.layers), config.initializer_range);
        let (mut done, mut all) = (0, checkpoint.total_bytes());
        if !stage.is_whole() {
            all = stage_bytes(&checkpoint, &config, &stage);
        }
        let model = Self::assemble(config, stage, (kind, device), |name, shape| {
            if fresh.contains(name) {
                return Ok(fresh_tensor(name, shape, std, seed)?.f_to_device(device)?.f_to_kind(kind)?.into());
            }
            done += checkpoint.bytes(name)?.len() as u64;
            progress(done.min(all), all);
            if is_packed(&checkpoint, name) {
                let packed = read_packed(&checkpoint, name)?.to_device(device)?;
                checkpoint.release(name)?;
                return Ok(packed);
            }
            let matrix = shape.len() == 2;
            let tensor = match storage {
                Storage::Mapped if matrix && (device == Device::Cpu || name.starts_with(&in_blocks)) => {
                    checkpoint.view(name)?
                }
                Storage::Host if matrix && name.starts_with(&in_blocks) => {
                    let t = checkpoint.read(name)?;
                    checkpoint.release(name)?;
                    t
                }
                Storage::Mapped | Storage::Stored if matrix => {
                    let t = checkpoint.read(name)?.f_to_device(device)?;
                    checkpoint.release(name)?;
                    t
                }
                _ => {
                    let t = checkpoint.read(name)?.f_to_device(device)?.f_to_kind(kind)?.f_contiguous()?;
                    // The copy is what counts from here on.
                    checkpoint.release(name)?;
                    t
                }
            };
            Ok(tensor.into())
        })?;
        Ok(Self { mapped, ..model })
    }

    /// A model with fresh weights: normal with the config's `initializer_range`, norms one, biases zero. Each tensor draws
    /// from a seed of its own.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn fresh(config: ModelConfig, seed: u64, device: Device) -> Result<Self> {
        let (std, plus_one) = (config.initializer_range, config.layout.norm == NormKind::RmsPlusOne);
        let norms: BTreeSet<String> = modules(&config)
            .into_iter()
            .filter(|m| m.kind == ModuleKind::Norm)
            .map(|m| format!("{}.weight", m.path))
            .collect();
        let stage = Stage::whole(&config);
        Self::assemble(config, stage, (Kind::Float, device), |name, shape| {
            let on = (Kind::Float, Device::Cpu);
            let t = if norms.contains(name) {
                if plus_one { Tensor::f_zeros(shape, on)? } else { Tensor::f_ones(shape, on)? }
            } else {
                fresh_tensor(name, shape, std, seed)?
            };
            Ok(t.f_to_device(device)?.into())
        })
    }

    /// A model with random weights that are drawn on the device, in `kind`: for measurements of sizes that no file holds.
    ///
    /// # Errors
    /// What libtorch reports, as where the device has not enough memory.
    pub fn random(config: ModelConfig, kind: Kind, device: Device) -> Result<Self> {
        let (std, stage) = (config.initializer_range, Stage::whole(&config));
        Self::assemble(config, stage, (kind, device), |_, shape| {
            let t = match shape.len() {
                1 => Tensor::f_ones(shape, (kind, device))?,
                _ => Tensor::f_randn(shape, (kind, device))?.f_mul_scalar(std)?,
            };
            Ok(t.into())
        })
    }

    fn assemble(
        config: ModelConfig,
        stage: Stage,
        (kind, device): (Kind, Device),
        mut get: impl FnMut(&str, &[i64]) -> Result<Weight>,
    ) -> Result<Self> {
        let specs: BTreeMap<String, ModuleSpec> = modules(&config).into_iter().map(|m| (m.path.clone(), m)).collect();
        let mut parts = Parts { specs: &specs, config: &config, get: &mut get };
        let layout = config.layout;
        let (first, last) = (stage.is_first(), stage.is_last());
        let mut table = |path: &str| Ok::<_, Error>(EmbeddingLayer { weight: parts.weight(path)?, kind, lora: None });
        let embed_tokens = match first {
            true => table(layout.embed_tokens)?,
            false => {
                let weight = Tensor::f_zeros([0, config.hidden_size], (kind, device))?;
                EmbeddingLayer { weight, kind, lora: None }
            }
        };
        let embed_positions = layout.embed_positions.filter(|_| first).map(&mut table).transpose()?;
        let embed_types = layout.embed_types.filter(|_| first).map(&mut table).transpose()?;
        let embed_norm = layout.embed_norm.filter(|_| first).map(|path| parts.norm(path)).transpose()?;
        let blocks = stage.blocks().map(|i| parts.block(i)).collect::<Result<_>>()?;
        let norm = layout.final_norm.filter(|_| last).map(|path| parts.norm(path)).transpose()?;
        let head = if !last {
            Head::Elsewhere
        } else if config.labels.is_some() {
            let names = layout.classifier;
            let dense = names.dense.map(|path| parts.linear(path)).transpose()?;
            Head::Classes(ClassHead { dense, out: parts.linear(names.out)? })
        } else if config.tie_word_embeddings && first {
            Head::Language(LinearLayer::frozen(embed_tokens.weight.shallow_clone(), None)?)
        } else if config.tie_word_embeddings {
            // The table is held at both ends: here for the logits alone.
            Head::Language(LinearLayer::frozen(parts.matrix(layout.embed_tokens)?, None)?)
        } else {
            Head::Language(LinearLayer::frozen(parts.matrix(layout.lm_head)?, None)?)
        };
        let (lora_dropout, mapped) = (0.0, None);
        Ok(Self {
            stage,
            embed_tokens,
            embed_positions,
            embed_types,
            embed_norm,
            blocks,
            norm,
            head,
            lora_dropout,
            remake: false,
            offload: false,
            hosted: None,
            neftune_noise_alpha: 0.0,
            tokens: TokenAdapters::default(),
            config,
            mapped,
        })
    }

    /// Writes the base weights as `model.safetensors`, under the names of the checkpoint.
    ///
    /// # Errors
    /// [`Error::Format`] when the file cannot be written.
    pub fn save_weights(&self, dir: &Path) -> Result<()> {
        let transposed: BTreeSet<String> =
            modules(&self.config).into_iter().filter(|m| m.transposed).map(|m| m.path).collect();
        let mut tensors = Vec::new();
        for (path, module) in self.modules() {
            let mut add = |part: &str, t: Tensor| tensors.push((format!("{path}.{part}"), t));
            let (weight, bias) = match module {
                ModuleRef::Embedding(e) => (e.weight.shallow_clone(), None),
                ModuleRef::Norm(n) => (n.weight.shallow_clone(), n.bias.as_ref()),
                ModuleRef::Linear(_) if path == self.config.layout.lm_head && self.config.tie_word_embeddings => {
                    continue;
                }
                ModuleRef::Linear(l) => (l.weight.dense()?, l.bias.as_ref()),
            };
            let as_stored = if transposed.contains(&path) { weight.f_tr()? } else { weight };
            add("weight", as_stored.f_contiguous()?);
            if let Some(bias) = bias {
                add("bias", bias.shallow_clone());
            }
        }
        Ok(write_tensors(&dir.join("model.safetensors"), &tensors, &BTreeMap::from([("format".into(), "pt".into())]))?)
    }
}

/// Bytes of the weights of a part of a model, as the checkpoint has them.
fn stage_bytes(checkpoint: &Checkpoint, config: &ModelConfig, stage: &Stage) -> u64 {
    let bytes = |name: &str| {
        let info = checkpoint.info(name).ok()?;
        Some(info.shape.iter().product::<i64>() as usize * lora_torch::kind_bytes(info.kind))
    };
    let held = modules(config).into_iter().filter(|m| stage.holds(config, &m.path));
    let own: usize = held.flat_map(|m| m.tensors()).filter_map(|(name, _)| bytes(&name)).sum();
    let tied = config.tie_word_embeddings && stage.is_last() && !stage.is_first();
    let table = if tied { bytes(&format!("{}.weight", config.layout.embed_tokens)) } else { None };
    (own + table.unwrap_or(0)) as u64
}

/// Makes layers from tensors that `get` gives by name and shape.
struct Parts<'a> {
    specs: &'a BTreeMap<String, ModuleSpec>,
    config: &'a ModelConfig,
    get: &'a mut dyn FnMut(&str, &[i64]) -> Result<Weight>,
}

impl Parts<'_> {
    fn spec(&self, path: &str) -> Result<&ModuleSpec> {
        let absent = || Error::Module { module: path.into(), reason: "is not in the module table".into() };
        self.specs.get(path).ok_or_else(absent)
    }

    fn matrix(&mut self, path: &str) -> Result<Weight> {
        let shape = self.spec(path)?.weight_shape();
        (self.get)(&format!("{path}.weight"), &shape)
    }

    /// A table or a vector, which is never packed.
    fn weight(&mut self, path: &str) -> Result<Tensor> {
        match self.matrix(path)? {
            Weight::Plain(t) => Ok(t),
            _ => {
                Err(Error::Module { module: path.into(), reason: "is packed, which only linear layers can be".into() })
            }
        }
    }

    fn bias(&mut self, path: &str) -> Result<Option<Tensor>> {
        let spec = self.spec(path)?;
        let (wanted, width) = (spec.bias, spec.out_features);
        let bias = wanted.then(|| (self.get)(&format!("{path}.bias"), &[width])).transpose()?;
        Ok(bias.and_then(|b| b.plain().map(Tensor::shallow_clone)))
    }

    /// A linear layer; one that is stored transposed is turned, without a copy.
    fn linear(&mut self, path: &str) -> Result<LinearLayer> {
        let (weight, transposed) = (self.matrix(path)?, self.spec(path)?.transposed);
        let weight = match weight {
            Weight::Plain(t) if transposed => t.f_tr()?.into(),
            weight => weight,
        };
        Ok(LinearLayer::frozen(weight, self.bias(path)?)?)
    }

    fn norm(&mut self, path: &str) -> Result<NormLayer> {
        let (kind, eps) = (self.config.layout.norm, self.config.norm_eps);
        Ok(NormLayer { weight: self.weight(path)?, bias: self.bias(path)?, kind, eps })
    }

    fn gated(&mut self, paths: [String; 3]) -> Result<Gated> {
        let [gate, up, down] = paths;
        Ok(Gated { gate: self.linear(&gate)?, up: self.linear(&up)?, down: self.linear(&down)? })
    }

    fn block(&mut self, i: usize) -> Result<Block> {
        let (c, layout) = (self.config, self.config.layout);
        let at = |name: &str| c.in_block(i, name);
        let mut norm = |name: Option<&str>| name.map(|name| self.norm(&at(name))).transpose();
        let before_attention = norm(layout.before_attention)?;
        let (after_attention, before_mlp) = (norm(layout.after_attention)?, norm(layout.before_mlp)?);
        let after_mlp = norm(layout.after_mlp)?;
        let (q_norm, k_norm) = (norm(layout.qk_norm.map(|n| n.q))?, norm(layout.qk_norm.map(|n| n.k))?);
        let qkv = match layout.qkv {
            QkvLayout::Separate([q, k, v]) => {
                Qkv::Separate([self.linear(&at(q))?, self.linear(&at(k))?, self.linear(&at(v))?])
            }
            QkvLayout::Concatenated(name) => Qkv::Concatenated(self.linear(&at(name))?),
            QkvLayout::PerHead(name) => Qkv::PerHead(self.linear(&at(name))?),
        };
        let o_proj = self.linear(&at(layout.o_proj))?;
        let rule = AttentionRule {
            scale: c.attention_scales[i],
            window: c.windows[i],
            softcap: c.attention_softcap,
            causal: !layout.encoder,
        };
        let mlp = self.mlp(i)?;
        Ok(Block { before_attention, qkv, q_norm, k_norm, o_proj, after_attention, before_mlp, mlp, after_mlp, rule })
    }

    fn mlp(&mut self, i: usize) -> Result<Mlp> {
        let (c, layout) = (self.config, self.config.layout);
        let at = |name: &str| c.in_block(i, name);
        if let (Some(names), Some(e), true) = (layout.experts, &c.experts, c.is_sparse(i)) {
            let router = self.linear(&at(names.router))?;
            let paths = |expert: i64| names.parts.map(|part| c.in_expert(i, names.experts, expert as usize, part));
            let experts = (0..e.count).map(|expert| self.gated(paths(expert))).collect::<Result<_>>()?;
            return Ok(Mlp::Experts { router, experts, stacked: StackedAdapters::default() });
        }
        Ok(match layout.mlp {
            MlpLayout::Gated(names) => Mlp::Gated(self.gated(names.map(at))?),
            MlpLayout::GatedTogether([gate_up, down]) => {
                Mlp::GatedTogether { gate_up: self.linear(&at(gate_up))?, down: self.linear(&at(down))? }
            }
            MlpLayout::Plain([up, down]) => Mlp::Plain { up: self.linear(&at(up))?, down: self.linear(&at(down))? },
        })
    }
}

/// A fresh tensor of a layer: a bias of zeros, or a weight that is normal with standard deviation `std`.
fn fresh_tensor(name: &str, shape: &[i64], std: f64, seed: u64) -> Result<Tensor> {
    let on = (Kind::Float, Device::Cpu);
    if name.ends_with(".bias") {
        return Ok(Tensor::f_zeros(shape, on)?);
    }
    let _drawing = lora_torch::manual_seed(mix_seed(&[seed, path_seed(name)]));
    Ok(Tensor::f_randn(shape, on)?.f_mul_scalar(std)?)
}

/// The modules of a classification head that a checkpoint has no weights for, or has them for other labels.
///
/// # Errors
/// What is wrong with the files.
pub fn absent_head(dir: &Path, config: &ModelConfig) -> Result<Vec<ModuleSpec>> {
    if config.labels.is_none() {
        return Ok(Vec::new());
    }
    let checkpoint = Checkpoint::open(dir)?;
    let there = |(name, shape): &(String, Vec<i64>)| checkpoint.info(name).is_ok_and(|info| info.shape == *shape);
    Ok(head_modules(config).into_iter().filter(|m| !m.tensors().iter().all(there)).collect())
}

/// A seed that depends on a name only.
pub(crate) fn path_seed(path: &str) -> u64 {
    let parts: Vec<u64> = path.bytes().map(u64::from).collect();
    mix_seed(&parts)
}

/// Compares what the config asks for with what the headers of the weight files say; reads no weight.
///
/// # Errors
/// [`Error::Weights`] listing every tensor that is missing, left over, or of another shape or dtype.
pub fn check_weights(dir: &Path, config: &ModelConfig) -> Result<()> {
    let checkpoint = Checkpoint::open(dir)?;
    let wanted = checkpoint_tensors(config);
    // What the head of a classifier lacks begins fresh, and whoever loads it decides whether that will do.
    let absent: BTreeSet<String> =
        absent_head(dir, config)?.iter().flat_map(ModuleSpec::tensors).map(|(name, _)| name).collect();
    let mut faults = Vec::new();
    for (name, shape) in wanted.iter().filter(|(name, _)| !absent.contains(name)) {
        if !checkpoint.contains(name) {
            faults.push(format!("`{name}` {shape:?} is missing"));
        } else {
            let info = checkpoint.info(name)?;
            if is_packed(&checkpoint, name) {
                match packed_weight(&checkpoint, name) {
                    Ok(packed) if packed.shape[..] == shape[..] => {}
                    Ok(packed) => {
                        faults.push(format!("`{name}` is {:?} packed, the config asks for {shape:?}", packed.shape));
                    }
                    Err(e) => faults.push(e.to_string()),
                }
                continue;
            }
            if info.shape != *shape {
                faults.push(format!("`{name}` is {:?}, the config asks for {shape:?}", info.shape));
            } else if !matches!(info.kind, Kind::Float | Kind::BFloat16 | Kind::Half | Kind::Double) {
                faults.push(format!("`{name}` is {}, not a floating-point dtype", lora_torch::kind_name(info.kind)));
            }
        }
    }
    let known: BTreeSet<&str> = wanted.iter().map(|(n, _)| n.as_str()).collect();
    for name in checkpoint.names() {
        // Tables and masks that old checkpoints carry and everyone computes, and the stored copy of a tied head.
        let computed =
            ["rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias"];
        let tied_head = config.tie_word_embeddings && name.strip_suffix(".weight") == Some(config.layout.lm_head);
        // What a classifier leaves of the model that it is made from.
        let other_head = config.labels.is_some()
            && (["cls.", "lm_head.", "roberta.pooler."].iter().any(|start| name.starts_with(start))
                || name.ends_with("embeddings.position_ids")
                || name.strip_suffix(".weight") == Some(config.layout.lm_head));
        let harmless = tied_head || other_head || is_part(name) || computed.iter().any(|end| name.ends_with(end));
        if !known.contains(name) && !harmless {
            faults.push(format!(
                "`{name}` {:?} is not part of a {} model of this config",
                checkpoint.info(name)?.shape,
                config.family
            ));
        }
    }
    const SHOWN: usize = 12;
    if faults.len() > SHOWN {
        let more = faults.len() - SHOWN;
        faults.truncate(SHOWN);
        faults.push(format!("and {more} more"));
    }
    if faults.is_empty() { Ok(()) } else { Err(Error::Weights { dir: dir.into(), faults }) }
}
