//! A model, with adapters merged into it or alone, as a GGUF file of llama.cpp; an adapter as one that is loaded beside it.

mod arch;
mod encode;
mod k_quants;
mod metadata;
mod mixture;
mod vocab;

use crate::change::blocks;
use crate::error::{Error, Result};
use crate::plain::{input_of, plain};
use crate::plan::{Plan, began_as};
use arch::{Arch, Part, Transform, refuse};
use encode::encode;
use lora_core::LoraSpec;
use lora_format::{
    AdapterModule, Checkpoint, GgufTensor, GgufType, GgufValue, GgufWriter, HfConfig, LoraTensors, names_classifier,
    read_adapter, read_hf_config, read_json_object,
};
pub use mixture::GgufFileType;
use mixture::Sizes;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// What a file came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufReport {
    /// Its tensors.
    pub tensors: usize,
    /// The bytes of all of them.
    pub bytes: u64,
    /// How many tensors each type has.
    pub types: BTreeMap<&'static str, usize>,
    /// Those whose rows have no form in the type that they were meant to have.
    pub fallbacks: Vec<GgufFallback>,
    /// What llama.cpp does otherwise with this model, for people.
    pub notes: Vec<String>,
}

/// A tensor in another type than it was meant to have, because its rows are no multiple of the type's block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufFallback {
    /// Its name in GGUF.
    pub tensor: String,
    /// The type that it was meant to have.
    pub wanted: GgufType,
    /// The type that it has: llama.cpp's choice.
    pub stored: GgufType,
}

/// A tensor of the file, and the tensors of the checkpoint that it is made of: one, or one for each expert.
struct Planned {
    name: String,
    sources: Vec<String>,
    transform: Transform,
    shape: Vec<i64>,
}

