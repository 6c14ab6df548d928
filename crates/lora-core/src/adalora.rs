//! AdaLoRA (Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023): the update as triplets
//! `B diag(E) A` like a singular value decomposition (equation 3), of which the least important are pruned while training.

mod allocator;

pub use allocator::{Allocation, BudgetSchedule, KeptTriplets, RankAllocator, Triplets};

use crate::Lora;
use crate::error::{Error, Result};
use lora_torch::{LoraPart, backward, manual_seed};
use tch::{Device, Kind, Tensor};

/// The standard deviation that A and B begin with, as in PEFT.
const INITIAL_DEVIATION: f64 = 0.02;
/// What PEFT adds to the rank before it divides by it, in fp32.
const RANK_OFFSET: f32 = 1e-5;

/// The triplets of one layer: `W + scale · B diag(E) A`.
#[derive(Debug)]
pub struct AdaLora {
    /// `[r, in_features]`: right singular vectors.
    pub a: Tensor,
    /// `[out_features, r]`: left singular vectors.
    pub b: Tensor,
    /// `[r, 1]`: singular values.
    pub e: Tensor,
    /// [`AdaLora::scale_of`]; it stays what it was when triplets go.
    pub scale: f64,
}

impl AdaLora {
    /// `lora_alpha / (init_r + 1e-5)`; an alpha that is not positive stands for the rank.
    pub fn scale_of(lora_alpha: f64, init_r: i64, r: i64) -> f64 {
        let alpha = if lora_alpha > 0.0 { lora_alpha } else { r as f64 };
        alpha / f64::from(init_r as f32 + RANK_OFFSET)
    }

    /// Takes triplets as they stand; there may be none.
    ///
    /// # Errors
    /// [`Error::Shape`] when the three do not fit each other, [`Error::Value`] for a scale that is not finite.
    pub fn from_parts(a: Tensor, b: Tensor, e: Tensor, scale: f64) -> Result<Self> {
        let (sa, sb, se) = (a.size(), b.size(), e.size());
        if sa.len() != 2 || sb.len() != 2 || sa[0] != sb[1] || se != [sa[0], 1] {
            return Err(Error::Shape {
                what: "lora_A, lora_B and lora_E",
                expected: "[r, in], [out, r] and [r, 1]".into(),
                got: format!("{sa:?}, {sb:?} and {se:?}"),
            });
        }
        if !scale.is_finite() {
            return Err(Error::Value { what: "scale", value: scale.to_string(), expected: "a finite number" });
        }
        Ok(Self { a, b, e, scale })
    }

    /// A fresh one, which changes nothing: A and B normal, E zero. Drawn on the CPU from a seed of its own.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn fresh(in_features: i64, out_features: i64, init_r: i64, lora_alpha: f64, seed: u64) -> Result<Self> {
        const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);
        let _drawing = manual_seed(seed);
        let a = Tensor::f_randn([init_r, in_features], CPU)?.f_mul_scalar(INITIAL_DEVIATION)?;
        let b = Tensor::f_randn([out_features, init_r], CPU)?.f_mul_scalar(INITIAL_DEVIATION)?;
        let e = Tensor::f_zeros([init_r, 1], CPU)?;
        Self::from_parts(a, b, e, Self::scale_of(lora_alpha, init_r, init_r))
    }

    /// The number of triplets.
    pub fn r(&self) -> i64 {
        self.a.size()[0]
    }

    pub(crate) fn widths(&self) -> (i64, i64) {
        (self.a.size()[1], self.b.size()[0])
    }

    /// `E ∘ A`: the right side of a plain pair.
    pub(crate) fn scaled_a(&self) -> Result<Tensor> {
        Ok(self.a.f_mul(&self.e)?)
    }

    pub(crate) fn pair<'a>(&'a self, scaled_a: &'a Tensor) -> Option<LoraPart<'a>> {
        (self.r() > 0).then_some(LoraPart { a: scaled_a, b: &self.b, scale: self.scale })
    }

    pub(crate) fn to_lora(&self) -> Result<Lora> {
        Lora::from_parts(self.scaled_a()?.f_detach()?, self.b.f_detach()?, self.scale)
    }
}

/// Adds the gradient of `weight · R` to A and B, and returns R: the mean over all A and B of `‖P Pᵀ - I‖` (Frobenius), which
/// keeps the triplets apart (equation 4, without the square, as PEFT has it). 0 where there is none.
///
/// # Errors
/// What libtorch reports.
pub fn orthogonality(adapters: &[&AdaLora], weight: f64) -> Result<f64> {
    let sides = adapters.iter().flat_map(|l| [(&l.a, false), (&l.b, true)]);
    let mut sum: Option<Tensor> = None;
    for (side, tall) in sides {
        let turned = side.f_tr()?;
        let product = if tall { turned.f_matmul(side)? } else { side.f_matmul(&turned)? };
        let unit = Tensor::f_eye(product.size()[0], (product.kind(), product.device()))?;
        let norm = product.f_sub(&unit)?.f_norm()?;
        sum = Some(match sum {
            Some(sum) => sum.f_add(&norm)?,
            None => norm,
        });
    }
    let Some(sum) = sum else { return Ok(0.0) };
    let mean = sum.f_div_scalar(2.0 * adapters.len() as f64)?;
    if weight != 0.0 && mean.requires_grad() {
        backward(&[&mean], &[&mean.f_full_like(weight)?])?;
    }
    Ok(mean.f_double_value(&[])?)
}
