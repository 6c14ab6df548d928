//! LoftQ (Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023, algorithm 1): the base is
//! packed, and the adapter begins as what packing lost.
//!
//! As PEFT computes it: `Q` is NF4 without double quantisation, and an iteration is `Q = pack(W - L R)`,
//! `L R = svd_r(W - Q)`. PEFT puts `L` and `R` into the adapter as they are, so that its layer begins as `Q + scale · L R`;
//! here they are divided by the scale first, and the layer begins as `Q + L R`, as the paper has it. What lies under the
//! adapter is the same `Q`, so that files go both ways.

use crate::Lora;
use crate::error::Result;
use crate::principal::{split, svd};
use crate::spec::LoraSpec;
use lora_torch::Nf4;
use tch::{Kind, Tensor, no_grad};

/// How often the weight is packed and its loss taken into the adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoftQ {
    /// 1 or more; 1 packs the weight itself.
    pub iterations: u32,
}

impl LoftQ {
    /// The name in PEFT's `init_lora_weights`.
    pub const NAME: &str = "loftq";

    /// What lies under the adapter in the place of `weight`.
    ///
    /// # Shapes
    /// `weight` `[out, in]`.
    ///
    /// # Errors
    /// What libtorch reports, as for a weight that is not finite.
    pub fn base(self, weight: &Tensor, r: i64) -> Result<Nf4> {
        no_grad(|| {
            let w = weight.f_detach()?.f_to_kind(Kind::Float)?;
            let mut packed = Nf4::pack(&w, false)?;
            for _ in 1..self.iterations {
                let (u, s, vh) = lost(&w, &packed, r)?;
                let low_rank = u.f_mul(&s.f_unsqueeze(0)?)?.f_matmul(&vh)?;
                packed = Nf4::pack(&w.f_sub(&low_rank)?, false)?;
            }
            Ok(packed)
        })
    }

    /// The packed base and the adapter that begins as what it lost; its tensors are not yet trained leaves.
    ///
    /// # Shapes
    /// `weight` `[out, in]`.
    ///
    /// # Errors
    /// As [`base`](Self::base).
    pub fn start(self, weight: &Tensor, spec: LoraSpec) -> Result<(Nf4, Lora)> {
        let packed = self.base(weight, spec.r())?;
        no_grad(|| {
            let (u, s, vh) = lost(&weight.f_detach()?.f_to_kind(Kind::Float)?, &packed, spec.r())?;
            let (a, b) = split(&u, &s, &vh, spec.scale())?;
            let lora = Lora::from_parts(a.f_contiguous()?, b.f_contiguous()?, spec.scale())?;
            Ok((packed, lora))
        })
    }
}

/// The first `r` singular triplets of `w - packed`.
fn lost(w: &Tensor, packed: &Nf4, r: i64) -> Result<(Tensor, Tensor, Tensor)> {
    let dense = packed.dense_rows(0, w.size()[0])?;
    let (u, s, vh) = svd(&w.f_sub(&dense)?)?;
    Ok((u.f_narrow(1, 0, r)?, s.f_narrow(0, 0, r)?, vh.f_narrow(0, 0, r)?))
}
