//! Every trained parameter in one flat buffer, with its gradient and its moments beside it: one norm, one optimizer call,
//! and one exchange between processes.

use crate::config::Optim;
use crate::digest::hex;
use crate::error::{Error, Result};
use crate::moments::{Form, Moments};
use lora_model::Parameter;
use lora_torch::{AdamWScalars, grad_norm, set_grad, with_bytes};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// Trained parameters as views of one buffer.
#[derive(Debug)]
pub struct FlatParams {
    slots: Vec<Slot>,
    /// `[n]`: the parameters, group by group; those that decay come first. Where moments have blocks, each begins at a
    /// block's beginning, and zeros fill the rest of its last one.
    flat: Tensor,
    /// `[n]`: their gradients, which backward passes add to; a view of the next.
    grad: Tensor,
    /// `[n + TOLD]`: the gradients, and behind them what else processes tell each other in a step.
    exchanged: Tensor,
    groups: Vec<Group>,
}

/// A part of the buffer whose parameters are updated alike.
#[derive(Debug)]
struct Group {
    start: i64,
    n: i64,
    decays: bool,
    /// What the learning rate is multiplied by.
    rate: f64,
    moments: Moments,
}

/// LoRA+ (Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024): B learns faster than A.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraPlus {
    /// What the learning rate of B, and of vectors, is multiplied by.
    pub ratio: f64,
    /// What the learning rate of adapters of embeddings is multiplied by.
    pub embedding: f64,
}

impl LoraPlus {
    fn rate_of(plus: Option<Self>, name: &str, vector: bool) -> f64 {
        match plus {
            None => 1.0,
            Some(plus) if name.contains("lora_embedding_") => plus.embedding,
            Some(plus) if vector || name.contains("lora_B") => plus.ratio,
            Some(_) => 1.0,
        }
    }
}

/// Numbers that go along with the gradients, at most.
const TOLD: i64 = 32;

/// Vectors that are neither biases nor weights of norms, by a part of their names.
const DECAYING_VECTORS: [&str; 2] = [".vera_lambda_", ".lora_magnitude_vector"];

/// Where a parameter lies in the buffer.
#[derive(Debug)]
struct Slot {
    name: String,
    start: i64,
    shape: Vec<i64>,
    /// Its place in [`FlatParams::groups`].
    group: usize,
}

impl Slot {
    fn numbers(&self) -> i64 {
        self.shape.iter().product()
    }

    fn of(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.f_narrow(0, self.start, self.numbers())?.f_view(self.shape.as_slice())?)
    }
}

impl FlatParams {
    /// Moves the leaves into one buffer; whoever holds them sees the same values, now as views.
    ///
    /// Biases and the weights of norms do not decay, as in Hugging Face's `Trainer`; everything else does. With `plus`, B and adapters
    /// of embeddings have learning rates of their own.
    ///
    /// # Errors
    /// [`Error::NothingTrained`] without parameters, or [`Error::Torch`] when they differ in dtype or device.
    pub fn new(mut parameters: Vec<Parameter>, plus: Option<LoraPlus>, optim: Optim) -> Result<Self> {
        let decays = |p: &Parameter| p.tensor.dim() > 1 || DECAYING_VECTORS.iter().any(|part| p.name.contains(part));
        let rate = |p: &Parameter| LoraPlus::rate_of(plus, &p.name, p.tensor.dim() < 2);
        let numbers = |p: &Parameter| p.tensor.numel() as i64;
        let form = |p: &Parameter| Form::of(optim, numbers(p));
        parameters
            .sort_by(|p, q| decays(q).cmp(&decays(p)).then(rate(p).total_cmp(&rate(q))).then(form(p).cmp(&form(q))));
        let Some(first) = parameters.first() else { return Err(Error::NothingTrained) };
        let options = (first.tensor.kind(), first.tensor.device());
        let total: i64 = parameters.iter().map(|p| form(p).room(numbers(p))).sum();
        let (flat, exchanged) = (Tensor::f_zeros([total], options)?, Tensor::f_zeros([total + TOLD], options)?);
        let grad = exchanged.f_narrow(0, 0, total)?;
        let (mut groups, mut slots) = (Vec::new(), Vec::with_capacity(parameters.len()));
        let mut start = 0;
        for alike in parameters.chunk_by(|p, q| (decays(p), rate(p), form(p)) == (decays(q), rate(q), form(q))) {
            let (begin, Some(one)) = (start, alike.first()) else { continue };
            for p in alike {
                let slot = Slot { name: p.name.clone(), start, shape: p.tensor.size(), group: groups.len() };
                start += form(p).room(numbers(p));
                let home = slot.of(&flat)?;
                home.shallow_clone().f_copy_(&p.tensor.f_detach()?)?;
                p.tensor.shallow_clone().f_set_data(&home)?;
                set_grad(&p.tensor, &slot.of(&grad)?)?;
                slots.push(slot);
            }
            let moments = Moments::zeros(form(one), start - begin, options)?;
            groups.push(Group { start: begin, n: start - begin, decays: decays(one), rate: rate(one), moments });
        }
        Ok(Self { slots, flat, grad, exchanged, groups })
    }

    /// How many numbers are trained.
    pub fn len(&self) -> i64 {
        self.slots.iter().map(Slot::numbers).sum()
    }

