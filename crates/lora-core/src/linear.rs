//! A frozen linear layer with an adapter beside it.

use crate::dora;
use crate::error::{Error, Result};
use crate::init::{Init, init_linear};
use crate::merge::merge_lora;
use crate::spec::LoraSpec;
use crate::{Adapter, Lora, ParameterCount, Vera};
use lora_torch::{Origin, Projection, Weight, lora_linear, lora_linear_of};
use tch::{Kind, Tensor};

/// `y = x Wᵀ + bias + scale · dropout(x) Aᵀ Bᵀ` (Hu et al., 2021, equation 3); with a magnitude, DoRA.
#[derive(Debug)]
pub struct LinearLayer {
    /// `[out_features, in_features]`
    pub weight: Weight,
    /// `[out_features]`
    pub bias: Option<Tensor>,
    /// What stands beside the weight, if this layer has an adapter.
    pub adapter: Option<Adapter>,
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
        Ok(Self { weight, bias, adapter: None })
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
        let lora = init_linear(self.in_features(), self.out_features(), spec, init, seed, self.weight.device())?;
        self.adapter = Some(lora.into());
        Ok(self)
    }

    /// Puts an existing adapter beside the weight.
    ///
    /// # Errors
    /// [`Error::Shape`] when it does not fit.
    pub fn set_adapter(&mut self, adapter: impl Into<Adapter>) -> Result<()> {
        let adapter = adapter.into();
        adapter.check(self.in_features(), self.out_features())?;
        self.adapter = Some(adapter);
        Ok(())
    }

    /// The adapter, where it is LoRA.
    pub fn lora(&self) -> Option<&Lora> {
        self.adapter.as_ref()?.as_lora()
    }

    fn vera(&self) -> Option<&Vera> {
        match &self.adapter {
            Some(Adapter::Vera(vera)) => Some(vera),
            _ => None,
        }
    }

    /// The bias of the layer and, scaled, that of its adapter, in one, for an output in `kind`.
    fn whole_bias(&self, kind: Kind) -> Result<Option<Tensor>> {
        let Some((lora, own)) = self.lora().and_then(|l| Some((l, l.bias.as_ref()?))) else {
            return Ok(self.bias.as_ref().map(Tensor::shallow_clone));
        };
        let scaled = own.f_mul_scalar(lora.scale)?.f_to_kind(kind)?;
        Ok(Some(match &self.bias {
            Some(bias) => bias.f_add(&scaled)?,
            None => scaled,
        }))
    }

    /// `made` is what [`Adapter::made`] gave.
    fn projection<'a>(&'a self, bias: Option<&'a Tensor>, made: Option<&'a Tensor>) -> Projection<'a> {
        let adapter = self.adapter.as_ref().and_then(|a| a.pair(made));
        Projection { weight: &self.weight, bias, adapter }
    }

    /// The layer as a head whose logits are never held whole; `None` where an adapter of another form than plain LoRA
    /// stands beside it, whose output has to be computed first.
    pub fn as_plain(&self) -> Option<Projection<'_>> {
        let plain = self
            .adapter
            .as_ref()
            .is_none_or(|a| a.as_lora().is_some_and(|l| l.bias.is_none() && l.magnitude.is_none() && l.gate.is_none()));
        plain.then(|| self.projection(self.bias.as_ref(), None))
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
        match &self.adapter {
            Some(Adapter::Lora(l)) => merge_lora(&self.weight.dense()?, l),
            Some(other) => merge_lora(&self.weight.dense()?, &other.to_lora()?),
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
        self.adapter.as_ref().map_or_else(ParameterCount::default, |a| ParameterCount {
            trained: a.trained(),
            full: self.in_features() * self.out_features(),
        })
    }
}

/// Applies several layers to one input in one autograd node.
///
/// # Errors
/// [`Error::Torch`] when a layer does not fit `x`.
pub fn forward_many<const N: usize>(x: &Tensor, layers: [&LinearLayer; N], dropout: f64) -> Result<[Tensor; N]> {
    forward_many_of(x, None, layers, dropout)
}

