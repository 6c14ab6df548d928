//! Reading a PEFT adapter folder, every tensor accounted for.

pub(crate) mod methods;

pub use methods::{AdaLoraTensors, VeraPair, VeraTensors};

use crate::adapter_config::AdapterConfig;
use crate::error::{Error, Result, TensorFault};
use crate::repair::{KeyRule, RepairedKey, adapter_key, repair_key};
use crate::stacked::{Wrapped, is_target, is_turned, stacked_key, turn_stacked, wrapped};
use crate::tensor_file::TensorFile;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Kind, Tensor};

/// The name of an adapter's configuration in its folder.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The name of an adapter's weights in its folder.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before each module path.
pub(crate) const PREFIX: &str = "base_model.model.";

/// An adapter as PEFT saves it.
#[derive(Debug)]
pub struct AdapterFolder {
    /// `adapter_config.json`.
    pub config: AdapterConfig,
    /// Module path in the base model (`model.layers.0.self_attn.q_proj`) to what the adapter has for it.
    pub modules: BTreeMap<String, AdapterModule>,
}

/// What an adapter has for one module; all tensors are float32 on the CPU.
#[derive(Debug)]
pub enum AdapterModule {
    /// A low-rank update of a linear layer: `W + scale * B A`.
    Linear(LoraTensors),
    /// A low-rank update of an embedding: `W + scale * (B A)^T`.
    Embedding(LoraTensors),
    /// VeRA's vectors of a linear layer: `W + diag(b) B diag(d) A`.
    Vera(VeraTensors),
    /// AdaLoRA's triplets of a linear layer: `W + scale * B diag(E) A`.
    AdaLora(AdaLoraTensors),
    /// A module of `modules_to_save`, or a bias under `bias = "all"`: its tensors replace the base's.
    Saved {
        /// `weight`, `bias`.
        tensors: BTreeMap<String, Tensor>,
    },
    /// Rows `[tokens, dim]` that take the place of those of `trainable_token_indices`, in an embedding or a head.
    Tokens(Tensor),
    /// A low-rank update of stacked matrices `[E, out, in]`, under the path of the parameter (`..experts.down_proj`):
    /// `W[e] + scale * B[e] A[e]`, where `a` is `[E * r, in]`, taken as `[E, r, in]`, and `b` is `[out, r * E]`, taken as
    /// `[out, r, E]`. Files of PEFT before 0.19 have been brought to this form.
    Stacked(LoraTensors),
}

impl AdapterModule {
    /// How many numbers are trained.
    pub fn trained(&self) -> i64 {
        match self {
            AdapterModule::Linear(lora) | AdapterModule::Embedding(lora) | AdapterModule::Stacked(lora) => {
                lora.trained()
            }
            // The shared pair is frozen.
            AdapterModule::Vera(v) => (v.lambda_b.numel() + v.lambda_d.numel()) as i64,
            AdapterModule::AdaLora(l) => (l.a.numel() + l.b.numel() + l.e.numel()) as i64,
            AdapterModule::Saved { tensors } => tensors.values().map(|t| t.numel() as i64).sum(),
            AdapterModule::Tokens(rows) => rows.numel() as i64,
        }
    }
}

/// The tensors of a low-rank update.
#[derive(Debug)]
pub struct LoraTensors {
    /// `[r, in]`; of an embedding `[r, vocab]`.
    pub a: Tensor,
    /// `[out, r]`; of an embedding `[dim, r]`.
    pub b: Tensor,
    /// `[out]`: the bias of B (`lora_bias`).
    pub bias: Option<Tensor>,
    /// `[out]`, of an embedding `[dim]`: DoRA's magnitude.
    pub magnitude: Option<Tensor>,
    /// The frozen weight, `[out, in]` or `[vocab, dim]`, which PEFT saves along when embedding or head is a target.
    pub base_weight: Option<Tensor>,
    /// `[out]`: the layer's own bias, trained under `bias = "lora_only"` and `"all"`.
    pub base_bias: Option<Tensor>,
}

