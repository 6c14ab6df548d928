//! Several adapters made into one, on files.

use crate::error::{Error, Result};
use crate::orient::Orientation;
use crate::plain::{input_of, plain};
use crate::plan::began_as;
use lora_core::{
    Combination, LoftQ, Lora, LoraSpec, MixOptions, MixPart, cut_dense, error_of_mix, merge_lora, mix, padded, residual,
};
use lora_format::{
    AdapterConfig, AdapterFolder, AdapterModule, Checkpoint, InitLoraWeights, LoraTensors, TargetModules, read_adapter,
    read_json_object, write_adapter,
};
use lora_torch::Weight;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor, no_grad};

/// One adapter of a mix.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighted {
    /// Its folder.
    pub adapter: PathBuf,
    /// What its change of the model is multiplied by; may be negative.
    pub weight: f64,
}

/// What a mix made.
#[derive(Debug, Clone, PartialEq)]
pub struct MixReport {
    /// The rank of the result.
    pub rank: i64,
    /// The modules that it has an adapter for.
    pub modules: usize,
    /// The size of its weights.
    pub bytes: u64,
    /// `‖result - exact‖ / ‖exact‖` (Frobenius) over all modules together, where `exact` is the weighted sum of what each
    /// adapter really does to the weights.
    pub error: f64,
    /// The largest such error of one module, and which.
    pub worst: (f64, String),
}

/// Mixes adapters and writes the result to `out`, an adapter of scale 1 that every loader reads as a plain one.
///
/// Each adapter counts with the scale that it really has, whatever its convention (rsLoRA). One that is more than `B A`
/// (DoRA, or a PiSSA or OLoRA adapter that was not converted) is taken for the change that it makes to `base`, which has
/// to be given for it. Biases of B (`lora_bias`) are summed.
///
/// # Errors
/// [`Error::Format`] for a folder that cannot be read or written; [`Error::Mix`] for adapters that cannot be put together
/// in this way, with what would work.
pub fn mix_adapters(adapters: &[Weighted], base: Option<&Path>, options: &MixOptions, out: &Path) -> Result<MixReport> {
    if adapters.is_empty() {
        return Err(Error::NoAdapter);
    }
    let base = base.map(Base::open).transpose()?;
    let read =
        |a: &Weighted| plain(read_adapter(&a.adapter)?, &|module, out| input_width(a, base.as_ref(), module, out));
    let folders: Vec<AdapterFolder> = adapters.iter().map(read).collect::<Result<_>>()?;
    let config = joint_config(adapters, &folders)?;
    let names: BTreeSet<&String> = folders.iter().flat_map(|f| f.modules.keys()).collect();

    let mut modules = BTreeMap::new();
    let (mut rank, mut worst) = (1, (0.0, String::new()));
    let (mut squared_error, mut squared_size) = (0.0, 0.0);
    for (salt, name) in names.into_iter().enumerate() {
        let owners: Vec<(&Weighted, &AdapterFolder)> =
            adapters.iter().zip(&folders).filter(|(_, f)| f.modules.contains_key(name)).collect();
        if let Some(saved) = saved_whole(name, &owners)? {
            modules.insert(name.clone(), saved);
            continue;
        }
        let mixed = Mixed::of(name, &owners, base.as_ref(), options, salt as u64)?;
        rank = rank.max(mixed.tensors.a.size()[0]);
        squared_error += (mixed.error * mixed.size).powi(2);
        squared_size += mixed.size.powi(2);
        if mixed.error >= worst.0 {
            worst = (mixed.error, name.clone());
        }
        let content = if mixed.embedding {
            AdapterModule::Embedding(mixed.tensors)
        } else {
            AdapterModule::Linear(mixed.tensors)
        };
        modules.insert(name.clone(), content);
    }
    for (name, content) in &mut modules {
        let (AdapterModule::Linear(lora) | AdapterModule::Embedding(lora)) = content else { continue };
        (lora.a, lora.b) = padded(&lora.a, &lora.b, rank).map_err(|e| Error::merge(name, e))?;
        if config.lora_bias && lora.bias.is_none() {
            let zeros = Tensor::f_zeros([lora.b.size()[0]], (Kind::Float, tch::Device::Cpu));
            lora.bias = Some(zeros.map_err(|e| Error::merge(name, e))?);
        }
    }
    let config = AdapterConfig { r: rank, lora_alpha: rank as f64, ..config };
    write_adapter(out, &config, &modules)?;
    let weights = out.join(lora_format::ADAPTER_WEIGHTS);
    let bytes = std::fs::metadata(&weights).map_err(|e| Error::io("read", &weights, e))?.len();
    let error = if squared_error == 0.0 { 0.0 } else { (squared_error / squared_size).sqrt() };
    Ok(MixReport { rank, modules: modules.len(), bytes, error, worst })
}

