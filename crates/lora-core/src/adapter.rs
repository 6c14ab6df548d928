//! What may stand beside the weight of a linear layer: the one place that tells methods apart.

use crate::error::{Error, Result};
use crate::{AdaLora, Lora, Vera};
use lora_torch::LoraPart;
use tch::Tensor;

/// An adapter of a linear layer, by its method.
///
/// Every method adds a product of two thin matrices; they differ in what these are made of and in what is trained.
#[derive(Debug)]
pub enum Adapter {
    /// A trained pair, with its options (rsLoRA, DoRA, PiSSA, ...).
    Lora(Lora),
    /// Trained vectors around a random pair that all layers share.
    Vera(Vera),
    /// A trained pair with a trained diagonal between, whose triplets are pruned while training.
    AdaLora(AdaLora),
}

impl From<Lora> for Adapter {
    fn from(lora: Lora) -> Self {
        Self::Lora(lora)
    }
}

impl From<Vera> for Adapter {
    fn from(vera: Vera) -> Self {
        Self::Vera(vera)
    }
}

impl From<AdaLora> for Adapter {
    fn from(adalora: AdaLora) -> Self {
        Self::AdaLora(adalora)
    }
}

impl Adapter {
    /// The widths of what it reads and of what it adds to.
    pub fn widths(&self) -> (i64, i64) {
        match self {
            Self::Lora(l) => (l.a.size()[1], l.b.size()[0]),
            Self::Vera(v) => v.widths(),
            Self::AdaLora(a) => a.widths(),
        }
    }

    /// The pair of plain LoRA, with its options; `None` for another method.
    pub fn as_lora(&self) -> Option<&Lora> {
        match self {
            Self::Lora(lora) => Some(lora),
            _ => None,
        }
    }

    /// Its tensors by their names in an adapter file, behind the module's path; those that are trained among them.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::Lora(l) => {
                let pair = [("lora_A.weight", &l.a), ("lora_B.weight", &l.b)];
                let vectors = [("lora_B.bias", &l.bias), ("lora_magnitude_vector", &l.magnitude)];
                pair.into_iter().chain(vectors.into_iter().filter_map(|(n, t)| Some((n, t.as_ref()?)))).collect()
            }
            Self::Vera(v) => vec![("vera_lambda_b", &v.lambda_b), ("vera_lambda_d", &v.lambda_d)],
            Self::AdaLora(a) => vec![("lora_A", &a.a), ("lora_B", &a.b), ("lora_E", &a.e)],
        }
    }

    /// How many numbers it trains.
    pub fn trained(&self) -> i64 {
        self.tensors().iter().map(|(_, t)| t.numel() as i64).sum()
    }

    /// The same change of the weight as a plain pair, detached: what can be merged, weighted and mixed. Of LoRA itself, the
    /// pair with its vectors and without what it began as.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn to_lora(&self) -> Result<Lora> {
        match self {
            Self::Lora(l) => {
                let vector = |t: &Option<Tensor>| t.as_ref().map(Tensor::f_detach).transpose();
                Lora::from_parts(l.a.f_detach()?, l.b.f_detach()?, l.scale)?
                    .with_vectors(vector(&l.bias)?, vector(&l.magnitude)?)
            }
            Self::Vera(v) => v.to_lora(),
            Self::AdaLora(a) => a.to_lora(),
        }
    }

    /// The same with each tensor that is trained made anew, as a leaf on another device.
    ///
    /// # Errors
    /// What `each` reports.
    pub fn map_trained<E>(
        self,
        each: impl Fn(&Tensor) -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<Self, E> {
        let optional = |t: &Option<Tensor>| t.as_ref().map(&each).transpose();
        Ok(match self {
            Self::Lora(l) => {
                let (a, b) = (each(&l.a)?, each(&l.b)?);
                let (bias, magnitude) = (optional(&l.bias)?, optional(&l.magnitude)?);
                Self::Lora(Lora { a, b, bias, magnitude, ..l })
            }
            Self::Vera(v) => {
                let (lambda_d, lambda_b) = (each(&v.lambda_d)?, each(&v.lambda_b)?);
                Self::Vera(Vera { lambda_d, lambda_b, ..v })
            }
            Self::AdaLora(l) => {
                Self::AdaLora(AdaLora { a: each(&l.a)?, b: each(&l.b)?, e: each(&l.e)?, scale: l.scale })
            }
        })
    }

    /// Another handle to the same tensors.
    pub fn share(&self) -> Self {
        let optional = |t: &Option<Tensor>| t.as_ref().map(Tensor::shallow_clone);
        match self {
            Self::Lora(l) => Self::Lora(Lora {
                a: l.a.shallow_clone(),
                b: l.b.shallow_clone(),
                scale: l.scale,
                bias: optional(&l.bias),
                magnitude: optional(&l.magnitude),
                initial: l.initial.as_ref().map(|(a, b)| (a.shallow_clone(), b.shallow_clone())),
                gate: optional(&l.gate),
            }),
            Self::Vera(v) => Self::Vera(v.share()),
            Self::AdaLora(l) => Self::AdaLora(AdaLora {
                a: l.a.shallow_clone(),
                b: l.b.shallow_clone(),
                e: l.e.shallow_clone(),
                scale: l.scale,
            }),
        }
    }

    /// What has to be made of the leaves before there is a pair to multiply with; nothing for most methods.
    pub(crate) fn made(&self) -> Result<Option<Tensor>> {
        match self {
            Self::AdaLora(a) => a.scaled_a().map(Some),
            _ => Ok(None),
        }
    }

    /// The pair for the fused product, given what [`Adapter::made`] returned; `None` where the output is added otherwise.
    pub(crate) fn pair<'a>(&'a self, made: Option<&'a Tensor>) -> Option<LoraPart<'a>> {
        match self {
            Self::Lora(l) => Some(LoraPart { a: &l.a, b: &l.b, scale: l.scale }),
            Self::AdaLora(a) => a.pair(made?),
            Self::Vera(_) => None,
        }
    }

    /// Refuses an adapter of other widths than a layer's.
    pub(crate) fn check(&self, in_features: i64, out_features: i64) -> Result<()> {
        let (wanted, got) = ((in_features, out_features), self.widths());
        if wanted == got {
            return Ok(());
        }
        let [expected, got] = [wanted, got].map(|(i, o)| format!("[r, {i}] and [{o}, r]"));
        Err(Error::Shape { what: "lora_A and lora_B", expected, got })
    }
}