impl LoraTensors {
    /// A plain pair.
    pub fn new(a: Tensor, b: Tensor) -> Self {
        Self { a, b, bias: None, magnitude: None, base_weight: None, base_bias: None }
    }

    /// How many numbers are trained.
    pub fn trained(&self) -> i64 {
        let vectors = [&self.bias, &self.magnitude, &self.base_bias];
        [&self.a, &self.b].into_iter().chain(vectors.into_iter().flatten()).map(|t| t.numel() as i64).sum()
    }
}

/// Reads an adapter folder; the adapter must be one that is computed here exactly as PEFT computes it.
///
/// # Errors
/// As [`AdapterConfig::read`] and [`AdapterConfig::check_supported`]; [`Error::Pickle`] for `adapter_model.bin`;
/// [`Error::Tensor`] for a tensor that is missing, unexpected, not finite, or whose dtype, shape or rank is not what
/// the configuration says.
pub fn read_adapter(dir: &Path) -> Result<AdapterFolder> {
    let config_path = dir.join(ADAPTER_CONFIG);
    let config = AdapterConfig::read(&config_path)?;
    config.check_supported(&config_path)?;
    let path = dir.join(ADAPTER_WEIGHTS);
    let pickle = dir.join("adapter_model.bin");
    if !path.exists() && pickle.exists() {
        return Err(Error::Pickle { path: pickle });
    }
    let file = TensorFile::open(&path)?;
    if let Some(modules) = methods::read(&file, &config)? {
        if modules.is_empty() {
            return Err(Error::EmptyAdapter { path });
        }
        modules.iter().try_for_each(|(module, content)| check_module(&path, &config, module, content))?;
        return Ok(AdapterFolder { config, modules });
    }
    let mut parts: BTreeMap<&str, Parts> = BTreeMap::new();
    // With `bias = "all"` PEFT writes the biases of a module of modules_to_save again, under the names of its wrapper.
    let again = |name: &str| {
        config.bias == "all" && [".modules_to_save.bias", ".original_module.bias"].iter().any(|end| name.ends_with(end))
    };
    for name in file.names().filter(|name| !again(name)) {
        let (module, part) = split_name(name, &config).map_err(|why| unexpected_name(&path, name, why))?;
        if repair_key(name).is_some_and(|(_, rules)| rules.iter().any(KeyRule::is_around)) {
            return Err(unexpected_name(&path, name, "it holds the name of a wrapper"));
        }
        let tensor = read_float(&file, name)?;
        let parts = parts.entry(module).or_default();
        match part {
            Part::A => parts.a = Some(tensor),
            Part::B => parts.b = Some(tensor),
            Part::EmbeddingA => parts.embedding_a = Some(tensor),
            Part::EmbeddingB => parts.embedding_b = Some(tensor),
            Part::Bias => parts.bias = Some(tensor),
            Part::Magnitude => parts.magnitude = Some(tensor),
            Part::BaseWeight => parts.base_weight = Some(tensor),
            Part::BaseBias => parts.base_bias = Some(tensor),
            Part::Tokens => parts.tokens = Some(tensor),
            Part::Saved(name) => {
                parts.saved.insert(name.to_string(), tensor);
            }
        }
    }
    if parts.is_empty() {
        return Err(Error::EmptyAdapter { path });
    }
    follow_embedding(&config, &mut parts);
    let wrappers: Vec<&str> = parts.keys().copied().collect();
    let mut modules = BTreeMap::new();
    for (module, parts) in parts {
        let inner = wrappers.contains(&format!("{module}.base_layer").as_str());
        let is = wrapped(&config, module, inner)?;
        let (module, read) = match is.map_err(|why| unexpected(&path, &format!("{PREFIX}{module}{LORA_A}"), why))? {
            Wrapped::Stacked(parameter) => {
                let read = parts.stacked(module, &parameter, &config, &path)?;
                (parameter, read)
            }
            // The patterns are matched against the path of the parameter.
            Wrapped::Weight if config.rank_of(&format!("{module}.weight"))? != config.rank_of(module)? => {
                let why = "rank_pattern says one thing of the module and another of its weight";
                return Err(unexpected(&path, &format!("{PREFIX}{module}{LORA_A}"), why));
            }
            is => (module.to_string(), parts.join(module, matches!(is, Wrapped::Weight), &config, &path)?),
        };
        check_module(&path, &config, &module, &read)?;
        modules.insert(module, read);
    }
    Ok(AdapterFolder { config, modules })
}