/// The same of an input that the backward pass makes once more, where its origin is told, instead of keeping it. DoRA and gated
/// adapters keep it all the same.
///
/// # Errors
/// As [`forward_many`].
pub fn forward_many_of<const N: usize>(
    x: &Tensor,
    origin: Option<Origin<'_>>,
    layers: [&LinearLayer; N],
    dropout: f64,
) -> Result<[Tensor; N]> {
    let biases: Vec<Option<Tensor>> = layers.iter().map(|l| l.whole_bias(x.kind())).collect::<Result<_>>()?;
    let made: Vec<Option<Tensor>> =
        layers.iter().map(|l| l.adapter.as_ref().map_or(Ok(None), Adapter::made)).collect::<Result<_>>()?;
    let apart = |l: &LinearLayer| l.lora().is_some_and(|a| a.magnitude.is_some() || a.gate.is_some());
    let outputs = if layers.iter().any(|l| apart(l)) {
        let one = |((l, bias), made): ((&&LinearLayer, &Option<Tensor>), &Option<Tensor>)| match l.lora() {
            Some(lora @ Lora { magnitude: Some(m), .. }) => {
                dora::forward(x, &l.weight, bias.as_ref(), lora, m, dropout)
            }
            Some(lora @ Lora { gate: Some(gate), .. }) => gated(x, l, bias.as_ref(), lora, gate),
            _ => Ok(lora_linear(x, &[l.projection(bias.as_ref(), made.as_ref())], dropout)?.remove(0)),
        };
        layers.iter().zip(&biases).zip(&made).map(one).collect::<Result<Vec<_>>>()?
    } else {
        let parts = layers.iter().zip(&biases).zip(&made);
        let projections: Vec<_> = parts.map(|((l, b), made)| l.projection(b.as_ref(), made.as_ref())).collect();
        lora_linear_of(x, origin, &projections, dropout)?
    };
    let outputs = add_vera(x, &layers, outputs, dropout)?;
    outputs.try_into().map_err(|o: Vec<_>| Error::Shape {
        what: "outputs",
        expected: N.to_string(),
        got: o.len().to_string(),
    })
}

/// Adds what VeRA's vectors make of the shared pair. Without dropout, layers of one input share `x Aᵀ`, too.
fn add_vera(x: &Tensor, layers: &[&LinearLayer], outputs: Vec<Tensor>, dropout: f64) -> Result<Vec<Tensor>> {
    let mut last: Option<(&Vera, Tensor)> = None;
    let mut sums = Vec::with_capacity(outputs.len());
    for (y, layer) in outputs.into_iter().zip(layers) {
        let Some(vera) = layer.vera() else {
            sums.push(y);
            continue;
        };
        let low = match &last {
            Some((before, low)) if dropout == 0.0 && before.reads_as(vera) => low.shallow_clone(),
            _ if dropout > 0.0 => vera.down(&lora_torch::dropout(x, dropout)?)?,
            _ => vera.down(x)?,
        };
        sums.push(y.f_add(&vera.up(&low)?)?);
        last = Some((vera, low));
    }
    Ok(sums)
}

/// `x Wᵀ + bias + scale · (gate ∘ (x Aᵀ)) Bᵀ`: each token has the ranks that its text's adapters own.
fn gated(x: &Tensor, layer: &LinearLayer, bias: Option<&Tensor>, lora: &Lora, gate: &Tensor) -> Result<Tensor> {
    let base = lora_linear(x, &[Projection { weight: &layer.weight, bias, adapter: None }], 0.0)?.remove(0);
    let low = x.f_matmul(&lora.a.f_to_kind(x.kind())?.f_tr()?)?.f_mul(gate)?;
    Ok(base.f_add(&low.f_matmul(&lora.b.f_to_kind(x.kind())?.f_tr()?)?.f_mul_scalar(lora.scale)?)?)
}