/// One module of the result.
struct Mixed {
    tensors: LoraTensors,
    embedding: bool,
    /// Relative to the exact sum.
    error: f64,
    /// The norm of the exact sum.
    size: f64,
}

impl Mixed {
    fn of(
        name: &str,
        owners: &[(&Weighted, &AdapterFolder)],
        base: Option<&Base>,
        options: &MixOptions,
        salt: u64,
    ) -> Result<Self> {
        let fail = |e: lora_core::Error| Error::merge(name, e);
        let mut pairs = Vec::new();
        let (mut embedding, mut bias): (bool, Option<Tensor>) = (false, None);
        let mut base_weight = None;
        for (weighted, folder) in owners {
            let (lora, is_embedding) = match &folder.modules[name] {
                AdapterModule::Linear(lora) => (lora, false),
                AdapterModule::Embedding(lora) => (lora, true),
                // `plain` has left LoRA and modules in full.
                AdapterModule::Saved { .. } | AdapterModule::Vera(_) | AdapterModule::AdaLora(_) => {
                    return Err(refuse(
                        &weighted.adapter,
                        name,
                        "is saved in full by one adapter and low-rank in another",
                    ));
                }
                AdapterModule::Tokens(_) => {
                    let why = "has rows of tokens (trainable_token_indices), which take the place of others and have no sum; \
                               merge the adapters into the base one by one instead";
                    return Err(refuse(&weighted.adapter, name, why));
                }
                AdapterModule::Stacked(_) => {
                    let why = "is a stacked parameter (target_parameters), whose adapters have no common form to be mixed \
                               in; merge the adapters into the base one by one instead";
                    return Err(refuse(&weighted.adapter, name, why));
                }
            };
            if lora.base_bias.is_some() {
                return Err(refuse(
                    &weighted.adapter,
                    name,
                    "has a trained bias of the base, which cannot be weighted",
                ));
            }
            embedding = is_embedding;
            base_weight = lora.base_weight.as_ref().map(Tensor::shallow_clone).or(base_weight);
            let pair = Pair::of(name, weighted, folder, lora, base, options, is_embedding)?;
            if let Some(b) = &lora.bias {
                let term = b.f_mul_scalar(weighted.weight * pair.scale).map_err(|e| Error::merge(name, e))?;
                bias = Some(match bias {
                    Some(sum) => sum.f_add(&term).map_err(|e| Error::merge(name, e))?,
                    None => term,
                });
            }
            pairs.push((pair, weighted.weight));
        }
        let widths = |p: &Pair| (p.a.size()[1], p.b.size()[0]);
        if let Some((i, (pair, _))) = pairs.iter().enumerate().find(|(_, (p, _))| widths(p) != widths(&pairs[0].0)) {
            let ((i1, o1), (i2, o2)) = (widths(pair), widths(&pairs[0].0));
            let why = format!(
                "goes from {i1} to {o1} here and from {i2} to {o2} in the first adapter; they belong to different models"
            );
            return Err(refuse(&owners[i].0.adapter, name, &why));
        }
        let ranks = |p: &Pair| p.a.size()[0];
        if options.combination.needs_one_rank()
            && let Some((i, other)) = pairs.iter().enumerate().find(|(_, (p, _))| ranks(p) != ranks(&pairs[0].0))
        {
            let why = format!(
                "has rank {} here and {} in the first adapter, and A and B can only be summed where they are alike; use cat \
                 or svd",
                ranks(&other.0),
                ranks(&pairs[0].0)
            );
            return Err(refuse(&owners[i].0.adapter, name, &why));
        }
        let parts: Vec<MixPart<'_>> = pairs
            .iter()
            .map(|(pair, weight)| MixPart { a: &pair.a, b: &pair.b, scale: pair.scale, weight: *weight })
            .collect();
        let (a, b) = mix(&parts, options, salt).map_err(fail)?;
        let (error, size) = error_of_mix(&a, &b, &parts).map_err(fail)?;
        let tensors = LoraTensors { bias, base_weight, ..LoraTensors::new(a, b) };
        Ok(Self { tensors, embedding, error, size })
    }
}

