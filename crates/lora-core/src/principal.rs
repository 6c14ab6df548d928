//! Starts that take the trained part out of the frozen weight: PiSSA (Meng et al., "PiSSA: Principal Singular Values and
//! Singular Vectors Adaptation", 2024) and OLoRA (Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation", 2024).
//!
//! Both leave `W - scale · B A` in the base, so that the adapted layer starts as it was. What is saved must not depend on a
//! changed base: [`Lora::converted`] gives a plain adapter over the unchanged weight, of twice the rank.

use crate::Lora;
use crate::error::Result;
use crate::spec::LoraSpec;
use tch::{Kind, Tensor, no_grad};

/// Columns that a fast SVD samples beyond the rank (Halko et al., 2011, section 4.2).
const OVERSAMPLING: i64 = 6;

/// Which part of the weight is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Principal {
    /// The first singular triplets, by an exact SVD.
    Pissa,
    /// The same by a randomised SVD with so many power iterations (Halko et al., 2011, algorithms 4.4 and 5.1).
    PissaFast(u32),
    /// The first columns of Q and rows of R of a QR decomposition.
    Olora,
}

impl Principal {
    /// From PEFT's `init_lora_weights`; `None` for a start that leaves the base alone, or one that is not known.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "pissa" => Some(Self::Pissa),
            "olora" => Some(Self::Olora),
            _ => name.strip_prefix("pissa_niter_")?.parse().ok().map(Self::PissaFast),
        }
    }

    /// The adapter that begins as this part of `weight`; its tensors are not yet trained leaves.
    ///
    /// # Shapes
    /// `weight` `[out, in]`.
    ///
    /// # Errors
    /// What libtorch reports, as for a weight that is not finite.
    pub fn start(self, weight: &Tensor, spec: LoraSpec, seed: u64) -> Result<Lora> {
        let (r, scale) = (spec.r(), spec.scale());
        no_grad(|| {
            let w = weight.f_detach()?.f_to_kind(Kind::Float)?;
            let (a, b) = match self {
                Self::Olora => {
                    let (q, rest) = Tensor::f_linalg_qr(&w, "reduced")?;
                    (rest.f_narrow(0, 0, r)?, q.f_narrow(1, 0, r)?)
                }
                Self::Pissa => {
                    let (u, s, vh) = svd(&w)?;
                    split(&u.f_narrow(1, 0, r)?, &s.f_narrow(0, 0, r)?, &vh.f_narrow(0, 0, r)?, scale)?
                }
                Self::PissaFast(iterations) => {
                    let (u, s, vh) = fast_svd(&w, r, iterations, seed)?;
                    split(&u, &s, &vh, scale)?
                }
            };
            Lora::from_parts(a.f_contiguous()?, b.f_contiguous()?, scale)
        })
    }
}

/// `sqrt(S / scale)` into both factors.
pub(crate) fn split(u: &Tensor, s: &Tensor, vh: &Tensor, scale: f64) -> Result<(Tensor, Tensor)> {
    let root = s.f_div_scalar(scale)?.f_sqrt()?;
    Ok((root.f_unsqueeze(1)?.f_mul(vh)?, u.f_mul(&root.f_unsqueeze(0)?)?))
}

/// The first `r` singular triplets by random projection.
fn fast_svd(w: &Tensor, r: i64, iterations: u32, seed: u64) -> Result<(Tensor, Tensor, Tensor)> {
    let size = w.size();
    let columns = (r + OVERSAMPLING).min(size[0]).min(size[1]);
    let _drawing = lora_torch::manual_seed(seed);
    let random = Tensor::f_randn([size[1], columns], (Kind::Float, tch::Device::Cpu))?.f_to_device(w.device())?;
    let mut q = orthonormal(&w.f_matmul(&random)?)?;
    for _ in 0..iterations {
        let z = orthonormal(&w.f_tr()?.f_matmul(&q)?)?;
        q = orthonormal(&w.f_matmul(&z)?)?;
    }
    let (u, s, vh) = svd(&q.f_tr()?.f_matmul(w)?)?;
    Ok((q.f_matmul(&u)?.f_narrow(1, 0, r)?, s.f_narrow(0, 0, r)?, vh.f_narrow(0, 0, r)?))
}

fn orthonormal(t: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_linalg_qr(t, "reduced")?.0)
}

pub(crate) fn svd(t: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let (u, s, v) = t.f_svd(true, true)?;
    Ok((u, s, v.f_tr()?))
}

/// What stays in the base: `W - scale · B A`, in the dtype of `W`.
///
/// # Errors
/// As [`crate::merge_into`].
pub fn residual(weight: &Tensor, start: &Lora) -> Result<Tensor> {
    crate::merge_into(weight, &start.a, &start.b, -start.scale)
}

impl Lora {
    /// `a` and `b` of a plain adapter over the unchanged weight: `[A; A0]` and `[B, -B0]`, whose product is
    /// `B A - B0 A0`. An adapter that left the base alone is given as it is.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn converted(&self) -> Result<(Tensor, Tensor)> {
        let Some((a0, b0)) = &self.initial else { return Ok((self.a.shallow_clone(), self.b.shallow_clone())) };
        let (a, b) = (self.a.f_detach()?, self.b.f_detach()?);
        Ok((Tensor::f_cat(&[&a, a0], 0)?, Tensor::f_cat(&[&b, &b0.f_neg()?], 1)?))
    }
}
