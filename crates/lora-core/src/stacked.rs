//! An adapter of stacked matrices: the experts of a layer in one tensor `[E, out, in]`, with one A and one B for all of them,
//! as PEFT holds adapters of bare parameters.

use crate::error::{Error, Result};
use crate::init::{Init, init_linear};
use crate::merge::delta;
use crate::spec::LoraSpec;
use tch::{Device, Kind, Tensor};

/// `W[e] + scale · B[e] A[e]` for each expert e.
#[derive(Debug)]
pub struct StackedLora {
    /// `[E · r, in]`, taken as `[E, r, in]`.
    pub a: Tensor,
    /// `[out, r · E]`, taken as `[out, r, E]`.
    pub b: Tensor,
    /// E, the number of experts.
    pub experts: i64,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)` under rsLoRA.
    pub scale: f64,
}

impl StackedLora {
    /// Takes a pair as it stands.
    ///
    /// # Errors
    /// [`Error::Shape`] when the two do not fit each other or the number of experts.
    pub fn from_parts(a: Tensor, b: Tensor, experts: i64, scale: f64) -> Result<Self> {
        let (size_a, size_b) = (a.size(), b.size());
        let rows = size_a.first().copied().unwrap_or(0);
        if size_a.len() != 2 || size_b.len() != 2 || size_b[1] != rows || experts < 1 || rows < 1 || rows % experts != 0
        {
            return Err(Error::Shape {
                what: "lora_A and lora_B of stacked matrices",
                expected: format!("[{experts} · r, in] and [out, r · {experts}]"),
                got: format!("{size_a:?} and {size_b:?}"),
            });
        }
        if !scale.is_finite() {
            return Err(Error::Value { what: "scale", value: scale.to_string(), expected: "a finite number" });
        }
        Ok(Self { a, b, experts, scale })
    }

    /// A fresh adapter, as PEFT draws one: A as for a layer of `in` inputs, B zero unless all is random.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn fresh(
        (experts, input, output): (i64, i64, i64),
        spec: LoraSpec,
        init: Init,
        seed: u64,
        device: Device,
    ) -> Result<Self> {
        let r = spec.r();
        let all = init_linear(input, output, LoraSpec::new(r * experts, 1.0, false)?, init, seed, device)?;
        if init == Init::Gaussian {
            // The deviation is 1 / r of one expert's rank.
            let _a = tch::no_grad(|| all.a.shallow_clone().f_mul_scalar_(experts as f64))?;
        }
        Self::from_parts(all.a, all.b, experts, spec.scale())
    }

    /// The rank that each expert has.
    pub fn r(&self) -> i64 {
        self.a.size()[0] / self.experts
    }

    /// Width of an expert's input.
    pub fn in_features(&self) -> i64 {
        self.a.size()[1]
    }

    /// Width of an expert's output.
    pub fn out_features(&self) -> i64 {
        self.b.size()[0]
    }

    /// `[E, r, in]` and `[E, out, r]`, views of the two; gradients of a view arrive in the whole.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn views(&self) -> Result<(Tensor, Tensor)> {
        let (e, r) = (self.experts, self.r());
        let a = self.a.f_view([e, r, self.in_features()])?;
        let b = self.b.f_view([self.out_features(), r, e])?.f_permute([2, 0, 1])?;
        Ok((a, b))
    }

    /// A `[r, in]` and B `[out, r]` of every expert: one autograd node for each of the two, however many experts there are.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn parts(&self) -> Result<Vec<(Tensor, Tensor)>> {
        let (a, b) = self.views()?;
        Ok(a.f_unbind(0)?.into_iter().zip(b.f_unbind(0)?).collect())
    }

    /// `scale · B[e] A[e]` of one expert, `[out, in]`, in `kind`.
    ///
    /// # Errors
    /// What libtorch reports, as for an expert that is not there.
    pub fn delta_of(&self, expert: i64, kind: Kind) -> Result<Tensor> {
        let (a, b) = self.views()?;
        delta(&a.f_select(0, expert)?, &b.f_select(0, expert)?, self.scale, kind)
    }

    /// The exact weighted sum of several: ranks side by side, expert by expert, and weights and scales in B.
    ///
    /// # Errors
    /// [`Error::Shape`] for adapters of other numbers of experts or widths.
    pub fn combined(parts: &[(&Self, f64)]) -> Result<Self> {
        let experts = parts.first().map_or(0, |(first, _)| first.experts);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for (lora, weight) in parts {
            let (e, r) = (lora.experts, lora.r());
            a.push(lora.a.f_view([e, r, lora.in_features()])?);
            b.push(lora.b.f_view([lora.out_features(), r, e])?.f_mul_scalar(lora.scale * weight)?);
        }
        let (a, b) = (Tensor::f_cat(&a, 1)?, Tensor::f_cat(&b, 1)?);
        Self::from_parts(a.f_flatten(0, 1)?, b.f_flatten(1, 2)?, experts, 1.0)
    }
}