/// What an adapter does to a module, as a product.
struct Pair {
    a: Tensor,
    b: Tensor,
    scale: f64,
}

impl Pair {
    fn of(
        name: &str,
        weighted: &Weighted,
        folder: &AdapterFolder,
        lora: &LoraTensors,
        base: Option<&Base>,
        options: &MixOptions,
        embedding: bool,
    ) -> Result<Self> {
        let fail = |e: lora_core::Error| Error::merge(name, e);
        let config = &folder.config;
        let spec = LoraSpec::new(config.rank_of(name)?, config.alpha_of(name)?, config.use_rslora).map_err(fail)?;
        let began = began_as(config);
        let loftq = config.loftq_iterations().map(|iterations| LoftQ { iterations });
        if lora.magnitude.is_none() && began.is_none() && loftq.is_none() {
            return Ok(Self { a: lora.a.shallow_clone(), b: lora.b.shallow_clone(), scale: spec.scale() });
        }
        let more = match (&lora.magnitude, loftq) {
            (Some(_), _) => "a DoRA adapter",
            (None, Some(_)) => "an adapter that began by LoftQ",
            (None, None) => "an unconverted PiSSA or OLoRA adapter",
        };
        if options.combination.needs_one_rank() || options.combination == Combination::Cat {
            let why =
                format!("is part of {more}, whose change has no low rank; use svd or another type that ends in svd");
            return Err(refuse(&weighted.adapter, name, &why));
        }
        let Some(base) = base else {
            let why = format!("is part of {more}, whose change depends on the base; give the base with --model");
            return Err(refuse(&weighted.adapter, name, &why));
        };
        let weight = base.weight(name, config, lora, embedding)?;
        let dense = no_grad(|| -> lora_core::Result<Tensor> {
            let start = began.map(|p| p.start(&weight, spec, 0)).transpose()?;
            let own = Lora::from_parts(lora.a.shallow_clone(), lora.b.shallow_clone(), spec.scale())?;
            let own = own.with_vectors(None, lora.magnitude.as_ref().map(Tensor::shallow_clone))?;
            let under = match (&start, loftq) {
                (Some(start), _) => Some(residual(&weight, start)?),
                (None, Some(loftq)) => Some(Weight::Nf4(loftq.base(&weight, spec.r())?).dense()?),
                (None, None) => None,
            };
            let merged = merge_lora(under.as_ref().unwrap_or(&weight), &own)?;
            Ok(merged.f_sub(&weight)?.f_to_kind(Kind::Float)?)
        })
        .map_err(fail)?;
        let full = dense.size()[0].min(dense.size()[1]);
        let (a, b) = cut_dense(&dense, full).map_err(fail)?;
        // The bias of B keeps its own scale, and only it: DoRA has none.
        Ok(Self { a, b, scale: 1.0 })
    }
}

/// The base model, for adapters whose change depends on it.
struct Base {
    checkpoint: Checkpoint,
    orientation: Orientation,
}

impl Base {
    fn open(dir: &Path) -> Result<Self> {
        let config = read_json_object(&dir.join("config.json"))?;
        let checkpoint = Checkpoint::open_unpacked(dir)?;
        let orientation = Orientation::new(&checkpoint, &config);
        Ok(Self { checkpoint, orientation })
    }

    /// The weight as `[out, in]`, fp32; of an embedding as `[dim, vocab]`.
    fn weight(&self, module: &str, config: &AdapterConfig, lora: &LoraTensors, embedding: bool) -> Result<Tensor> {
        let name = format!("{module}.weight");
        let stored = match &lora.base_weight {
            Some(weight) => weight.shallow_clone(),
            None => self.checkpoint.read(&self.orientation.source(&name))?,
        };
        let turned = embedding || self.orientation.is_transposed(&self.checkpoint, config, &name, &lora.a, &lora.b);
        let weight = if turned { stored.f_tr() } else { Ok(stored) };
        weight.and_then(|w| w.f_to_kind(Kind::Float)).map_err(|e| Error::merge(&name, e))
    }
}