/// Writes a base, with adapters merged into it where there are any, as one GGUF file with tokenizer and chat template.
///
/// Matrices are stored as `kind` says; vectors as float32. With `Q4_0`, embedding and head are `Q8_0`, which suffer most; the
/// mixtures and `Q6_K` follow llama.cpp's rules by layer. A matrix whose rows a type cannot hold gets the one that llama.cpp
/// takes for it, and is reported. Memory holds the largest tensor twice, of experts the file's form of all and one of them
/// twice. `progress` hears the bytes written so far and in all.
///
/// # Errors
/// [`Error::Gguf`] for a family, a setting or a tokenizer that llama.cpp computes otherwise or does not know;
/// [`Error::Overflow`] for values that the type cannot hold; as [`merge`](crate::merge()) for adapters and files.
pub fn export_gguf(
    base: &Path,
    adapters: &[PathBuf],
    out: &Path,
    kind: GgufFileType,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<GgufReport> {
    let file = base.join("config.json");
    let (hf, raw) = (read_hf_config(base)?, read_json_object(&file)?);
    let arch = Arch::of(&file, &hf.model_type)?;
    let checkpoint = Checkpoint::open_unpacked(base)?;
    let plan = if adapters.is_empty() { None } else { Some(Plan::make(&checkpoint, &raw, adapters)?) };
    if names_classifier(&hf.architectures) || plan.as_ref().is_some_and(|p| p.labels.is_some()) {
        return Err(refuse(&file, "a classifier has no language head, and its own has no form in GGUF here".into()));
    }
    let facts = metadata::metadata(&arch, &hf, &file)?;
    let mut metadata = vec![
        ("general.architecture".to_string(), GgufValue::Text(arch.name.into())),
        ("general.name".to_string(), GgufValue::Text(name_of(base))),
        ("general.file_type".to_string(), GgufValue::U32(kind.id())),
        ("general.quantization_version".to_string(), GgufValue::U32(2)),
    ];
    metadata.extend(facts.list);
    metadata.extend(vocab::metadata(base, &hf)?);

    let mut fallbacks = Vec::new();
    let parts = lay_out(&arch, &hf, &checkpoint, plan.as_ref(), &file, facts.experts)?;
    let has_head = parts.iter().any(|part| part.name == "output.weight");
    let sizes = Sizes {
        layers: hf.num_hidden_layers,
        experts: facts.experts,
        tied: !has_head,
        llama_70b: arch.name == "llama"
            && hf.num_hidden_layers == 80
            && hf.num_attention_heads != hf.num_key_value_heads,
    };
    let mut tensors = Vec::new();
    for Planned { name, shape, .. } in &parts {
        let (wanted, stored) = kind.of(name, shape, &sizes);
        if wanted != stored {
            fallbacks.push(GgufFallback { tensor: name.clone(), wanted, stored });
        }
        tensors.push(GgufTensor { name: name.clone(), shape: shape.clone(), kind: stored });
    }
    let factors = metadata::rope_factors(&hf);
    tensors.extend(factors.as_ref().map(|f| GgufTensor {
        name: "rope_freqs.weight".into(),
        shape: vec![f.len() as i64],
        kind: GgufType::F32,
    }));
    let bytes = tensors.iter().map(GgufTensor::bytes).sum();
    let mut writer = GgufWriter::create(out, &metadata, &tensors)?;
    let mut done = 0;
    progress(0, bytes);
    for (Planned { sources, transform, .. }, tensor) in parts.iter().zip(&tensors) {
        let mut encoded = Vec::with_capacity(tensor.bytes() as usize);
        for name in sources {
            let whole = read_whole(name, &checkpoint, plan.as_ref())?;
            encoded.extend(encode(name, &apply(name, &whole, *transform)?, tensor.kind)?);
        }
        writer.put(&tensor.name, &encoded)?;
        done += tensor.bytes();
        progress(done, bytes);
    }
    if let Some(factors) = factors {
        let flat: Vec<u8> = factors.iter().flat_map(|f| f.to_le_bytes()).collect();
        writer.put("rope_freqs.weight", &flat)?;
        progress(bytes, bytes);
    }
    writer.finish()?;
    Ok(GgufReport { tensors: tensors.len(), bytes, types: count_types(&tensors), fallbacks, notes: facts.notes })
}

/// Every tensor of the file: its name, what it is made of, what is done to that, and its shape.
fn lay_out(
    arch: &Arch,
    hf: &HfConfig,
    checkpoint: &Checkpoint,
    plan: Option<&Plan>,
    file: &Path,
    experts: i64,
) -> Result<Vec<Planned>> {
    let untied = plan.and_then(|p| p.untied);
    let mut names: Vec<String> = checkpoint.names().map(String::from).collect();
    names.extend(untied.filter(|pair| !checkpoint.contains(pair.head)).map(|pair| pair.head.to_string()));
    let tied = hf.tie_word_embeddings && untied.is_none();
    // A head that is stored beside the embedding it is tied to is a copy.
    names.retain(|n| !(tied && (n == "lm_head.weight" || arch.own_head == Some(n.as_str()))));
    let mut parts = Vec::new();
    let mut slices: BTreeMap<String, BTreeMap<usize, String>> = BTreeMap::new();
    for name in names {
        let Some(Part { name: gguf, transform, expert }) = arch.part(hf, &name) else {
            let skipped = ["rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "masked_bias"];
            if skipped.iter().any(|end| name.ends_with(end)) {
                continue;
            }
            return Err(refuse(file, format!("tensor `{name}` has no name in GGUF for {}", arch.name)));
        };
        if let Some(expert) = expert {
            slices.entry(gguf).or_default().insert(expert, name);
            continue;
        }
        let source = if checkpoint.contains(&name) { name.clone() } else { source_of(plan, &name) };
        let mut shape = checkpoint.info(&source)?.shape.clone();
        if transform == Transform::Transpose {
            shape.reverse();
        }
        if gguf == "token_embd.weight" && tied && arch.own_head.is_some() {
            let (head, sources) = ("output.weight".into(), vec![name.clone()]);
            parts.push(Planned { name: head, sources, transform, shape: shape.clone() });
        }
        parts.push(Planned { name: gguf, sources: vec![name], transform, shape });
    }
    for (gguf, slices) in slices {
        let first = slices.values().next().map(|name| checkpoint.info(name)).transpose()?;
        let shape = first.map(|info| info.shape.clone()).unwrap_or_default();
        let all = slices.keys().copied().eq(0..experts as usize);
        let mut same = true;
        for name in slices.values() {
            same &= checkpoint.info(name)?.shape == shape;
        }
        if !all || !same {
            let why = format!("`{gguf}` is not made of {experts} experts of one shape; the checkpoint is not whole");
            return Err(refuse(file, why));
        }
        let (shape, sources) = ([vec![experts], shape].concat(), slices.into_values().collect());
        parts.push(Planned { name: gguf, sources, transform: Transform::Keep, shape });
    }
    Ok(parts)
}

fn count_types(tensors: &[GgufTensor]) -> BTreeMap<&'static str, usize> {
    let mut types = BTreeMap::new();
    tensors.iter().for_each(|t| *types.entry(t.kind.name()).or_default() += 1);
    types
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
    let folder = plain(read_adapter(adapter)?, &|module, out| {
        let (checkpoint, weight) = (Checkpoint::open_unpacked(base)?, format!("{module}.weight"));
        let shape = if checkpoint.contains(&weight) { &checkpoint.info(&weight)?.shape[..] } else { &[] };
        let misfit = || refuse(adapter, format!("`{module}` with {out} outputs is not in the base model"));
        input_of(shape, out).ok_or_else(misfit)
    })?;
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
        let unconverted = began_as(config).is_some() || config.loftq_iterations().is_some();
        let Some(LoraTensors { a, b, .. }) = plain.filter(|_| !unconverted) else {
            return Err(refuse(
                adapter,
                format!("`{module}` has more than a low-rank update of a linear layer; {merge}"),
            ));
        };
        let name = format!("{module}.weight");
        let Some(Part { name: gguf, transform, expert: None }) = arch.part(&hf, &name) else {
            return Err(refuse(
                adapter,
                format!("`{module}` has no name of its own in GGUF for {}; {merge}", arch.name),
            ));
        };
        let fail = |e: lora_core::Error| Error::merge(&name, e);
        let r = config.rank_of(module)?;
        let spec = LoraSpec::new(r, config.alpha_of(module)?, config.use_rslora).map_err(fail)?;
        let own = spec.scale() * r as f64 / alpha;
        let b = b.f_mul_scalar(own).map_err(|e| Error::merge(&name, e))?;
        // The rows of B are those of the weight; a transposed weight has an adapter like any other's.
        let b = match transform {
            Transform::Pairs { .. } | Transform::PerHead { .. } => apply(&name, &b, transform)?,
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
        ("general.file_type", GgufValue::U32(GgufFileType::Plain(kind).id())),
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
    let (fallbacks, notes) = (Vec::new(), Vec::new());
    Ok(GgufReport { tensors: tensors.len(), bytes, types: count_types(&tensors), fallbacks, notes })
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
        Transform::PerHead { heads } => {
            let size = t.size();
            let mut split = vec![heads, 3, size[0] / heads / 3];
            split.extend(&size[1..]);
            t.f_reshape(split.as_slice()).and_then(|t| t.f_transpose(0, 1)).and_then(|t| t.f_reshape(size.as_slice()))
        }
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
