//! From a checkpoint folder, or from a seed, to a decoder; and back to a checkpoint.

use crate::block::{Block, Qkv};
use crate::config::ModelConfig;
use crate::decoder::{Decoder, ModuleRef};
use crate::error::{Error, Result};
use crate::layout::{MlpLayout, NormKind, QkvLayout};
use crate::mlp::{Gated, Mlp};
use crate::names::{ModuleKind, ModuleSpec, checkpoint_tensors, modules};
use crate::norm::NormLayer;
use crate::stacked::StackedAdapters;
use crate::tokens::TokenAdapters;
use lora_core::{EmbeddingLayer, LinearLayer};
use lora_format::{Checkpoint, write_tensors};
use lora_torch::{AttentionRule, mix_seed};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
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
        check_weights(dir, &config)?;
        let checkpoint = Checkpoint::open(dir)?;
        let (mut done, all) = (0, checkpoint.total_bytes());
        Self::assemble(config, |name, _| {
            let t = checkpoint.read(name)?;
            done += (t.numel() * lora_torch::kind_bytes(t.kind())) as u64;
            progress(done.min(all), all);
            Ok(t.f_to_device(device)?.f_to_kind(kind)?.f_contiguous()?)
        })
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
        Self::assemble(config, |name, shape| {
            let on = (Kind::Float, Device::Cpu);
            let t = if norms.contains(name) {
                if plus_one { Tensor::f_zeros(shape, on)? } else { Tensor::f_ones(shape, on)? }
            } else if name.ends_with(".bias") {
                Tensor::f_zeros(shape, on)?
            } else {
                lora_torch::manual_seed(mix_seed(&[seed, path_seed(name)]));
                Tensor::f_randn(shape, on)?.f_mul_scalar(std)?
            };
            Ok(t.f_to_device(device)?)
        })
    }

    fn assemble(config: ModelConfig, mut get: impl FnMut(&str, &[i64]) -> Result<Tensor>) -> Result<Self> {
        let specs: BTreeMap<String, ModuleSpec> = modules(&config).into_iter().map(|m| (m.path.clone(), m)).collect();
        let mut parts = Parts { specs: &specs, config: &config, get: &mut get };
        let layout = config.layout;
        let embed_tokens = EmbeddingLayer::frozen(parts.weight(layout.embed_tokens)?);
        let embed_positions =
            layout.embed_positions.map(|path| parts.weight(path).map(EmbeddingLayer::frozen)).transpose()?;
        let blocks = (0..config.windows.len()).map(|i| parts.block(i)).collect::<Result<_>>()?;
        let norm = parts.norm(layout.final_norm)?;
        let head = if config.tie_word_embeddings {
            embed_tokens.weight.shallow_clone()
        } else {
            parts.weight(layout.lm_head)?
        };
        let lm_head = LinearLayer::frozen(head, None)?;
        Ok(Self {
            embed_tokens,
            embed_positions,
            blocks,
            norm,
            lm_head,
            lora_dropout: 0.0,
            tokens: TokenAdapters::default(),
            config,
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
                ModuleRef::Embedding(e) => (&e.weight, None),
                ModuleRef::Norm(n) => (&n.weight, n.bias.as_ref()),
                ModuleRef::Linear(_) if path == self.config.layout.lm_head && self.config.tie_word_embeddings => {
                    continue;
                }
                ModuleRef::Linear(l) => (&l.weight, l.bias.as_ref()),
            };
            let as_stored = if transposed.contains(&path) { weight.f_tr()? } else { weight.shallow_clone() };
            add("weight", as_stored.f_contiguous()?);
            if let Some(bias) = bias {
                add("bias", bias.shallow_clone());
            }
        }
        Ok(write_tensors(&dir.join("model.safetensors"), &tensors, &BTreeMap::from([("format".into(), "pt".into())]))?)
    }
}

/// Makes layers from tensors that `get` gives by name and shape.
struct Parts<'a> {
    specs: &'a BTreeMap<String, ModuleSpec>,
    config: &'a ModelConfig,
    get: &'a mut dyn FnMut(&str, &[i64]) -> Result<Tensor>,
}

impl Parts<'_> {
    fn spec(&self, path: &str) -> Result<&ModuleSpec> {
        let absent = || Error::Module { module: path.into(), reason: "is not in the module table".into() };
        self.specs.get(path).ok_or_else(absent)
    }

    fn weight(&mut self, path: &str) -> Result<Tensor> {
        let shape = self.spec(path)?.weight_shape();
        (self.get)(&format!("{path}.weight"), &shape)
    }

    fn bias(&mut self, path: &str) -> Result<Option<Tensor>> {
        let spec = self.spec(path)?;
        let (wanted, width) = (spec.bias, spec.out_features);
        wanted.then(|| (self.get)(&format!("{path}.bias"), &[width])).transpose()
    }

    /// A linear layer; one that is stored transposed is turned, without a copy.
    fn linear(&mut self, path: &str) -> Result<LinearLayer> {
        let (weight, transposed) = (self.weight(path)?, self.spec(path)?.transposed);
        let weight = if transposed { weight.f_tr()? } else { weight };
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
        let rule = AttentionRule { scale: c.attention_scales[i], window: c.windows[i], softcap: c.attention_softcap };
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
    let mut faults = Vec::new();
    for (name, shape) in &wanted {
        if !checkpoint.contains(name) {
            faults.push(format!("`{name}` {shape:?} is missing"));
        } else {
            let info = checkpoint.info(name)?;
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
        let harmless = tied_head || computed.iter().any(|end| name.ends_with(end));
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
