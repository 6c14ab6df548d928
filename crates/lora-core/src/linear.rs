//! A frozen linear layer with an adapter beside it.

use crate::dora;
use crate::error::{Error, Result};
use crate::init::{Init, init_linear};
use crate::merge::merge_lora;
use crate::spec::LoraSpec;
use crate::{Lora, ParameterCount};
use lora_torch::{LoraPart, Projection, Weight, lora_linear};
use tch::{Kind, Tensor};

/// `y = x Wᵀ + bias + scale · dropout(x) Aᵀ Bᵀ` (Hu et al., 2021, equation 3); with a magnitude, DoRA.
#[derive(Debug)]
pub struct LinearLayer {
    /// `[out_features, in_features]`
    pub weight: Weight,
    /// `[out_features]`
    pub bias: Option<Tensor>,
    /// The adapter, if this layer has one.
    pub lora: Option<Lora>,
}

impl LinearLayer {
    /// A layer without an adapter.
    ///
    /// # Errors
    /// [`Error::Shape`] when `weight` is no matrix or `bias` does not fit it.
    pub fn frozen(weight: impl Into<Weight>, bias: Option<Tensor>) -> Result<Self> {
        let weight = weight.into();
        let size = weight.size();
        if size.len() != 2 {
            return Err(Error::Shape { what: "weight", expected: "[out, in]".into(), got: format!("{size:?}") });
        }
        if let Some(b) = bias.as_ref().filter(|b| b.size() != [size[0]]) {
            return Err(Error::Shape {
                what: "bias",
                expected: format!("[{}]", size[0]),
                got: format!("{:?}", b.size()),
            });
        }
        Ok(Self { weight, bias, lora: None })
    }

    /// Width of the input.
    pub fn in_features(&self) -> i64 {
        self.weight.size()[1]
    }

    /// Width of the output.
    pub fn out_features(&self) -> i64 {
        self.weight.size()[0]
    }

    /// Puts a fresh adapter beside the weight.
    ///
    /// # Errors
    /// [`Error::Value`] when `r` exceeds the smaller side of the weight, where an adapter saves nothing.
    pub fn with_adapter(mut self, spec: LoraSpec, init: Init, seed: u64) -> Result<Self> {
        if spec.r() > self.in_features().min(self.out_features()) {
            return Err(Error::Value {
                what: "r",
                value: spec.r().to_string(),
                expected: "at most the smaller side of the weight",
            });
        }
        self.lora = Some(init_linear(self.in_features(), self.out_features(), spec, init, seed, self.weight.device())?);
        Ok(self)
    }

    /// Puts an existing adapter beside the weight.
    ///
    /// # Errors
    /// [`Error::Shape`] when it does not fit.
    pub fn set_adapter(&mut self, lora: Lora) -> Result<()> {
        let (wanted, got) = ((self.in_features(), self.out_features()), (lora.a.size()[1], lora.b.size()[0]));
        if wanted != got {
            let [expected, got] = [wanted, got].map(|(i, o)| format!("[r, {i}] and [{o}, r]"));
            return Err(Error::Shape { what: "lora_A and lora_B", expected, got });
        }
        self.lora = Some(lora);
        Ok(())
    }

    /// The bias of the layer and, scaled, that of its adapter, in one, for an output in `kind`.
    fn whole_bias(&self, kind: Kind) -> Result<Option<Tensor>> {
        let Some((lora, own)) = self.lora.as_ref().and_then(|l| Some((l, l.bias.as_ref()?))) else {
            return Ok(self.bias.as_ref().map(Tensor::shallow_clone));
        };
        let scaled = own.f_mul_scalar(lora.scale)?.f_to_kind(kind)?;
        Ok(Some(match &self.bias {
            Some(bias) => bias.f_add(&scaled)?,
            None => scaled,
        }))
    }

    fn projection<'a>(&'a self, bias: Option<&'a Tensor>) -> Projection<'a> {
        let adapter = self.lora.as_ref().map(|l| LoraPart { a: &l.a, b: &l.b, scale: l.scale });
        Projection { weight: &self.weight, bias, adapter }
    }

