//! A typed view of a model's `config.json`, checked before anything is allocated from it.

mod defaults;
mod quantization;

use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::json::{read_json_object, shorten};
use crate::rope::{self, RopeParameters};
use defaults::{Defaults, spelt};
use serde_json::{Map, Value};
use std::path::Path;

/// Sizes stay below what libtorch's index arithmetic and every real model need.
const MAX_SIZE: i64 = i32::MAX as i64;
/// More layers than any model has; lists per layer are made from this number.
const MAX_LAYERS: i64 = 4096;

/// What a decoder's `config.json` says, with transformers' defaults where it is silent.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct HfConfig {
    /// The family: `llama`, `mistral`, `qwen2`, ...
    pub model_type: String,
    /// The classes that wrote the weights, such as `LlamaForCausalLM`.
    pub architectures: Vec<String>,
    /// The rows of the embedding.
    pub vocab_size: i64,
    /// The width of the residual stream.
    pub hidden_size: i64,
    /// The inner width of the MLP.
    pub intermediate_size: i64,
    /// The number of blocks.
    pub num_hidden_layers: i64,
    /// The heads of the queries.
    pub num_attention_heads: i64,
    /// The heads of keys and values; divides `num_attention_heads`.
    pub num_key_value_heads: i64,
    /// The width of a head.
    pub head_dim: i64,
    /// The epsilon of every norm.
    pub rms_norm_eps: f64,
    /// The activation of the MLP.
    pub hidden_act: String,
    /// Whether the config asks for biases in the attention; families with fixed biases (qwen2) do not use it.
    pub attention_bias: bool,
    /// Whether the MLP has biases.
    pub mlp_bias: bool,
    /// Whether the head shares the embedding's weight.
    pub tie_word_embeddings: bool,
    /// The keys that a query of a sliding layer sees, itself included; none for full attention.
    pub sliding_window: Option<i64>,
    /// qwen2, qwen3: whether `sliding_window` is in force.
    pub use_sliding_window: bool,
    /// qwen2, qwen3: the first layer with a sliding window.
    pub max_window_layers: i64,
    /// `full_attention` or `sliding_attention` per layer; derived for qwen2 and qwen3 as transformers does.
    pub layer_types: Option<Vec<String>>,
    /// The positions that the model was made for.
    pub max_position_embeddings: i64,
    /// The rotary positions.
    pub rope: RopeParameters,
    /// gemma3: the rotary positions of the sliding layers, where they have their own.
    pub rope_local: Option<RopeParameters>,
    /// The standard deviation of fresh weights.
    pub initializer_range: f64,
    /// The dtype of the weights (`bfloat16`, ...), if stated.
    pub dtype: Option<String>,
    /// The token that begins a text.
    pub bos_token_id: Option<i64>,
    /// The tokens that end a text; those of `generation_config.json` go first, as they do when generating.
    pub eos_token_ids: Vec<i64>,
    /// The token that fills rows.
    pub pad_token_id: Option<i64>,
    /// The whole file.
    pub raw: Map<String, Value>,
}

/// Settings that only some families have, read from the file as it stands; `file` is named in errors.
impl HfConfig {
    /// A number.
    ///
    /// # Errors
    /// [`Error::Field`] when it is none.
    pub fn float(&self, file: &Path, key: &str) -> Result<Option<f64>> {
        Fields::new(file, "", &self.raw).float(key)
    }

    /// A whole number of at least `low`.
    ///
    /// # Errors
    /// [`Error::Field`] when it is none.
    pub fn int(&self, file: &Path, key: &str, low: i64) -> Result<Option<i64>> {
        Fields::new(file, "", &self.raw).int(key, low, MAX_SIZE)
    }

    /// A list of whole numbers from 0.
    ///
    /// # Errors
    /// [`Error::Field`] when it is none.
    pub fn ints(&self, file: &Path, key: &str) -> Result<Option<Vec<i64>>> {
        Fields::new(file, "", &self.raw).ints(key, 0, MAX_SIZE)
    }

    /// True or false.
    ///
    /// # Errors
    /// [`Error::Field`] when it is neither.
    pub fn bool(&self, file: &Path, key: &str) -> Result<Option<bool>> {
        Fields::new(file, "", &self.raw).bool(key)
    }
}