/// A tied head follows its embedding. PEFT's method of tokens alone saves it twice all the same; a copy under a name that
/// the configuration does not say is dropped.
fn follow_embedding(config: &AdapterConfig, parts: &mut BTreeMap<&str, Parts>) {
    let Some(indices) = config.trainable_token_indices.as_ref().filter(|_| config.is_tokens_alone()) else { return };
    let named = |module: &str| indices.of(module).is_some();
    let own: Vec<Tensor> =
        parts.iter().filter(|(m, _)| named(m)).filter_map(|(_, p)| Some(p.tokens.as_ref()?.shallow_clone())).collect();
    parts.retain(|module, p| {
        let copy = |t: &Tensor| own.iter().any(|o| o.f_equal(t).unwrap_or(false));
        named(module) || !p.tokens.as_ref().is_some_and(copy)
    });
}

/// What a tensor is to its module.
enum Part<'a> {
    A,
    B,
    EmbeddingA,
    EmbeddingB,
    Bias,
    Magnitude,
    BaseWeight,
    BaseBias,
    Tokens,
    Saved(&'a str),
}

/// The suffixes of PEFT's keys.
pub(crate) const LORA_A: &str = ".lora_A.weight";
pub(crate) const LORA_B: &str = ".lora_B.weight";
pub(crate) const LORA_EMBEDDING_A: &str = ".lora_embedding_A";
pub(crate) const LORA_EMBEDDING_B: &str = ".lora_embedding_B";
pub(crate) const LORA_B_BIAS: &str = ".lora_B.bias";
pub(crate) const MAGNITUDE: &str = ".lora_magnitude_vector";
pub(crate) const BASE_WEIGHT: &str = ".base_layer.weight";
pub(crate) const BASE_BIAS: &str = ".base_layer.bias";
pub(crate) const TOKEN_ROWS: &str = ".token_adapter.trainable_tokens_delta";
/// The same in PEFT's method of tokens alone.
pub(crate) const TOKEN_ROWS_ALONE: &str = ".trainable_tokens_delta";

fn split_name<'a>(name: &'a str, config: &AdapterConfig) -> std::result::Result<(&'a str, Part<'a>), &'static str> {
    let path = name.strip_prefix(PREFIX).ok_or("the name does not begin with `base_model.model.`")?;
    let suffixes = [
        (LORA_A, Part::A),
        (LORA_B, Part::B),
        (LORA_EMBEDDING_A, Part::EmbeddingA),
        (LORA_EMBEDDING_B, Part::EmbeddingB),
        (BASE_WEIGHT, Part::BaseWeight),
        (LORA_B_BIAS, Part::Bias),
        (MAGNITUDE, Part::Magnitude),
        // As PEFT 0.10 and before wrote it.
        (".lora_magnitude_vector.weight", Part::Magnitude),
        (BASE_BIAS, Part::BaseBias),
        (TOKEN_ROWS, Part::Tokens),
        (TOKEN_ROWS_ALONE, Part::Tokens),
    ];
    for (suffix, part) in suffixes {
        if let Some(module) = path.strip_suffix(suffix) {
            return Ok((module, part));
        }
    }
    if path.contains(".lora_") {
        return Err("no known tensor of a LoRA adapter has this name");
    }
    let (module, tensor) = saved_part(path, config)?;
    Ok((module, Part::Saved(tensor)))
}