    /// Whether nothing is trained.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Clears the gradients.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn zero_grad(&self) -> Result<()> {
        let _grad = self.grad.shallow_clone().f_zero_()?;
        Ok(())
    }

    /// The gradients of the last step, as its update used them; zeros fill gaps between parameters.
    pub fn gradients(&self) -> &Tensor {
        &self.grad
    }

    /// Multiplies the gradients.
    pub(crate) fn scale_grad(&self, factor: f64) -> Result<()> {
        let _grad = self.grad.shallow_clone().f_mul_scalar_(factor)?;
        Ok(())
    }

    /// Puts numbers behind the gradients.
    pub(crate) fn tell(&self, numbers: &[f64]) -> Result<()> {
        let mut all = numbers.to_vec();
        all.resize(TOLD as usize, 0.0);
        self.behind()?.f_copy_(&Tensor::f_from_slice(&all)?)?;
        Ok(())
    }

    /// The numbers behind the gradients.
    pub(crate) fn told(&self) -> Result<Vec<f64>> {
        let numbers = self.behind()?.f_to_kind(Kind::Double)?.f_to_device(tch::Device::Cpu)?;
        Ok(Vec::try_from(&numbers)?)
    }

    fn behind(&self) -> Result<Tensor> {
        Ok(self.exchanged.f_narrow(0, self.grad.size().iter().sum(), TOLD)?)
    }

    /// Gradients and numbers in one, for one exchange.
    pub(crate) fn exchanged(&self) -> Tensor {
        self.exchanged.shallow_clone()
    }

    /// The 2-norm of all gradients together.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn grad_norm(&self) -> Result<f64> {
        Ok(grad_norm(&self.grad)?)
    }

    /// Scales gradients of this 2-norm down to `max_norm` (0 leaves them as they are), by PyTorch's rule:
    /// `max_norm / (norm + 1e-6)` where that is below 1.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn clip_grad(&self, norm: f64, max_norm: f64) -> Result<()> {
        let scale = max_norm / (norm + 1e-6);
        if max_norm > 0.0 && scale < 1.0 {
            self.scale_grad(scale)?;
        }
        Ok(())
    }

    /// Both: the norm before gradients are scaled down.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn clip_grad_norm(&self, max_norm: f64) -> Result<f64> {
        let norm = self.grad_norm()?;
        self.clip_grad(norm, max_norm)?;
        Ok(norm)
    }

    /// One step of the optimizer; Lion has no use for the numbers that are AdamW's alone.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn update(&self, scalars: &AdamWScalars) -> Result<()> {
        for group in &self.groups {
            let part = |t: &Tensor| t.f_narrow(0, group.start, group.n).map_err(lora_torch::Error::from);
            let weight_decay = if group.decays { scalars.weight_decay } else { 0.0 };
            let scalars = AdamWScalars { lr: scalars.lr * group.rate, weight_decay, ..*scalars };
            group.moments.step(&part(&self.flat)?, &part(&self.grad)?, &scalars)?;
        }
        Ok(())
    }

    /// Whether every parameter is finite.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn is_finite(&self) -> Result<bool> {
        Ok(grad_norm(&self.flat)?.is_finite())
    }

    /// Parameters and moments by name, as views: `NAME`, `exp_avg.NAME`, and what else the optimizer keeps.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut list = Vec::new();
        for slot in &self.slots {
            list.push((slot.name.clone(), slot.of(&self.flat)?));
            let Some(group) = self.groups.get(slot.group) else { continue };
            for (prefix, all, each) in group.moments.tensors() {
                let begin = (slot.start - group.start) / each;
                let entries = (slot.numbers() + each - 1) / each;
                let part = all.f_narrow(0, begin, entries)?;
                let part = if each == 1 { part.f_view(slot.shape.as_slice())? } else { part };
                list.push((format!("{prefix}{}", slot.name), part));
            }
        }
        Ok(list)
    }

    /// Takes parameters and moments back.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] when a tensor is missing or of another shape or dtype.
    pub fn load_state(&self, mut state: BTreeMap<String, Tensor>) -> Result<()> {
        for (name, home) in self.state()? {
            match state.remove(&name) {
                Some(t) if t.size() == home.size() && t.kind() == home.kind() => home.shallow_clone().f_copy_(&t)?,
                found => {
                    let found = found.map_or("nothing".into(), |t| format!("{:?} {:?}", t.kind(), t.size()));
                    let expected = format!("{:?} {:?}", home.kind(), home.size());
                    return Err(Error::StateMismatch { name, expected, found });
                }
            };
        }
        match state.into_keys().next() {
            Some(name) => Err(Error::StateMismatch { name, expected: "nothing".into(), found: "a tensor".into() }),
            None => Ok(()),
        }
    }

    /// A copy of the parameters, with zeros in the place of those that are `off`: `[n]`.
    pub(crate) fn values_without(&self, off: impl Fn(&str) -> bool) -> Result<Tensor> {
        let values = self.flat.f_detach_copy()?;
        for slot in self.slots.iter().filter(|slot| off(&slot.name)) {
            let _zeros = slot.of(&values)?.f_zero_()?;
        }
        Ok(values)
    }

    /// What `ask` finds while the parameters are `values`; they are what they were afterwards.
    pub(crate) fn with_values<T>(&self, values: &Tensor, ask: impl FnOnce() -> Result<T>) -> Result<T> {
        let own = self.flat.f_detach_copy()?;
        self.flat.shallow_clone().f_copy_(values)?;
        let found = ask();
        self.flat.shallow_clone().f_copy_(&own)?;
        found
    }

    /// The sha256 of the parameters, in hexadecimal.
    ///
    /// # Errors
    /// What copying them from a device reports.
    pub fn digest(&self) -> Result<String> {
        Ok(with_bytes(&self.flat, |bytes| hex(&Sha256::digest(bytes)))?)
    }

    /// The dtype of the parameters.
    pub fn kind(&self) -> Kind {
        self.flat.kind()
    }
}
