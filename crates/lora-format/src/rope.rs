//! Rotary position parameters of a `config.json`, in its old and new forms.

use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::json::shorten;
use serde_json::{Map, Value};

const TYPES: [&str; 6] = ["default", "linear", "dynamic", "yarn", "longrope", "llama3"];
const MAX_POSITIONS: i64 = 1 << 31;

/// How positions turn queries and keys; the names are those of transformers' `rope_parameters`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct RopeParameters {
    /// `default`, `linear`, `dynamic`, `yarn`, `longrope` or `llama3`.
    pub rope_type: String,
    /// The base of the wavelengths.
    pub rope_theta: f64,
    /// The stretch of positions; given for every type but `default`, and optional for `longrope`.
    pub factor: Option<f64>,
    /// `llama3`: wavelengths above `original / low_freq_factor` are stretched in full.
    pub low_freq_factor: Option<f64>,
    /// `llama3`: wavelengths below `original / high_freq_factor` are left alone.
    pub high_freq_factor: Option<f64>,
    /// The positions that the model was first trained for; present for `yarn`, `longrope` and `llama3`.
    pub original_max_position_embeddings: Option<i64>,
    /// `yarn`: rotations above which a dimension is left alone.
    pub beta_fast: f64,
    /// `yarn`: rotations below which a dimension is stretched in full.
    pub beta_slow: f64,
    /// `yarn`, `longrope`: the factor on cosines and sines; derived from `factor` when absent.
    pub attention_factor: Option<f64>,
    /// `yarn`: numerator of the derived attention factor.
    pub mscale: Option<f64>,
    /// `yarn`: denominator of the derived attention factor.
    pub mscale_all_dim: Option<f64>,
    /// `yarn`: whether the borders of the ramp are rounded to whole dimensions.
    pub truncate: bool,
    /// `longrope`: one stretch per frequency up to `original_max_position_embeddings`; empty otherwise.
    pub short_factor: Vec<f64>,
    /// `longrope`: one stretch per frequency beyond it; empty otherwise.
    pub long_factor: Vec<f64>,
    /// The part of each head's dimensions that is rotated.
    pub partial_rotary_factor: f64,
}

/// What a family takes where its config is silent.
#[derive(Clone, Copy)]
pub(crate) struct RopeDefaults {
    pub(crate) theta: f64,
    pub(crate) partial: f64,
    /// The base of the sliding layers, in families where they have their own.
    pub(crate) local_theta: Option<f64>,
}

/// The rotary positions of a model, and those of its sliding layers where they have their own.
///
/// Reads `rope_scaling` (old, first) or `rope_parameters` (new), with `rope_theta` and `partial_rotary_factor` from the
/// top level where the table lacks them, as transformers does. Gemma 3 has a table for each kind of layer, or, in its old
/// form, `rope_local_base_freq`, and no scaling of the sliding layers.
pub(crate) fn read(
    config: Fields<'_>,
    max_position_embeddings: i64,
    head_dim: i64,
    defaults: RopeDefaults,
) -> Result<(RopeParameters, Option<RopeParameters>)> {
    let empty = Map::new();
    let filled = |key: &&str| config.get(key).is_some_and(|v| v.as_object().is_none_or(|m| !m.is_empty()));
    let (key, prefix) = match ["rope_scaling", "rope_parameters"].iter().find(|key| filled(key)) {
        Some(&"rope_scaling") => ("rope_scaling", "rope_scaling."),
        _ => ("rope_parameters", "rope_parameters."),
    };
    let table = if filled(&key) { config.object(key)? } else { &empty };
    let one = |fields, defaults| read_one(fields, config, max_position_embeddings, head_dim, defaults);
    let local = |theta| RopeDefaults { theta, ..defaults };
    if let Some((layers, _)) = table.iter().find(|(_, v)| v.is_object()) {
        let own = Fields::new(config.path(), prefix, table);
        let Some(theta) = defaults.local_theta else {
            return Err(Error::Unsupported {
                path: config.path().into(),
                field: format!("{prefix}{layers}"),
                value: shorten(&Value::Object(table.clone()).to_string()),
                reason: "positions that differ between kinds of layers are not implemented for this family",
            });
        };
        let full = Fields::new(config.path(), "rope_parameters.full_attention.", own.object("full_attention")?);
        let sliding =
            Fields::new(config.path(), "rope_parameters.sliding_attention.", own.object("sliding_attention")?);
        return Ok((one(full, defaults)?, Some(one(sliding, local(theta))?)));
    }
    let rope = one(Fields::new(config.path(), prefix, table), defaults)?;
    let Some(theta) = defaults.local_theta else { return Ok((rope, None)) };
    let base = config.float("rope_local_base_freq")?.unwrap_or(theta);
    let plain = Map::from_iter([("rope_theta".to_string(), Value::from(base))]);
    Ok((rope, Some(one(Fields::new(config.path(), "rope_local_base_freq.", &plain), local(base))?)))
}

