//! A norm with its weights.

use crate::error::Result;
use crate::layout::NormKind;
use lora_torch::{Origin, rms_norm};
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
        Ok(self.normalised(x)?.y)
    }

    /// The same, with what it takes to make it once more.
    pub(crate) fn normalised(&self, x: &Tensor) -> Result<Normalised> {
        let (kind, eps) = (self.kind, self.eps);
        let (y, weight, bias) = match kind {
            NormKind::Rms => (rms_norm(x, &self.weight, eps)?, self.weight.shallow_clone(), None),
            NormKind::RmsPlusOne => {
                let weight = self.weight.f_add_scalar(1.0)?;
                (rms_norm(x, &weight, eps)?, weight, None)
            }
            NormKind::Layer => {
                let weight = self.weight.f_to_kind(x.kind())?;
                let bias = self.bias.as_ref().map(|b| b.f_to_kind(x.kind())).transpose()?;
                let width = [self.weight.size()[0]];
                let y = Tensor::f_layer_norm(x, width.as_slice(), Some(&weight), bias.as_ref(), eps, true)?;
                (y, weight, bias)
            }
        };
        Ok(Normalised { y, x: x.shallow_clone(), weight, bias, kind, eps })
    }
}

/// What a norm gave, and what it was given.
pub(crate) struct Normalised {
    pub(crate) y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    kind: NormKind,
    eps: f64,
}

impl Normalised {
    pub(crate) fn origin(&self) -> Origin<'_> {
        let Self { x, weight, bias, kind, eps, .. } = self;
        match kind {
            NormKind::Layer => Origin::LayerNorm { x, weight, bias: bias.as_ref(), eps: *eps },
            NormKind::Rms | NormKind::RmsPlusOne => Origin::RmsNorm { x, weight, eps: *eps },
        }
    }
}

/// What a layer reads: something that is there in any case, or what a norm made of it.
pub(crate) enum Read {
    Plain(Tensor),
    Normalised(Normalised),
}

impl Read {
    pub(crate) fn of(norm: Option<&NormLayer>, x: &Tensor) -> Result<Self> {
        Ok(match norm {
            Some(norm) => Self::Normalised(norm.normalised(x)?),
            None => Self::Plain(x.shallow_clone()),
        })
    }

    pub(crate) fn tensor(&self) -> &Tensor {
        match self {
            Self::Plain(t) => t,
            Self::Normalised(n) => &n.y,
        }
    }

    /// Its origin, where inputs are made again.
    pub(crate) fn origin(&self, remake: bool) -> Option<Origin<'_>> {
        match self {
            Self::Normalised(n) if remake => Some(n.origin()),
            _ => None,
        }
    }
}