/// Reads `config.json` and, for the ending tokens, `generation_config.json` of a model folder.
///
/// # Errors
/// [`Error::Io`], [`Error::Json`]; [`Error::Field`] for a missing, mistyped or impossible value; [`Error::Unsupported`]
/// for custom code, and for weights that are packed in another form than bitsandbytes' nf4 and int8.
pub fn read_hf_config(dir: &Path) -> Result<HfConfig> {
    let path = dir.join("config.json");
    let raw = read_json_object(&path)?;
    let generation = dir.join("generation_config.json");
    let generation_raw = if generation.is_file() { read_json_object(&generation)? } else { Map::new() };
    from_json(&path, raw, Fields::new(&generation, "", &generation_raw))
}

fn from_json(path: &Path, raw: Map<String, Value>, generation: Fields<'_>) -> Result<HfConfig> {
    let f = Fields::new(path, "", &raw);
    refuse_what_we_lack(f)?;
    let model_type = f.string("model_type")?.ok_or_else(|| f.wrong("model_type", "the name of a model family"))?;
    let defaults = Defaults::of(&model_type);
    let own = |key: &'static str| spelt(&model_type, key);
    let size = |key: &'static str, high: i64| -> Result<i64> {
        let key = own(key);
        f.int(key, 1, high)?.ok_or_else(|| f.wrong(key, format!("a whole number from 1 to {high}")))
    };
    // A key that is `null` asks for the derived value; only a missing one gets the family's default.
    let size_or = |key: &'static str, default: Option<i64>| -> Result<Option<i64>> {
        let key = own(key);
        let given = f.int(key, 1, MAX_SIZE)?;
        Ok(if raw.contains_key(key) { given } else { default })
    };
    let hidden_size = size("hidden_size", MAX_SIZE)?;
    let num_hidden_layers = size("num_hidden_layers", MAX_LAYERS)?;
    let num_attention_heads = size("num_attention_heads", MAX_SIZE)?;
    let num_key_value_heads =
        size_or("num_key_value_heads", defaults.num_key_value_heads)?.unwrap_or(num_attention_heads);
    if num_attention_heads % num_key_value_heads != 0 {
        let wanted = format!("a divisor of num_attention_heads = {num_attention_heads}");
        return Err(f.wrong("num_key_value_heads", wanted));
    }
    let head_dim = match size_or("head_dim", defaults.head_dim)? {
        Some(head_dim) => head_dim,
        None if hidden_size % num_attention_heads == 0 => hidden_size / num_attention_heads,
        None => {
            let wanted = format!("a multiple of {} = {num_attention_heads}", own("num_attention_heads"));
            return Err(f.wrong(own("hidden_size"), wanted));
        }
    };
    let max_position_embeddings = match size_or("max_position_embeddings", defaults.max_position_embeddings)? {
        Some(positions) => positions,
        None => size("max_position_embeddings", MAX_SIZE)?,
    };
    let use_sliding_window = f.bool("use_sliding_window")?.unwrap_or(false);
    let window = size_or("sliding_window", defaults.sliding_window)?;
    let sliding_window = window.filter(|_| use_sliding_window || !defaults.has_window_switch);
    let max_window_layers = f.int("max_window_layers", 0, MAX_SIZE)?.unwrap_or(28);
    let layer_types = match f.strings("layer_types")? {
        Some(types) => Some(check_layer_types(f, types, num_hidden_layers)?),
        None if defaults.has_window_switch => {
            let slides = |i: i64| sliding_window.is_some() && i >= max_window_layers;
            let name = |i| if slides(i) { "sliding_attention" } else { "full_attention" };
            Some((0..num_hidden_layers).map(|i| name(i).to_string()).collect())
        }
        None => match defaults.full_every {
            Some(default) => {
                let every = f.int("sliding_window_pattern", 1, MAX_LAYERS)?.unwrap_or(default);
                let name = |i: i64| if (i + 1) % every == 0 { "full_attention" } else { "sliding_attention" };
                Some((0..num_hidden_layers).map(|i| name(i).to_string()).collect())
            }
            None => None,
        },
    };
    let act_key = if f.get(own("hidden_act")).is_some() { own("hidden_act") } else { "hidden_act" };
    let eps_key = own("rms_norm_eps");
    let intermediate_size = match size_or("intermediate_size", None)? {
        None if model_type == "gpt2" => 4 * hidden_size,
        _ => size("intermediate_size", MAX_SIZE)?,
    };
    let (rope, rope_local) = rope::read(f, max_position_embeddings, head_dim, defaults.rope)?;
    let config = HfConfig {
        architectures: f.strings("architectures")?.unwrap_or_default(),
        vocab_size: size("vocab_size", MAX_SIZE)?,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        rms_norm_eps: f.float(eps_key)?.unwrap_or(defaults.norm_eps),
        hidden_act: f.string(act_key)?.unwrap_or_else(|| defaults.hidden_act.into()),
        attention_bias: f.bool("attention_bias")?.unwrap_or(false),
        mlp_bias: f.bool("mlp_bias")?.unwrap_or(false),
        tie_word_embeddings: f.bool("tie_word_embeddings")?.unwrap_or(defaults.tie_word_embeddings),
        sliding_window,
        use_sliding_window,
        max_window_layers,
        layer_types,
        max_position_embeddings,
        rope,
        rope_local,
        initializer_range: f.float("initializer_range")?.unwrap_or(0.02),
        dtype: read_dtype(f)?,
        bos_token_id: single_id(f, "bos_token_id", defaults.bos_token_id)?,
        eos_token_ids: eos_ids(f, generation, defaults.eos_token_id)?,
        pad_token_id: single_id(f, "pad_token_id", None)?,
        model_type,
        raw: raw.clone(),
    };
    if config.rms_norm_eps <= 0.0 {
        return Err(f.wrong(eps_key, "above 0"));
    }
    check_total(&config, f)?;
    Ok(config)
}