    /// The layer as a head whose logits are never held whole; `None` where an adapter of another form than plain LoRA
    /// stands beside it, whose output has to be computed first.
    pub fn as_plain(&self) -> Option<Projection<'_>> {
        let plain = self.lora.as_ref().is_none_or(|l| l.bias.is_none() && l.magnitude.is_none() && l.gate.is_none());
        plain.then(|| self.projection(self.bias.as_ref()))
    }

    /// Applies the layer; `dropout` is the probability for the adapter's input, 0 in evaluation.
    ///
    /// # Shapes
    /// `[.., in_features]` to `[.., out_features]`.
    ///
    /// # Errors
    /// [`Error::Torch`] when `x` does not fit.
    pub fn forward(&self, x: &Tensor, dropout: f64) -> Result<Tensor> {
        let [y] = forward_many(x, [self], dropout)?;
        Ok(y)
    }

    /// `W + scale · B A`, with a magnitude `(m / n) · (W + scale · B A)`, as a new tensor in the dtype of `W`; of a packed
    /// weight in fp32.
    ///
    /// # Errors
    /// [`Error::NotFinite`] when the result is not finite.
    pub fn merged_weight(&self) -> Result<Tensor> {
        match &self.lora {
            Some(l) => merge_lora(&self.weight.dense()?, l),
            None => Ok(self.weight.dense()?),
        }
    }

    /// The bias of the merged layer: the layer's own and, scaled, that of the adapter.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn merged_bias(&self) -> Result<Option<Tensor>> {
        let kind = self.bias.as_ref().map_or(Kind::Float, Tensor::kind);
        Ok(self.whole_bias(kind)?.map(|b| b.f_detach()).transpose()?)
    }

    /// What the adapter trains against what the weight holds; nothing for a layer without one.
    pub fn count(&self) -> ParameterCount {
        self.lora.as_ref().map_or_else(ParameterCount::default, |l| {
            ParameterCount::of_linear(self.in_features(), self.out_features(), l.r())
        })
    }
}

/// Applies several layers to one input in one autograd node.
///
/// # Errors
/// [`Error::Torch`] when a layer does not fit `x`.
pub fn forward_many<const N: usize>(x: &Tensor, layers: [&LinearLayer; N], dropout: f64) -> Result<[Tensor; N]> {
    let biases: Vec<Option<Tensor>> = layers.iter().map(|l| l.whole_bias(x.kind())).collect::<Result<_>>()?;
    let apart = |l: &LinearLayer| l.lora.as_ref().is_some_and(|a| a.magnitude.is_some() || a.gate.is_some());
    let outputs = if layers.iter().any(|l| apart(l)) {
        let one = |(l, bias): (&&LinearLayer, &Option<Tensor>)| match &l.lora {
            Some(lora @ Lora { magnitude: Some(m), .. }) => {
                dora::forward(x, &l.weight, bias.as_ref(), lora, m, dropout)
            }
            Some(lora @ Lora { gate: Some(gate), .. }) => gated(x, l, bias.as_ref(), lora, gate),
            _ => Ok(lora_linear(x, &[l.projection(bias.as_ref())], dropout)?.remove(0)),
        };
        layers.iter().zip(&biases).map(one).collect::<Result<Vec<_>>>()?
    } else {
        let projections: Vec<_> = layers.iter().zip(&biases).map(|(l, b)| l.projection(b.as_ref())).collect();
        lora_linear(x, &projections, dropout)?
    };
    outputs.try_into().map_err(|o: Vec<_>| Error::Shape {
        what: "outputs",
        expected: N.to_string(),
        got: o.len().to_string(),
    })
}

/// `x Wᵀ + bias + scale · (gate ∘ (x Aᵀ)) Bᵀ`: each token has the ranks that its text's adapters own.
fn gated(x: &Tensor, layer: &LinearLayer, bias: Option<&Tensor>, lora: &Lora, gate: &Tensor) -> Result<Tensor> {
    let base = lora_linear(x, &[Projection { weight: &layer.weight, bias, adapter: None }], 0.0)?.remove(0);
    let low = x.f_matmul(&lora.a.f_to_kind(x.kind())?.f_tr()?)?.f_mul(gate)?;
    Ok(base.f_add(&low.f_matmul(&lora.b.f_to_kind(x.kind())?.f_tr()?)?.f_mul_scalar(lora.scale)?)?)
}
