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

mod count;
mod embedding;
mod error;
mod init;
mod linear;
mod merge;
mod spec;

pub use count::ParameterCount;
pub use embedding::EmbeddingLayer;
pub use error::{Error, Result};
pub use init::{Init, init_embedding, init_linear};
pub use linear::{LinearLayer, forward_many};
pub use merge::{delta, merge_embedding, merge_into, unmerge_from};
pub use spec::LoraSpec;

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
        Ok(Self { a, b, scale })
    }

    /// The rank.
    pub fn r(&self) -> i64 {
        self.a.size()[0]
    }
}
