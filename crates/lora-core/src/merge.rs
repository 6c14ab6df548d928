//! Merging: always into a new tensor, computed in fp32 (fp64 for fp64 weights) and rounded once.

use crate::Lora;
use crate::dora::magnitude_ratio;
use crate::error::{Error, Result};
use tch::{Kind, Tensor};

/// `scale · B A` in `kind`.
///
/// # Shapes
/// `a` `[r, in]`, `b` `[out, r]`; the result is `[out, in]`.
///
/// # Errors
/// [`Error::Torch`] when the two do not fit.
pub fn delta(a: &Tensor, b: &Tensor, scale: f64, kind: Kind) -> Result<Tensor> {
    let (a, b) = (a.f_detach()?.f_to_kind(kind)?, b.f_detach()?.f_to_kind(kind)?);
    Ok(b.f_matmul(&a)?.f_mul_scalar(scale)?)
}

/// `W + scale · B A`, in the dtype of `W`.
///
/// # Shapes
/// `weight` `[out, in]`, `a` `[r, in]`, `b` `[out, r]`.
///
/// # Errors
/// [`Error::Shape`] when the update does not fit, [`Error::NotFinite`] when the result is not finite.
pub fn merge_into(weight: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    add(weight, &delta(a, b, scale, wide(weight))?)
}

/// `W + scale · (B A)ᵀ` for an embedding table.
///
/// # Shapes
/// `weight` `[vocab, hidden]`, `a` `[r, vocab]`, `b` `[hidden, r]`.
///
/// # Errors
/// As [`merge_into`].
pub fn merge_embedding(weight: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    add(weight, &delta(a, b, scale, wide(weight))?.f_tr()?)
}

/// The weight of a layer with all that its adapter does to it: `W + scale · B A`, and with a magnitude
/// `(m / n) · (W + scale · B A)` (DoRA, equation 5), in the dtype of `W`.
///
/// # Errors
/// As [`merge_into`].
pub fn merge_lora(weight: &Tensor, lora: &Lora) -> Result<Tensor> {
    let Some(magnitude) = &lora.magnitude else { return merge_into(weight, &lora.a, &lora.b, lora.scale) };
    let kind = wide(weight);
    let sum = weight.f_detach()?.f_to_kind(kind)?.f_add(&delta(&lora.a, &lora.b, lora.scale, kind)?)?;
    let ratio = magnitude_ratio(&weight.shallow_clone().into(), lora, &magnitude.f_detach()?, kind)?;
    finite(sum.f_mul(&ratio.f_unsqueeze(1)?)?.f_to_kind(weight.kind())?)
}

/// `W' - scale · B A`: takes an update out again; exact up to one rounding of the dtype.
///
/// # Errors
/// As [`merge_into`].
pub fn unmerge_from(merged: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    merge_into(merged, a, b, -scale)
}

fn wide(weight: &Tensor) -> Kind {
    if weight.kind() == Kind::Double { Kind::Double } else { Kind::Float }
}

fn add(weight: &Tensor, delta: &Tensor) -> Result<Tensor> {
    let (w, d) = (weight.size(), delta.size());
    if w != d {
        return Err(Error::Shape { what: "the update", expected: format!("{w:?}"), got: format!("{d:?}") });
    }
    finite(weight.f_detach()?.f_to_kind(delta.kind())?.f_add(delta)?.f_to_kind(weight.kind())?)
}

fn finite(merged: Tensor) -> Result<Tensor> {
    // The sum is finite only if every entry is; entries near the dtype's limit can overflow it, so count before refusing.
    if !merged.f_sum(Kind::Double)?.f_double_value(&[])?.is_finite() {
        let count = merged.f_isfinite()?.f_logical_not()?.f_sum(Kind::Int64)?.f_int64_value(&[])?;
        if count > 0 {
            return Err(Error::NotFinite { count });
        }
    }
    Ok(merged)
}
