//! A norm with its weights.

use crate::error::Result;
use crate::layout::NormKind;
use lora_torch::rms_norm;
use tch::Tensor;

/// A norm over the last dimension.
#[derive(Debug)]
pub struct NormLayer {
    /// `[width]`
    pub weight: Tensor,
    /// `[width]`, of a LayerNorm
    pub bias: Option<Tensor>,
    /// How it is computed.
    pub kind: NormKind,
    /// Added to the mean square.
    pub eps: f64,
}

impl NormLayer {
    /// `[.., width]` to the same.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self.kind {
            NormKind::Rms => rms_norm(x, &self.weight, self.eps)?,
            NormKind::RmsPlusOne => rms_norm(x, &self.weight.f_add_scalar(1.0)?, self.eps)?,
            NormKind::Layer => {
                let weight = self.weight.f_to_kind(x.kind())?;
                let bias = self.bias.as_ref().map(|b| b.f_to_kind(x.kind())).transpose()?;
                Tensor::f_layer_norm(
                    x,
                    [self.weight.size()[0]].as_slice(),
                    Some(&weight),
                    bias.as_ref(),
                    self.eps,
                    true,
                )?
            }
        })
    }
}
