//! DoRA (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024): `W' = m · (W + ΔW) / ‖W + ΔW‖`, row by row.

use crate::Lora;
use crate::error::Result;
use lora_torch::{LoraPart, Projection, Weight, lora_linear};
use tch::{Kind, Tensor, no_grad};

/// The norm of each row of `W + scale · B A`, without making that sum:
/// `‖w + d‖² = ‖w‖² + 2 w·d + ‖d‖²`, where the two products with `d` go through the rank.
///
/// # Shapes
/// `weight` `[out, in]`; the result is `[out]`, fp64, detached (the paper's section 4.3 takes it for a constant).
///
/// # Errors
/// What libtorch reports.
pub fn row_norms(weight: &Weight, lora: &Lora) -> Result<Tensor> {
    let wide = |t: &Tensor| t.f_detach()?.f_to_kind(Kind::Double);
    no_grad(|| {
        let (a, b) = (wide(&lora.a)?, wide(&lora.b)?);
        // One pass over the weight, and nothing of its size is made.
        let squares = weight.row_norms()?.f_to_kind(Kind::Double)?.f_square()?;
        // [r, out]: the only product with the weight.
        let rows = lora.a.f_detach()?.f_to_kind(weight.plain().map_or(Kind::Float, Tensor::kind))?;
        let product = lora_linear(&rows, &[Projection { weight, bias: None, adapter: None }], 0.0)?.remove(0);
        let wa = product.f_tr()?.f_to_kind(Kind::Double)?;
        let rows = |t: Tensor| t.f_mul(&b)?.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Double);
        let cross = rows(wa)?.f_mul_scalar(2.0 * lora.scale)?;
        let own = rows(b.f_matmul(&a.f_matmul(&a.f_tr()?)?)?)?.f_mul_scalar(lora.scale * lora.scale)?;
        Ok(squares.f_add(&cross)?.f_add(&own)?.f_clamp_min(0.0)?.f_sqrt()?)
    })
}

/// `m / ‖W + scale · B A‖` in `kind`; gradients reach `m` only.
pub(crate) fn magnitude_ratio(weight: &Weight, lora: &Lora, magnitude: &Tensor, kind: Kind) -> Result<Tensor> {
    let norms = row_norms(weight, lora)?;
    Ok(magnitude.f_to_kind(Kind::Double)?.f_div(&norms)?.f_to_kind(kind)?)
}

/// `bias + (m / n) · (W + scale · B A) x`; under dropout the adapter and what it rescales see the dropped input and the
/// rest the whole one: `W (x - x') + bias + (m / n) · (W + scale · B A) x'`.
pub(crate) fn forward(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Tensor>,
    lora: &Lora,
    magnitude: &Tensor,
    dropout: f64,
) -> Result<Tensor> {
    let ratio = magnitude_ratio(weight, lora, magnitude, x.kind())?;
    let adapter = Some(LoraPart { a: &lora.a, b: &lora.b, scale: lora.scale });
    let turned = |x: &Tensor| -> Result<Tensor> {
        let y = lora_linear(x, &[Projection { weight, bias: None, adapter }], 0.0)?.remove(0);
        Ok(y.f_mul(&ratio)?)
    };
    if dropout > 0.0 {
        let dropped = lora_torch::dropout(x, dropout)?;
        let rest = x.f_sub(&dropped)?;
        let base = lora_linear(&rest, &[Projection { weight, bias, adapter: None }], 0.0)?.remove(0);
        return Ok(base.f_add(&turned(&dropped)?)?);
    }
    let y = turned(x)?;
    Ok(match bias {
        Some(bias) => y.f_add(bias)?,
        None => y,
    })
}
