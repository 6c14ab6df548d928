//! The LoRA linear layer: several projections of one input, each `x Wᵀ + bias + scale · dropout(x) Aᵀ Bᵀ`.

use crate::error::{Error, Result};
use crate::ffi;
use crate::weight::Weight;
use tch::Tensor;

/// The low-rank pair beside a weight (Hu et al., "LoRA", 2021, equation 3).
#[derive(Clone, Copy, Debug)]
pub struct LoraPart<'a> {
    /// `[r, in_features]`
    pub a: &'a Tensor,
    /// `[out_features, r]`
    pub b: &'a Tensor,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)` under rsLoRA.
    pub scale: f64,
}

/// One projection of the input.
#[derive(Clone, Copy, Debug)]
pub struct Projection<'a> {
    /// `[out_features, in_features]`
    pub weight: &'a Weight,
    /// `[out_features]`
    pub bias: Option<&'a Tensor>,
    /// The adapter, if this projection has one.
    pub adapter: Option<LoraPart<'a>>,
}

/// Applies several projections to one input in one autograd node.
///
/// Keeps `x` and the rank-r product `x Aᵀ` for the backward pass, and never makes a gradient or a delta of the size of a
/// frozen weight. `dropout` is the probability with which an input of an adapter is zeroed (0 in evaluation); each
/// adapter draws its own mask.
///
/// # Shapes
/// `x` is `[.., in_features]`; the results are `[.., out_features]`, one for each projection, in the dtype of `x`.
///
/// # Errors
/// [`Error::Shape`] when a matrix does not fit, or what libtorch reports.
pub fn lora_linear(x: &Tensor, projections: &[Projection<'_>], dropout: f64) -> Result<Vec<Tensor>> {
    const OP: &str = "lora_linear";
    let input = x.size();
    let Some(&width) = input.last() else { return Err(Error::shape(OP, "x", "[.., in_features]", input)) };
    if !(0.0..1.0).contains(&dropout) {
        return Err(Error::shape(OP, "dropout", "in [0, 1)", dropout));
    }
    for p in projections {
        let w = p.weight.check(OP, width)?;
        if let Some(bias) = p.bias.filter(|b| b.size() != [w[0]]) {
            return Err(Error::shape(OP, "bias", format!("[{}]", w[0]), bias.size()));
        }
        if let Some(l) = p.adapter {
            let (a, b) = (l.a.size(), l.b.size());
            if a.len() != 2 || a[1] != width {
                return Err(Error::shape(OP, "lora_A", format!("[r, {width}]"), a));
            }
            if b != [w[0], a[0]] {
                return Err(Error::shape(OP, "lora_B", format!("[{}, {}]", w[0], a[0]), b));
            }
        }
    }
    let raw: Vec<_> = projections
        .iter()
        .map(|p| ffi::raw_projection(p.weight, p.bias, p.adapter.map(|l| (l.a, l.b, l.scale))))
        .collect();
    ffi::lora_linear(x, &raw, dropout)
}
