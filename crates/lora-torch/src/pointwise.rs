//! Normalisation, rotary embedding and the gated activation: each one pass forward and one pass back.

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

/// `silu(gate) · up` (Shazeer, "GLU Variants Improve Transformer", 2020, equation 6). Keeps its two inputs only.
///
/// # Errors
/// [`Error::Shape`] when the two shapes differ.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.size() != up.size() {
        return Err(Error::shape("swiglu", "up", format!("{:?}", gate.size()), up.size()));
    }
    ffi::swiglu(gate, up)
}
