//! A model, with adapters merged into it or alone, as a GGUF file of llama.cpp; an adapter as one that is loaded beside it.

mod arch;
mod encode;
mod vocab;

use crate::change::blocks;
use crate::error::{Error, Result};
use crate::plan::{Plan, began_as};
use arch::{Arch, Transform, refuse};
use encode::encode;
use lora_core::LoraSpec;
use lora_format::{
    AdapterModule, Checkpoint, GGUF_BLOCK, GgufTensor, GgufType, GgufValue, GgufWriter, LoraTensors, names_classifier,
    read_adapter, read_hf_config, read_json_object,
};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// What a file came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufReport {
    /// Its tensors.
    pub tensors: usize,
    /// The bytes of all of them.
    pub bytes: u64,
    /// Those that could not be stored in the type asked for, because their rows are no multiple of 32: they are float16.
    pub wider: Vec<String>,
}

/// Writes a base, with adapters merged into it where there are any, as one GGUF file with tokenizer and chat template.
///
/// Matrices are stored as `kind`; vectors as float32; with `Q4_0`, embedding and head as `Q8_0`, which suffer most. Memory
/// holds the largest tensor twice. `progress` hears the bytes written so far and in all.
///
/// # Errors
/// [`Error::Gguf`] for a family, a setting or a tokenizer that llama.cpp computes otherwise or does not know; as
/// [`merge`](crate::merge()) for adapters and files.
pub fn export_gguf(
    base: &Path,
    adapters: &[PathBuf],
    out: &Path,
    kind: GgufType,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<GgufReport> {
    let file = base.join("config.json");
    let (hf, raw) = (read_hf_config(base)?, read_json_object(&file)?);
    let arch = Arch::of(&file, &hf.model_type)?;
    let checkpoint = Checkpoint::open(base)?;
    let plan = if adapters.is_empty() { None } else { Some(Plan::make(&checkpoint, &raw, adapters)?) };
    if names_classifier(&hf.architectures) || plan.as_ref().is_some_and(|p| p.labels.is_some()) {
        return Err(refuse(&file, "a classifier has no language head, and its own has no form in GGUF here".into()));
    }
    let mut metadata = vec![
        ("general.architecture".to_string(), GgufValue::Text(arch.name.into())),
        ("general.name".to_string(), GgufValue::Text(name_of(base))),
        ("general.file_type".to_string(), GgufValue::U32(file_type(kind))),
        ("general.quantization_version".to_string(), GgufValue::U32(2)),
    ];
    metadata.extend(arch.metadata(&hf, &file)?);
    metadata.extend(vocab::metadata(base, &hf)?);

    let untied = plan.as_ref().and_then(|p| p.untied);
    let mut names: Vec<String> = checkpoint.names().map(String::from).collect();
    names.extend(untied.filter(|pair| !checkpoint.contains(pair.head)).map(|pair| pair.head.to_string()));
    // A head that is stored beside the embedding it is tied to is a copy.
    names.retain(|n| !(hf.tie_word_embeddings && untied.is_none() && n == "lm_head.weight"));
    let mut parts = Vec::new();
    let mut wider = Vec::new();
    for name in names {
        let Some((gguf, transform)) = arch.name(&hf, &name) else {
            if ["rotary_emb.inv_freq", "attn.bias", "attn.masked_bias"].iter().any(|end| name.ends_with(end)) {
                continue;
            }
            return Err(refuse(&file, format!("tensor `{name}` has no name in GGUF for {}", arch.name)));
        };
        let source = if checkpoint.contains(&name) { name.clone() } else { source_of(plan.as_ref(), &name) };
        let mut shape = checkpoint.info(&source)?.shape.clone();
        if transform == Transform::Transpose {
            shape.reverse();
        }
        let stored = stored_kind(&gguf, &shape, kind);
        if stored != kind && stored == GgufType::F16 {
            wider.push(gguf.clone());
        }
        parts.push((name, transform, GgufTensor { name: gguf, shape, kind: stored }));
    }
    let factors = Arch::rope_factors(&hf);
    let mut tensors: Vec<GgufTensor> = parts.iter().map(|(_, _, t)| t.clone()).collect();
    tensors.extend(factors.as_ref().map(|f| GgufTensor {
        name: "rope_freqs.weight".into(),
        shape: vec![f.len() as i64],
        kind: GgufType::F32,
    }));
    let bytes = tensors.iter().map(GgufTensor::bytes).sum();
    let mut writer = GgufWriter::create(out, &metadata, &tensors)?;
    let mut done = 0;
    progress(0, bytes);
    for (name, transform, tensor) in &parts {
        let whole = read_whole(name, &checkpoint, plan.as_ref())?;
        let turned = apply(name, &whole, *transform)?;
        writer.put(&tensor.name, &encode(name, &turned, tensor.kind)?)?;
        done += tensor.bytes();
        progress(done, bytes);
    }
    if let Some(factors) = factors {
        let flat: Vec<u8> = factors.iter().flat_map(|f| f.to_le_bytes()).collect();
        writer.put("rope_freqs.weight", &flat)?;
        progress(bytes, bytes);
    }
    writer.finish()?;
    Ok(GgufReport { tensors: tensors.len(), bytes, wider })
}

/// Writes an adapter as a GGUF file that llama.cpp loads beside the model's.
///
/// # Errors
/// [`Error::Gguf`] for a method that llama.cpp does not know (DoRA, biases, modules saved in full, unconverted PiSSA and
/// OLoRA) or a family without a GGUF form; as [`merge`](crate::merge()) for files.
pub fn export_gguf_lora(base: &Path, adapter: &Path, out: &Path, kind: GgufType) -> Result<GgufReport> {
    let file = base.join("config.json");
    let hf = read_hf_config(base)?;
    let arch = Arch::of(&file, &hf.model_type)?;
    let folder = read_adapter(adapter)?;
    let config = &folder.config;
    let merge = "merge it and export the model instead";
    if kind.is_blocked() {
        return Err(refuse(out, "an adapter is stored as f32, f16 or bf16".into()));
    }
    // One alpha for all: what a module's own scale differs by goes into its B.
    let alpha = config.r as f64;
    let mut parts: Vec<(GgufTensor, Tensor)> = Vec::new();
    for (module, content) in &folder.modules {
        let plain = match content {
            AdapterModule::Linear(lora) => Some(lora),
            _ => None,
        };
        let plain = plain.filter(|l| l.magnitude.is_none() && l.bias.is_none() && l.base_bias.is_none());
        let unconverted = began_as(config).is_some();
        let Some(LoraTensors { a, b, .. }) = plain.filter(|_| !unconverted) else {
            return Err(refuse(
                adapter,
                format!("`{module}` has more than a low-rank update of a linear layer; {merge}"),
            ));
        };
        let name = format!("{module}.weight");
        let Some((gguf, transform)) = arch.name(&hf, &name) else {
            return Err(refuse(adapter, format!("`{module}` has no name in GGUF for {}", arch.name)));
        };
        let fail = |e: lora_core::Error| Error::merge(&name, e);
        let r = config.rank_of(module)?;
        let spec = LoraSpec::new(r, config.alpha_of(module)?, config.use_rslora).map_err(fail)?;
        let own = spec.scale() * r as f64 / alpha;
        let b = b.f_mul_scalar(own).map_err(|e| Error::merge(&name, e))?;
        // The rows of B are those of the weight; a transposed weight has an adapter like any other's.
        let b = match transform {
            Transform::Pairs { .. } => apply(&name, &b, transform)?,
            _ => b,
        };
        for (part, tensor) in [("lora_a", a.shallow_clone()), ("lora_b", b)] {
            let info = GgufTensor { name: format!("{gguf}.{part}"), shape: tensor.size(), kind };
            parts.push((info, tensor));
        }
    }
    let metadata = [
        ("general.architecture", GgufValue::Text(arch.name.into())),
        ("general.type", GgufValue::Text("adapter".into())),
        ("general.name", GgufValue::Text(name_of(adapter))),
        ("general.file_type", GgufValue::U32(file_type(kind))),
        ("adapter.type", GgufValue::Text("lora".into())),
        ("adapter.lora.alpha", GgufValue::F32(alpha as f32)),
    ]
    .map(|(key, value)| (key.to_string(), value));
    let tensors: Vec<GgufTensor> = parts.iter().map(|(info, _)| info.clone()).collect();
    let mut writer = GgufWriter::create(out, &metadata, &tensors)?;
    for (info, tensor) in &parts {
        writer.put(&info.name, &encode(&info.name, tensor, kind)?)?;
    }
    writer.finish()?;
    let bytes = tensors.iter().map(GgufTensor::bytes).sum();
    Ok(GgufReport { tensors: tensors.len(), bytes, wider: Vec::new() })
}

/// llama.cpp's number of a mostly-so-stored file.
fn file_type(kind: GgufType) -> u32 {
    match kind {
        GgufType::F32 => 0,
        GgufType::F16 => 1,
        GgufType::Q4_0 => 2,
        GgufType::Q8_0 => 7,
        GgufType::BF16 => 32,
    }
}

/// Vectors, and tables that are added to others, stay float32, as llama.cpp adds them.
fn stored_kind(name: &str, shape: &[i64], kind: GgufType) -> GgufType {
    if shape.len() < 2 || name.starts_with("position_embd") {
        return GgufType::F32;
    }
    let kind = match kind {
        GgufType::Q4_0 if name.starts_with("token_embd") || name.starts_with("output.") => GgufType::Q8_0,
        kind => kind,
    };
    let fits = shape.last().is_some_and(|columns| columns % GGUF_BLOCK as i64 == 0);
    if kind.is_blocked() && !fits { GgufType::F16 } else { kind }
}

fn name_of(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.into());
    whole.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned())
}