fn refuse_what_we_lack(f: Fields<'_>) -> Result<()> {
    let code = "the model needs Python code of its own, which is never run; use a checkpoint of a built-in family";
    let refused = [("auto_map", code), ("custom_code", code), ("custom_pipelines", code), ("trust_remote_code", code)];
    for (field, reason) in refused {
        if let Some(value) = f.get(field).filter(|v| v.as_bool() != Some(false)) {
            let value = shorten(&value.to_string());
            return Err(Error::Unsupported { path: f.path().into(), field: field.into(), value, reason });
        }
    }
    quantization::check(f)
}

fn check_layer_types(f: Fields<'_>, types: Vec<String>, layers: i64) -> Result<Vec<String>> {
    let known = types.iter().all(|t| t == "full_attention" || t == "sliding_attention");
    if known && types.len() as i64 == layers {
        return Ok(types);
    }
    Err(f.wrong("layer_types", format!("{layers} entries, each full_attention or sliding_attention")))
}

fn read_dtype(f: Fields<'_>) -> Result<Option<String>> {
    let key = if f.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    let Some(name) = f.string(key)? else { return Ok(None) };
    match lora_torch::parse_kind(&name) {
        Some(kind) => Ok(Some(lora_torch::kind_name(kind).to_string())),
        None => Err(f.wrong(key, "float32, bfloat16, float16 or float64")),
    }
}

/// A token id; old configs write -1 for "none".
fn single_id(f: Fields<'_>, key: &str, default: Option<i64>) -> Result<Option<i64>> {
    let ids = ids(f, key)?;
    match ids.as_deref() {
        None => Ok(default),
        Some([]) => Ok(None),
        Some([id]) => Ok(Some(*id)),
        Some(_) => Err(f.wrong(key, "one token id")),
    }
}

fn eos_ids(config: Fields<'_>, generation: Fields<'_>, default: Option<i64>) -> Result<Vec<i64>> {
    let given = ids(generation, "eos_token_id")?.filter(|ids| !ids.is_empty());
    Ok(match given {
        Some(ids) => ids,
        None => ids(config, "eos_token_id")?.unwrap_or_else(|| default.into_iter().collect()),
    })
}

/// `None` when the key is missing, an empty list when it says "none".
fn ids(f: Fields<'_>, key: &str) -> Result<Option<Vec<i64>>> {
    if f.is_null(key) {
        return Ok(Some(Vec::new()));
    }
    let ids = f.ints(key, -1, MAX_SIZE)?;
    Ok(ids.map(|ids| ids.into_iter().filter(|&id| id >= 0).collect()))
}

/// Sizes that are fine one by one may still multiply to more than an address space.
fn check_total(c: &HfConfig, f: Fields<'_>) -> Result<()> {
    let [vocab, hidden, inner, layers] =
        [c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers].map(|n| n as u128);
    let head_width = c.head_dim as u128 * (c.num_attention_heads + c.num_key_value_heads) as u128;
    let elements = 2 * vocab * hidden + layers * (2 * hidden * head_width + 3 * hidden * inner);
    let bytes_at_most = i64::MAX as u128 / 8;
    if elements <= bytes_at_most {
        return Ok(());
    }
    Err(Error::Field {
        path: f.path().into(),
        field: "vocab_size, hidden_size, intermediate_size, num_hidden_layers".into(),
        value: format!("{vocab}, {hidden}, {inner}, {layers}"),
        wanted: "sizes whose weights fit into memory".into(),
    })
}

#[cfg(test)]
mod tests;