/// One table.
fn read_one(
    fields: Fields<'_>,
    config: Fields<'_>,
    max_position_embeddings: i64,
    head_dim: i64,
    defaults: RopeDefaults,
) -> Result<RopeParameters> {
    let type_key = if fields.get("rope_type").is_some() { "rope_type" } else { "type" };
    let rope_type = match fields.string(type_key)?.as_deref() {
        None => "default".to_string(),
        Some("su") => "longrope".to_string(),
        Some(name) if TYPES.contains(&name) => name.to_string(),
        Some(_) => return Err(fields.wrong(type_key, format!("one of {}", TYPES.join(", ")))),
    };
    let own_or_top =
        |key: &str, default: f64| -> Result<f64> { Ok(fields.float(key)?.or(config.float(key)?).unwrap_or(default)) };
    let scaled = ["llama3", "yarn", "longrope"].contains(&rope_type.as_str());
    let original = "original_max_position_embeddings";
    let original_max_position_embeddings = if scaled {
        let top = config.int(original, 1, MAX_POSITIONS)?;
        Some(top.or(fields.int(original, 1, MAX_POSITIONS)?).unwrap_or(max_position_embeddings))
    } else {
        None
    };
    // A zero means "not given" for both betas.
    let beta =
        |key: &str, default: f64| -> Result<f64> { Ok(fields.float(key)?.filter(|&b| b != 0.0).unwrap_or(default)) };
    let rope = RopeParameters {
        // GPT-NeoX's old names are `rotary_emb_base` and `rotary_pct`.
        rope_theta: own_or_top("rope_theta", config.float("rotary_emb_base")?.unwrap_or(defaults.theta))?,
        factor: fields.float("factor")?,
        low_freq_factor: fields.float("low_freq_factor")?,
        high_freq_factor: fields.float("high_freq_factor")?,
        original_max_position_embeddings,
        beta_fast: beta("beta_fast", 32.0)?,
        beta_slow: beta("beta_slow", 1.0)?,
        attention_factor: fields.float("attention_factor")?,
        mscale: fields.float("mscale")?,
        mscale_all_dim: fields.float("mscale_all_dim")?,
        truncate: fields.bool("truncate")?.unwrap_or(true),
        short_factor: fields.floats("short_factor")?.unwrap_or_default(),
        long_factor: fields.floats("long_factor")?.unwrap_or_default(),
        partial_rotary_factor: own_or_top(
            "partial_rotary_factor",
            config.float("rotary_pct")?.unwrap_or(defaults.partial),
        )?,
        rope_type,
    };
    check(&rope, fields, config, head_dim)?;
    Ok(rope)
}

fn check(rope: &RopeParameters, fields: Fields<'_>, config: Fields<'_>, head_dim: i64) -> Result<()> {
    // The field may stand in the table or at the top level.
    let place = |key: &str| if fields.get(key).is_some() { fields } else { config };
    if rope.rope_theta <= 0.0 {
        return Err(place("rope_theta").wrong("rope_theta", "above 0"));
    }
    if !(rope.partial_rotary_factor > 0.0 && rope.partial_rotary_factor <= 1.0) {
        return Err(place("partial_rotary_factor").wrong("partial_rotary_factor", "above 0 and at most 1"));
    }
    let rotated = (head_dim as f64 * rope.partial_rotary_factor) as i64;
    let needs_factor = ["linear", "dynamic", "yarn", "llama3"].contains(&rope.rope_type.as_str());
    if rope.factor.map_or(needs_factor, |f| f <= 0.0) {
        return Err(fields.wrong("factor", format!("a number above 0 for the rope type `{}`", rope.rope_type)));
    }
    if rope.rope_type == "llama3" {
        match (rope.low_freq_factor, rope.high_freq_factor) {
            (Some(low), _) if low <= 0.0 => return Err(fields.wrong("low_freq_factor", "above 0")),
            (Some(low), Some(high)) if high > low => {}
            (None, _) => return Err(fields.wrong("low_freq_factor", "given for the rope type `llama3`")),
            _ => return Err(fields.wrong("high_freq_factor", "given, and above low_freq_factor")),
        }
    }
    if rope.rope_type == "longrope" {
        for (key, factors) in [("short_factor", &rope.short_factor), ("long_factor", &rope.long_factor)] {
            if factors.len() as i64 != rotated / 2 || factors.iter().any(|&f| f <= 0.0) {
                return Err(fields.wrong(key, format!("a list of {} numbers above 0", rotated / 2)));
            }
        }
    }
    Ok(())
}
