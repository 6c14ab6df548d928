//! LoRA mathematics: a frozen weight `W` and a low-rank update `scale · B A` beside it (Hu et al., "LoRA: Low-Rank
//! Adaptation of Large Language Models", 2021).
//!
//! ```
//! use lora_core::{Init, LoraSpec, LinearLayer, ParameterCount};
//! use tch::{Device, Kind, Tensor};
//!
//! // d = k = 1024, r = 8: 16,384 trained parameters instead of 1,048,576.
//! let spec = LoraSpec::new(8, 16.0, false)?;
//! assert_eq!(ParameterCount::of_linear(1024, 1024, spec.r()), ParameterCount { trained: 16_384, full: 1_048_576 });
//!
//! let weight = Tensor::f_randn([1024, 1024], (Kind::Float, Device::Cpu))?;
//! let layer = LinearLayer::frozen(weight, None)?.with_adapter(spec, Init::Kaiming, 42)?;
//! let x = Tensor::f_randn([4, 1024], (Kind::Float, Device::Cpu))?;
//! let y = layer.forward(&x, 0.0)?;
//!
//! // A fresh adapter changes nothing, and a merged one costs nothing: both are the same product with one matrix.
//! let merged = layer.merged_weight()?;
//! assert!(y.f_allclose(&x.f_matmul(&merged.f_tr()?)?, 1e-4, 1e-4, false)?);
//! # Ok::<(), lora_core::Error>(())
//! ```

mod adalora;
mod adapter;
mod count;
mod dora;
mod embedding;
mod error;
mod init;
mod linear;
mod loftq;
mod merge;
mod mix;
mod principal;
mod spec;
mod stacked;
mod tokens;
mod vera;

pub use adalora::{AdaLora, Allocation, BudgetSchedule, KeptTriplets, RankAllocator, Triplets, orthogonality};
pub use adapter::Adapter;
pub use count::ParameterCount;
pub use dora::row_norms;
pub use embedding::EmbeddingLayer;
pub use error::{Error, Result};
pub use init::{Init, init_embedding, init_linear};
pub use linear::{LinearLayer, forward_many, forward_many_of};
pub use loftq::LoftQ;
pub use merge::{delta, merge_embedding, merge_into, merge_lora, unmerge_from};
pub use mix::{Combination, MajoritySign, MixOptions, MixPart, cut_dense, error_of_mix, mix, padded};
pub use principal::{Principal, residual};
pub use spec::LoraSpec;
pub use stacked::StackedLora;
pub use tokens::TokenRows;
pub use vera::{Vera, VeraProjection};

use tch::Tensor;

/// The trained pair of an adapter and its scale.
///
/// For a linear layer `a` is `[r, in_features]` and `b` `[out_features, r]`; for an embedding `a` is `[r, vocab]` and `b`
/// `[hidden, r]`. Both are fp32 (fp64 in float64 checks), whatever the dtype of the frozen weight.
#[derive(Debug)]
pub struct Lora {
    /// The down-projection.
    pub a: Tensor,
    /// The up-projection.
    pub b: Tensor,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)` under rsLoRA.
    pub scale: f64,
    /// `[out_features]`: a trained bias of the up-projection (`lora_bias`); it is scaled as `B A` is.
    pub bias: Option<Tensor>,
    /// `[out_features]`, for an embedding `[hidden]`: DoRA's trained magnitude.
    pub magnitude: Option<Tensor>,
    /// What `a` and `b` began as, where that was taken out of the frozen weight (PiSSA, OLoRA).
    pub initial: Option<(Tensor, Tensor)>,
    /// `[tokens, r]`: what each rank counts for at each token, where the texts of a batch have adapters of their own.
    pub gate: Option<Tensor>,
}

impl Lora {
    /// Takes a pair as it stands.
    ///
    /// # Errors
    /// [`Error::Shape`] when the ranks of the two differ or one is not a matrix, [`Error::Value`] for a scale that is not finite.
    pub fn from_parts(a: Tensor, b: Tensor, scale: f64) -> Result<Self> {
        let (sa, sb) = (a.size(), b.size());
        if sa.len() != 2 || sb.len() != 2 || sa[0] != sb[1] {
            return Err(Error::Shape {
                what: "lora_A and lora_B",
                expected: "[r, in] and [out, r]".into(),
                got: format!("{sa:?} and {sb:?}"),
            });
        }
        if !scale.is_finite() {
            return Err(Error::Value { what: "scale", value: scale.to_string(), expected: "a finite number" });
        }
        Ok(Self { a, b, scale, bias: None, magnitude: None, initial: None, gate: None })
    }

    /// The same with a bias of the up-projection and a magnitude, where they are given.
    ///
    /// # Errors
    /// [`Error::Shape`] when one of them is not a vector of the rows of `b`.
    pub fn with_vectors(self, bias: Option<Tensor>, magnitude: Option<Tensor>) -> Result<Self> {
        let rows = self.b.size()[0];
        for (what, vector) in [("lora_B.bias", &bias), ("lora_magnitude_vector", &magnitude)] {
            if let Some(v) = vector.as_ref().filter(|v| v.size() != [rows]) {
                return Err(Error::Shape { what, expected: format!("[{rows}]"), got: format!("{:?}", v.size()) });
            }
        }
        Ok(Self { bias, magnitude, ..self })
    }

    /// The rank.
    pub fn r(&self) -> i64 {
        self.a.size()[0]
    }
}