/// The module and the tensor of one that is saved in full, or of a bias that is trained.
fn saved_part<'a>(path: &'a str, config: &AdapterConfig) -> std::result::Result<(&'a str, &'a str), &'static str> {
    let (module, tensor) = path.rsplit_once('.').ok_or("the name has no module")?;
    let trained_bias = tensor == "bias" && config.bias == "all";
    if !trained_bias && (!["weight", "bias"].contains(&tensor) || !is_saved(module, config)) {
        return Err("it is neither of a LoRA adapter nor of modules_to_save");
    }
    Ok((module, tensor))
}

/// Whether a module, or one that contains it, has a name of `modules_to_save` at its end.
fn is_saved(module: &str, config: &AdapterConfig) -> bool {
    let names = config.modules_to_save.as_deref().unwrap_or_default();
    let ends = module.match_indices('.').map(|(at, _)| at).chain([module.len()]);
    ends.map(|end| &module[..end]).any(|path| names.iter().any(|name| path.ends_with(name.as_str())))
}

#[derive(Default)]
struct Parts {
    a: Option<Tensor>,
    b: Option<Tensor>,
    embedding_a: Option<Tensor>,
    embedding_b: Option<Tensor>,
    bias: Option<Tensor>,
    magnitude: Option<Tensor>,
    base_weight: Option<Tensor>,
    base_bias: Option<Tensor>,
    tokens: Option<Tensor>,
    saved: BTreeMap<String, Tensor>,
}

impl Parts {
    /// The pair of a stacked parameter, in the layout of today's PEFT.
    fn stacked(self, wrapper: &str, parameter: &str, config: &AdapterConfig, path: &Path) -> Result<AdapterModule> {
        let name = |suffix: &str| format!("{PREFIX}{wrapper}{suffix}");
        let (a, b) = match (self.a, self.b) {
            (Some(a), Some(b)) => (a, b),
            (None, _) => return Err(Error::tensor(path, name(LORA_A), TensorFault::Missing)),
            (_, None) => return Err(Error::tensor(path, name(LORA_B), TensorFault::Missing)),
        };
        let lora = LoraTensors::new(a, b);
        check_stacked(path, wrapper, config.rank_of(parameter)?, &lora)?;
        if !is_turned(config.peft_version.as_deref()) {
            return Ok(AdapterModule::Stacked(lora));
        }
        let turned = turn_stacked(&lora.a, &lora.b, config.rank_of(parameter)?);
        let (a, b) = turned.map_err(|e| Error::tch(path, e))?;
        Ok(AdapterModule::Stacked(LoraTensors::new(a, b)))
    }

    fn join(self, module: &str, by_weight: bool, config: &AdapterConfig, path: &Path) -> Result<AdapterModule> {
        let missing =
            |suffix: &str| Err(Error::tensor(path, format!("{PREFIX}{module}{suffix}"), TensorFault::Missing));
        let extra = |suffix: &str, why| Err(unexpected(path, &format!("{PREFIX}{module}{suffix}"), why));
        if let Some(rows) = self.tokens {
            let others = [&self.a, &self.b, &self.embedding_a, &self.embedding_b].into_iter().any(Option::is_some);
            return match others || !self.saved.is_empty() {
                true => extra(TOKEN_ROWS, "the module has other tensors, too"),
                false => Ok(AdapterModule::Tokens(rows)),
            };
        }
        let has_embedding = self.embedding_a.is_some() || self.embedding_b.is_some();
        let others = [&self.bias, &self.magnitude, &self.base_weight, &self.base_bias];
        let has_linear = self.a.is_some() || self.b.is_some() || (others.iter().any(|t| t.is_some()) && !has_embedding);
        if has_linear && has_embedding {
            return extra(LORA_EMBEDDING_A, "the module has tensors of a linear layer, too");
        }
        if let (Some((name, _)), true) = (self.saved.first_key_value(), has_linear || has_embedding) {
            return extra(&format!(".{name}"), "the module has LoRA tensors, too");
        }
        if !has_linear && !has_embedding {
            return Ok(AdapterModule::Saved { tensors: self.saved });
        }
        let first = if has_linear { LORA_A } else { LORA_EMBEDDING_A };
        let targeted = match &config.target_modules {
            Some(targets) if !targets.is_all_linear() => targets.matches(module)?,
            _ => true,
        };
        if !targeted && !by_weight {
            return extra(first, "the module is not among target_modules; `lora repair` writes them anew");
        }
        for (suffix, given, asked) in [
            (MAGNITUDE, self.magnitude.is_some(), config.use_dora),
            // An embedding has no bias of B.
            (LORA_B_BIAS, self.bias.is_some(), config.lora_bias && has_linear),
        ] {
            match (given, asked) {
                (false, true) => return missing(suffix),
                (true, false) => return extra(suffix, "the configuration does not ask for it"),
                _ => {}
            }
        }
        if self.base_bias.is_some() && config.bias == "none" {
            return extra(BASE_BIAS, "the configuration trains no bias");
        }
        let Parts { bias, magnitude, base_weight, base_bias, .. } = self;
        let tensors = |a, b| LoraTensors { a, b, bias, magnitude, base_weight, base_bias };
        if has_linear {
            match (self.a, self.b) {
                (Some(a), Some(b)) => Ok(AdapterModule::Linear(tensors(a, b))),
                (None, _) => missing(LORA_A),
                (_, None) => missing(LORA_B),
            }
        } else {
            match (self.embedding_a, self.embedding_b) {
                (Some(a), Some(b)) => Ok(AdapterModule::Embedding(tensors(a, b))),
                (None, _) => missing(LORA_EMBEDDING_A),
                (_, None) => missing(LORA_EMBEDDING_B),
            }
        }
    }
}