/// How wide the input of a module is, which VeRA's files do not say.
fn input_width(weighted: &Weighted, base: Option<&Base>, module: &str, out: i64) -> Result<i64> {
    let Some(base) = base else {
        let why = "is VeRA's, whose files do not say how wide a layer's input is; give the base with --model";
        return Err(refuse(&weighted.adapter, module, why));
    };
    let source = base.orientation.source(&format!("{module}.weight"));
    if !base.checkpoint.contains(&source) {
        return Err(refuse(&weighted.adapter, module, "is not in the base model"));
    }
    let shape = &base.checkpoint.info(&source)?.shape;
    input_of(shape, out).ok_or_else(|| {
        let why = format!("gives {out} outputs here, and its weight in the base is {shape:?}");
        refuse(&weighted.adapter, module, &why)
    })
}

/// A module that one adapter alone has, in full, and that counts as it is.
fn saved_whole(name: &str, owners: &[(&Weighted, &AdapterFolder)]) -> Result<Option<AdapterModule>> {
    let saved = |f: &AdapterFolder| matches!(f.modules[name], AdapterModule::Saved { .. });
    let Some((weighted, folder)) = owners.iter().find(|(_, f)| saved(f)) else { return Ok(None) };
    if owners.len() > 1 || weighted.weight != 1.0 {
        let why = "is saved in full, and can be taken over only from one adapter of weight 1; merge the adapters into the \
                   base one by one instead";
        return Err(refuse(&weighted.adapter, name, why));
    }
    let AdapterModule::Saved { tensors } = &folder.modules[name] else { return Ok(None) };
    Ok(Some(AdapterModule::Saved { tensors: tensors.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect() }))
}

/// The configuration of the result but for its rank. Targets are joined where they are lists that mean the same modules in
/// every adapter, and are the modules' paths otherwise.
fn joint_config(adapters: &[Weighted], folders: &[AdapterFolder]) -> Result<AdapterConfig> {
    let first = &folders[0].config;
    let filters = |c: &AdapterConfig| {
        (c.layers_to_transform.clone(), c.layers_pattern.clone(), c.exclude_modules.clone(), c.target_modules.clone())
    };
    let same = folders.iter().all(|f| filters(&f.config) == filters(first));
    let plain = |c: &AdapterConfig| c.layers_to_transform.is_none() && c.exclude_modules.is_none();
    let lists: Option<Vec<&Vec<String>>> = folders
        .iter()
        .map(|f| match &f.config.target_modules {
            Some(TargetModules::List(names)) if plain(&f.config) => Some(names),
            _ => None,
        })
        .collect();
    let low_rank = |f: &AdapterFolder| {
        let is = |m: &AdapterModule| !matches!(m, AdapterModule::Saved { .. });
        f.modules.iter().filter(|(_, m)| is(m)).map(|(name, _)| name.clone()).collect::<BTreeSet<String>>()
    };
    let config = AdapterConfig {
        rank_pattern: Vec::new(),
        alpha_pattern: Vec::new(),
        use_rslora: false,
        use_dora: false,
        lora_bias: folders.iter().any(|f| f.config.lora_bias),
        bias: "none".into(),
        lora_dropout: 0.0,
        init_lora_weights: InitLoraWeights::Default,
        modules_to_save: joined(folders.iter().filter_map(|f| f.config.modules_to_save.as_ref())),
        ..first.clone()
    };
    if let Some(other) = folders.iter().zip(adapters).find(|(f, _)| f.config.bias != "none") {
        return Err(refuse(&other.1.adapter, "bias", "trains biases of the base, which cannot be weighted"));
    }
    if same {
        return Ok(config);
    }
    let target_modules = match lists {
        Some(lists) => joined(lists.into_iter()).map(TargetModules::List),
        None => {
            Some(TargetModules::List(folders.iter().flat_map(low_rank).collect::<BTreeSet<_>>().into_iter().collect()))
        }
    };
    Ok(AdapterConfig {
        target_modules,
        exclude_modules: None,
        layers_to_transform: None,
        layers_pattern: None,
        ..config
    })
}

fn joined<'a>(lists: impl Iterator<Item = &'a Vec<String>>) -> Option<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    for name in lists.flatten() {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    (!names.is_empty()).then_some(names)
}

fn refuse(adapter: &Path, module: &str, why: &str) -> Error {
    Error::Mix { adapter: adapter.into(), module: module.into(), why: why.into() }
}
