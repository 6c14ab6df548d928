//! Normalisation, rotary embedding, gated activations and dropout: each one pass forward and one pass back.

use crate::error::{Error, Result};
use crate::ffi;
use tch::Tensor;

/// `x / sqrt(mean(x²) + eps) · weight` over the last dimension (Zhang & Sennrich, "Root Mean Square Layer
/// Normalization", 2019, equation 4). Statistics are taken in fp32, or in fp64 for fp64 input.
///
/// # Shapes
/// `x` `[.., d]`, `weight` `[d]`; the result has the shape and dtype of `x`.
///
/// # Errors
/// [`Error::Shape`] when `weight` does not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let size = x.size();
    if size.last().copied() != weight.size().first().copied() || weight.dim() != 1 {
        return Err(Error::shape("rms_norm", "weight", format!("[last of {size:?}]"), weight.size()));
    }
    ffi::rms_norm(x, weight, eps)
}

/// Rotary position embedding (Su et al., "RoFormer", 2021, equation 34) in the half-split layout of the published
/// checkpoints: `(x1, x2) -> (x1·cos - x2·sin, x2·cos + x1·sin)`. Dimensions past the rotated ones pass through.
///
/// # Shapes
/// `x` `[tokens, heads, head_dim]`, `cos` and `sin` `[tokens, rotated / 2]` with `rotated <= head_dim`.
///
/// # Errors
/// [`Error::Shape`] when the tables do not fit.
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (size, table) = (x.size(), cos.size());
    if size.len() != 3 {
        return Err(Error::shape("rotary", "x", "[tokens, heads, head_dim]", size));
    }
    if table.len() != 2 || table[0] != size[0] || 2 * table[1] > size[2] {
        return Err(Error::shape("rotary", "cos", format!("[{}, at most {}]", size[0], size[2] / 2), table));
    }
    if sin.size() != table {
        return Err(Error::shape("rotary", "sin", format!("{table:?}"), sin.size()));
    }
    ffi::rotary(x, cos, sin)
}

/// What a gate is passed through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `x · sigmoid(x)` (Shazeer, "GLU Variants Improve Transformer", 2020, equation 6: SwiGLU)
    Silu,
    /// `x · P(X <= x)` of a normal X (Hendrycks & Gimpel, "Gaussian Error Linear Units", 2016; equation 6 there: GEGLU)
    Gelu,
    /// Its approximation by the hyperbolic tangent, as the same paper gives it.
    GeluTanh,
}

impl Gate {
    /// Its number in the shim.
    pub(crate) fn number(self) -> i32 {
        match self {
            Self::Silu => 0,
            Self::Gelu => 1,
            Self::GeluTanh => 2,
        }
    }
}

/// `act(gate) · up`. Keeps its two inputs only.
///
/// # Errors
/// [`Error::Shape`] when the two shapes differ.
pub fn gated(act: Gate, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.size() != up.size() {
        return Err(Error::shape("gated", "up", format!("{:?}", gate.size()), up.size()));
    }
    ffi::gated(act.number().into(), gate, up)
}

/// `x / (1 - p)`, or 0 where a value is dropped, with probability `p`. Which ones are follows from a key that is drawn from
/// libtorch's generator of the CPU, and is found again on the way back: nothing is kept of them.
///
/// # Errors
/// [`Error::Shape`] when `p` is not in [0, 1).
pub fn dropout(x: &Tensor, p: f64) -> Result<Tensor> {
    if !(0.0..1.0).contains(&p) {
        return Err(Error::shape("dropout", "p", "in [0, 1)", p));
    }
    ffi::dropout(x, p)
}
