//! From a checkpoint folder, or from a seed, to a decoder; and back to a checkpoint.

use crate::block::Block;
use crate::config::ModelConfig;
use crate::decoder::{Decoder, ModuleRef};
use crate::error::{Error, Result};
use crate::names::{EMBED_TOKENS, FINAL_NORM, LM_HEAD, ModuleKind, checkpoint_tensors, in_block, modules};
use lora_core::{EmbeddingLayer, LinearLayer};
use lora_format::{Checkpoint, write_tensors};
use lora_torch::mix_seed;
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
        let std = config.initializer_range;
        let norms: BTreeSet<String> = modules(&config)
            .into_iter()
            .filter(|m| m.kind == ModuleKind::Norm)
            .map(|m| format!("{}.weight", m.path))
            .collect();
        Self::assemble(config, |name, shape| {
            let on = (Kind::Float, Device::Cpu);
            let t = if norms.contains(name) {
                Tensor::f_ones(shape, on)?
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
        let shapes: BTreeMap<String, Vec<i64>> = modules(&config).iter().flat_map(|m| m.tensors()).collect();
        let mut tensor =
            |name: String| -> Result<Option<Tensor>> { shapes.get(&name).map(|shape| get(&name, shape)).transpose() };
        let absent = |name: &str| Error::Module { module: name.into(), reason: "is not in the module table".into() };
        let mut weight = |path: &str| tensor(format!("{path}.weight"))?.ok_or_else(|| absent(path));
        let embed_tokens = EmbeddingLayer::frozen(weight(EMBED_TOKENS)?);
        let mut blocks = Vec::with_capacity(config.windows.len());
        for (i, &window) in config.windows.iter().enumerate() {
            let mut linear = |name: &str| -> Result<LinearLayer> {
                let path = in_block(i, name);
                let weight = tensor(format!("{path}.weight"))?.ok_or_else(|| absent(&path))?;
                Ok(LinearLayer::frozen(weight, tensor(format!("{path}.bias"))?)?)
            };
            let (q_proj, k_proj, v_proj) =
                (linear("self_attn.q_proj")?, linear("self_attn.k_proj")?, linear("self_attn.v_proj")?);
            let o_proj = linear("self_attn.o_proj")?;
            let (gate_proj, up_proj, down_proj) =
                (linear("mlp.gate_proj")?, linear("mlp.up_proj")?, linear("mlp.down_proj")?);
            let mut norm = |name: &str| tensor(format!("{}.weight", in_block(i, name)));
            let (q_norm, k_norm) = (norm("self_attn.q_norm")?, norm("self_attn.k_norm")?);
            let input_layernorm = norm("input_layernorm")?.ok_or_else(|| absent("input_layernorm"))?;
            let post_attention_layernorm =
                norm("post_attention_layernorm")?.ok_or_else(|| absent("post_attention_layernorm"))?;
            blocks.push(Block {
                input_layernorm,
                q_proj,
                k_proj,
                v_proj,
                q_norm,
                k_norm,
                o_proj,
                post_attention_layernorm,
                gate_proj,
                up_proj,
                down_proj,
                window,
            });
        }
        let mut weight = |path: &str| tensor(format!("{path}.weight"))?.ok_or_else(|| absent(path));
        let norm = weight(FINAL_NORM)?;
        let head = if config.tie_word_embeddings { embed_tokens.weight.shallow_clone() } else { weight(LM_HEAD)? };
        let lm_head = LinearLayer::frozen(head, None)?;
        Ok(Self { config, embed_tokens, blocks, norm, lm_head, lora_dropout: 0.0 })
    }

    /// Writes the base weights as `model.safetensors`, under the names of the checkpoint.
    ///
    /// # Errors
    /// [`Error::Format`] when the file cannot be written.
    pub fn save_weights(&self, dir: &Path) -> Result<()> {
        let mut tensors = Vec::new();
        for (path, module) in self.modules() {
            let mut add = |part: &str, t: &Tensor| tensors.push((format!("{path}.{part}"), t.shallow_clone()));
            match module {
                ModuleRef::Embedding(e) => add("weight", &e.weight),
                ModuleRef::Norm(w) => add("weight", w),
                ModuleRef::Linear(_) if path == LM_HEAD && self.config.tie_word_embeddings => {}
                ModuleRef::Linear(l) => {
                    add("weight", &l.weight);
                    if let Some(bias) = &l.bias {
                        add("bias", bias);
                    }
                }
            }
        }
        Ok(write_tensors(&dir.join("model.safetensors"), &tensors, &BTreeMap::from([("format".into(), "pt".into())]))?)
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
        // Tables that old checkpoints carry and everyone computes, and the stored copy of a tied head.
        let harmless =
            name.ends_with("rotary_emb.inv_freq") || (config.tie_word_embeddings && name == "lm_head.weight");
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