/// Checks shapes, ranks and values of one module; used before writing as well as after reading.
pub(crate) fn check_module(path: &Path, config: &AdapterConfig, module: &str, content: &AdapterModule) -> Result<()> {
    let (tensors, suffix_a, suffix_b) = match content {
        AdapterModule::Linear(tensors) => (tensors, LORA_A, LORA_B),
        AdapterModule::Embedding(tensors) => (tensors, LORA_EMBEDDING_A, LORA_EMBEDDING_B),
        AdapterModule::Vera(vera) => return vera.check(path, config, module),
        AdapterModule::AdaLora(adalora) => return adalora.check(path, config, module),
        AdapterModule::Saved { tensors } => {
            for (name, tensor) in tensors {
                check_finite(path, &format!("{PREFIX}{module}.{name}"), tensor)?;
            }
            return Ok(());
        }
        AdapterModule::Tokens(rows) => return check_tokens(path, config, module, rows),
        AdapterModule::Stacked(lora) => {
            let wrapper = stacked_key(module, |_| false);
            if !is_target(config, module) {
                let why = "the parameter is not among target_parameters";
                return Err(unexpected(path, &format!("{PREFIX}{wrapper}{LORA_A}"), why));
            }
            return check_stacked(path, &wrapper, config.rank_of(module)?, lora);
        }
    };
    let name = |suffix: &str| format!("{PREFIX}{module}{suffix}");
    let r = config.rank_of(module)?;
    let LoraTensors { a, b, base_weight: base, .. } = tensors;
    let (size_a, size_b) = (a.size(), b.size());
    if size_a.len() != 2 || size_a[0] != r || size_a[1] < 1 {
        return Err(wrong_shape(path, name(suffix_a), size_a, format!("[{r}, inputs] for the rank in the config")));
    }
    if size_b.len() != 2 || size_b[1] != r || size_b[0] < 1 {
        return Err(wrong_shape(path, name(suffix_b), size_b, format!("[outputs, {r}] for the rank in the config")));
    }
    check_finite(path, &name(suffix_a), a)?;
    check_finite(path, &name(suffix_b), b)?;
    for (suffix, vector) in
        [(LORA_B_BIAS, &tensors.bias), (MAGNITUDE, &tensors.magnitude), (BASE_BIAS, &tensors.base_bias)]
    {
        let Some(vector) = vector else { continue };
        if vector.size() != [size_b[0]] {
            return Err(wrong_shape(path, name(suffix), vector.size(), format!("[{}], as B says", size_b[0])));
        }
        check_finite(path, &name(suffix), vector)?;
    }
    if let Some(base) = base {
        let linear = matches!(content, AdapterModule::Linear(_));
        let wanted = if linear { [size_b[0], size_a[1]] } else { [size_a[1], size_b[0]] };
        if base.size() != wanted {
            return Err(wrong_shape(path, name(BASE_WEIGHT), base.size(), format!("{wanted:?}, as A and B say")));
        }
        check_finite(path, &name(BASE_WEIGHT), base)?;
    }
    Ok(())
}