fn source_of(plan: Option<&Plan>, name: &str) -> String {
    plan.and_then(|p| p.changes.get(name)).map_or_else(|| name.into(), |change| change.source.clone())
}

/// A tensor with the adapters in it, float32.
fn read_whole(name: &str, base: &Checkpoint, plan: Option<&Plan>) -> Result<Tensor> {
    let fail = |e: tch::TchError| Error::merge(name, e);
    let whole = match plan.and_then(|p| p.changes.get(name)) {
        None => base.read(name)?,
        Some(change) => {
            let shape = &base.info(&change.source)?.shape;
            let rows = blocks(shape).map(|(first, count)| change.rows(name, base, first, count));
            let rows = rows.collect::<Result<Vec<Tensor>>>()?;
            Tensor::f_cat(&rows, 0).and_then(|t| t.f_reshape(shape.as_slice())).map_err(fail)?
        }
    };
    whole.f_to_kind(Kind::Float).map_err(fail)
}

fn apply(name: &str, t: &Tensor, transform: Transform) -> Result<Tensor> {
    let turned = match transform {
        Transform::Keep => Ok(t.shallow_clone()),
        Transform::PlusOne => t.f_add_scalar(1.0),
        Transform::Transpose => t.f_tr(),
        Transform::Pairs { heads } => {
            let size = t.size();
            let half = size[0] / heads / 2;
            let mut split = vec![heads, 2, half];
            split.extend(&size[1..]);
            t.f_reshape(split.as_slice()).and_then(|t| t.f_transpose(1, 2)).and_then(|t| t.f_reshape(size.as_slice()))
        }
    };
    turned.and_then(|t| t.f_contiguous()).map_err(|e| Error::merge(name, e))
}
