//! The LoRA linear layer: several projections of one input, each `x Wᵀ + bias + scale · dropout(x) Aᵀ Bᵀ`.

use crate::error::{Error, Result};
use crate::ffi;
use crate::pointwise::Gate;
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

/// How an input was made, for a backward pass that makes it once more instead of keeping it. Its parts are what the operation
/// that made it keeps in any case.
#[derive(Clone, Copy, Debug)]
pub enum Origin<'a> {
    /// [`rms_norm`](crate::rms_norm())
    RmsNorm {
        /// What was normalised.
        x: &'a Tensor,
        /// `[width]`
        weight: &'a Tensor,
        /// As it was given.
        eps: f64,
    },
    /// libtorch's `layer_norm` over the last dimension.
    LayerNorm {
        /// What was normalised.
        x: &'a Tensor,
        /// `[width]`
        weight: &'a Tensor,
        /// `[width]`
        bias: Option<&'a Tensor>,
        /// As it was given.
        eps: f64,
    },
    /// [`gated`](crate::gated())
    Gated {
        /// What the gate was passed through.
        act: Gate,
        /// Contiguous.
        gate: &'a Tensor,
        /// Contiguous.
        up: &'a Tensor,
    },
}

impl Origin<'_> {
    fn raw(&self) -> ffi::RawOrigin {
        let none = std::ptr::null();
        match *self {
            Self::RmsNorm { x, weight, eps } => {
                ffi::RawOrigin { parts: [x.as_ptr(), weight.as_ptr(), none], eps, form: 1 }
            }
            Self::LayerNorm { x, weight, bias, eps } => {
                let bias = bias.map_or(none, Tensor::as_ptr);
                ffi::RawOrigin { parts: [x.as_ptr(), weight.as_ptr(), bias], eps, form: 2 }
            }
            Self::Gated { act, gate, up } => {
                ffi::RawOrigin { parts: [gate.as_ptr(), up.as_ptr(), none], eps: 0.0, form: 3 + act.number() }
            }
        }
    }
}

/// Applies several projections to one input in one autograd node.
///
/// Keeps `x` and the rank-r product `x Aᵀ` for the backward pass, and never makes a gradient or a delta of the size of a
/// frozen weight. `dropout` is the probability with which an input of an adapter is zeroed (0 in evaluation); each
/// adapter draws its own values, as [`dropout`](crate::dropout()) does.
///
/// # Shapes
/// `x` is `[.., in_features]`; the results are `[.., out_features]`, one for each projection, in the dtype of `x`.
///
/// # Errors
/// [`Error::Shape`] when a matrix does not fit, or what libtorch reports.
pub fn lora_linear(x: &Tensor, projections: &[Projection<'_>], dropout: f64) -> Result<Vec<Tensor>> {
    lora_linear_of(x, None, projections, dropout)
}

/// The same of an input that is not kept where its origin is told: the same numbers, and the same gradients bit for bit.
///
/// # Errors
/// As [`lora_linear`].
pub fn lora_linear_of(
    x: &Tensor,
    origin: Option<Origin<'_>>,
    projections: &[Projection<'_>],
    dropout: f64,
) -> Result<Vec<Tensor>> {
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
    ffi::lora_linear(x, origin.map(|o| o.raw()).as_ref(), &raw, dropout)
}