/// Rows for the ids that the configuration names.
fn check_tokens(path: &Path, config: &AdapterConfig, module: &str, rows: &Tensor) -> Result<()> {
    let name = format!("{PREFIX}{module}{TOKEN_ROWS}");
    let Some(ids) = config.trainable_token_indices.as_ref().and_then(|indices| indices.of(module)) else {
        return Err(unexpected(path, &name, "trainable_token_indices does not name this module"));
    };
    let size = rows.size();
    if size.len() != 2 || size[0] != ids.len() as i64 || size[1] < 1 {
        let wanted = format!("[{}, dim] for the ids of trainable_token_indices", ids.len());
        return Err(wrong_shape(path, name, size, wanted));
    }
    check_finite(path, &name, rows)
}

/// A and B of all experts, in either layout.
fn check_stacked(path: &Path, wrapper: &str, r: i64, lora: &LoraTensors) -> Result<()> {
    let name = |suffix: &str| format!("{PREFIX}{wrapper}{suffix}");
    let (a, b) = (lora.a.size(), lora.b.size());
    if a.len() != 2 || a[0] < r || a[0] % r != 0 || a[1] < 1 {
        return Err(wrong_shape(path, name(LORA_A), a, format!("[experts * {r}, inputs] for the rank in the config")));
    }
    if b.len() != 2 || b[1] != a[0] || b[0] < 1 {
        return Err(wrong_shape(path, name(LORA_B), b, format!("[outputs, {}], as A says", a[0])));
    }
    check_finite(path, &name(LORA_A), &lora.a)?;
    check_finite(path, &name(LORA_B), &lora.b)
}

fn check_finite(path: &Path, name: &str, tensor: &Tensor) -> Result<()> {
    let count = tensor.f_isfinite().and_then(|t| t.f_logical_not()).and_then(|t| t.f_sum(Kind::Int64));
    let count = count.and_then(|t| i64::try_from(&t)).map_err(|e| Error::tch(path, e))?;
    if count == 0 { Ok(()) } else { Err(Error::tensor(path, name, TensorFault::NonFinite { count })) }
}

fn read_float(file: &TensorFile, name: &str) -> Result<Tensor> {
    let kind = file.info(name)?.kind;
    if ![Kind::Float, Kind::BFloat16, Kind::Half].contains(&kind) {
        let fault =
            TensorFault::Dtype { got: lora_torch::kind_name(kind).into(), wanted: "float32, bfloat16 or float16" };
        return Err(Error::tensor(file.path(), name, fault));
    }
    file.read(name)?.f_to_kind(Kind::Float).map_err(|e| Error::tch(file.path(), e))
}

/// An unknown name, with the remedy where its history is known.
fn unexpected_name(path: &Path, name: &str, why: &'static str) -> Error {
    let becomes = match repair_key(name) {
        Some((RepairedKey::Tensor { module, end }, rules)) if !rules.is_empty() => adapter_key(&module, &end),
        Some((RepairedKey::Alpha { .. }, _)) => "lora_alpha of the configuration".into(),
        _ => return unexpected(path, name, why),
    };
    Error::tensor(path, name, TensorFault::Repairable { why, becomes })
}

fn unexpected(path: &Path, name: &str, why: &'static str) -> Error {
    Error::tensor(path, name, TensorFault::Unexpected { why })
}

fn wrong_shape(path: &Path, name: String, got: Vec<i64>, wanted: String) -> Error {
    Error::tensor(path, name, TensorFault::Shape { got, wanted })
}
