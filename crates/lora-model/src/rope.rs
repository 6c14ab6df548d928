//! Rotary positions: the inverse frequencies of each scaling that checkpoints name, and the tables for a batch.

use crate::config::ModelConfig;
use crate::error::Result;
use lora_format::RopeParameters;
use std::f64::consts::PI;
use tch::{Kind, Tensor};

/// Inverse frequencies in fp32 (as the checkpoints' authors computed them) and the factor on cosines and sines.
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies {
    /// One for each pair of rotated dimensions.
    pub inv_freq: Vec<f32>,
    /// Attention scaling of yarn and longrope; 1 otherwise.
    pub scaling: f64,
}

/// Frequencies of the model's rotary positions for texts of up to `longest` tokens (which only `dynamic` and `longrope`
/// look at).
pub fn frequencies(c: &ModelConfig, longest: i64) -> Frequencies {
    frequencies_of(c, &c.rope, longest)
}

fn frequencies_of(c: &ModelConfig, p: &RopeParameters, longest: i64) -> Frequencies {
    let dim = (c.head_dim as f64 * p.partial_rotary_factor) as i64;
    let factor = p.factor.unwrap_or(1.0);
    let plain =
        |base: f64| -> Vec<f64> { (0..dim / 2).map(|i| 1.0 / base.powf(2.0 * i as f64 / dim as f64)).collect() };
    let (inv, scaling) = match p.rope_type.as_str() {
        "linear" => (plain(p.rope_theta).into_iter().map(|f| f / factor).collect(), 1.0),
        "dynamic" => (plain(dynamic_base(p, dim, factor, c.max_position_embeddings, longest)), 1.0),
        "llama3" => (plain(p.rope_theta).into_iter().map(|f| llama3(p, f, factor)).collect(), 1.0),
        "yarn" => yarn(p, dim, c.max_position_embeddings),
        "longrope" => longrope(p, &plain(p.rope_theta), c.max_position_embeddings, longest),
        _ => (plain(p.rope_theta), 1.0),
    };
    Frequencies { inv_freq: inv.into_iter().map(|f: f64| f as f32).collect(), scaling }
}

/// NTK-aware base that grows with the text past the trained length.
fn dynamic_base(p: &RopeParameters, dim: i64, factor: f64, trained: i64, longest: i64) -> f64 {
    let stretch = factor * longest.max(trained) as f64 / trained as f64 - (factor - 1.0);
    p.rope_theta * stretch.powf(dim as f64 / (dim as f64 - 2.0))
}

/// Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated.
fn llama3(p: &RopeParameters, inv: f64, factor: f64) -> f64 {
    let (low, high) = (p.low_freq_factor.unwrap_or(1.0), p.high_freq_factor.unwrap_or(4.0));
    let original = p.original_max_position_embeddings.unwrap_or(8192) as f64;
    let wavelength = 2.0 * PI / inv;
    if wavelength > original / low {
        inv / factor
    } else if wavelength < original / high {
        inv
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * inv / factor + smooth * inv
    }
}

/// Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023, sections 3.2 and 3.4.
fn yarn(p: &RopeParameters, dim: i64, max_position_embeddings: i64) -> (Vec<f64>, f64) {
    let original = p.original_max_position_embeddings.unwrap_or(max_position_embeddings) as f64;
    let factor = p.factor.unwrap_or(max_position_embeddings as f64 / original);
    let mscale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
    let scaling = p.attention_factor.unwrap_or(match (p.mscale, p.mscale_all_dim) {
        (Some(m), Some(all)) if m != 0.0 && all != 0.0 => mscale(m) / mscale(all),
        _ => mscale(1.0),
    });
    let correction = |rotations: f64| dim as f64 * (original / (rotations * 2.0 * PI)).ln() / (2.0 * p.rope_theta.ln());
    let (mut low, mut high) = (correction(p.beta_fast), correction(p.beta_slow));
    if p.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    let inv = (0..dim / 2).map(|i| {
        let extrapolated = 1.0 / p.rope_theta.powf(2.0 * i as f64 / dim as f64);
        let keep = 1.0 - ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        extrapolated / factor * (1.0 - keep) + extrapolated * keep
    });
    (inv.collect(), scaling)
}

/// Ding et al., "LongRoPE", 2024: a stretch of its own for each frequency.
fn longrope(p: &RopeParameters, plain: &[f64], max_position_embeddings: i64, longest: i64) -> (Vec<f64>, f64) {
    let original = p.original_max_position_embeddings.unwrap_or(max_position_embeddings);
    let factor = p.factor.unwrap_or(max_position_embeddings as f64 / original as f64);
    let scaling = p.attention_factor.unwrap_or(if factor <= 1.0 {
        1.0
    } else {
        (1.0 + factor.ln() / (original as f64).ln()).sqrt()
    });
    let stretch = if longest > original { &p.long_factor } else { &p.short_factor };
    (plain.iter().zip(stretch).map(|(f, s)| f / s).collect(), scaling)
}

/// Cosines and sines for each token of a batch.
#[derive(Debug)]
pub struct RotaryTable {
    /// `[tokens, rotated / 2]`
    pub cos: Tensor,
    /// `[tokens, rotated / 2]`
    pub sin: Tensor,
}

impl RotaryTable {
    /// Angles are taken in fp32 (fp64 for fp64 models).
    fn new(f: &Frequencies, positions: &Tensor, kind: Kind) -> Result<Self> {
        let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let inv = Tensor::f_from_slice(&f.inv_freq)?.f_to_kind(wide)?.f_to_device(positions.device())?;
        let angles = positions.f_to_kind(wide)?.f_unsqueeze(1)?.f_mul(&inv.f_unsqueeze(0)?)?;
        let table = |t: Tensor| -> Result<Tensor> { Ok(t.f_mul_scalar(f.scaling)?.f_to_kind(kind)?) };
        Ok(Self { cos: table(angles.f_cos()?)?, sin: table(angles.f_sin()?)? })
    }
}

/// The tables of a batch: of blocks that see everything, and of blocks with a window where those have their own.
#[derive(Debug)]
pub struct RotaryTables {
    all: Option<RotaryTable>,
    local: Option<RotaryTable>,
}

impl RotaryTables {
    /// Tables for `positions` `[tokens]` int64 of texts of up to `longest` tokens, in `kind`; none where positions are
    /// learned.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn new(c: &ModelConfig, positions: &Tensor, longest: i64, kind: Kind) -> Result<Self> {
        if c.layout.embed_positions.is_some() {
            return Ok(Self { all: None, local: None });
        }
        let table = |p| RotaryTable::new(&frequencies_of(c, p, longest), positions, kind);
        Ok(Self { all: Some(table(&c.rope)?), local: c.rope_local.as_ref().map(table).transpose()? })
    }

    /// The table of a block with this window.
    pub fn of(&self, window: Option<i64>) -> Option<&RotaryTable> {
        self.local.as_ref().filter(|_| window.is_some()).or(self.all.as_ref())
    }
}
