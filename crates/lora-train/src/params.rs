//! Every trained parameter in one flat buffer, with its gradient and its moments beside it: one norm, one optimizer call,
//! and (later) one exchange between machines.

use crate::digest::hex;
use crate::error::{Error, Result};
use lora_model::Parameter;
use lora_torch::{AdamWScalars, adamw_step, grad_norm, set_grad, with_bytes};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// Trained parameters as views of one buffer.
#[derive(Debug)]
pub struct FlatParams {
    slots: Vec<Slot>,
    /// `[n]`: the parameters, group by group; those that decay come first.
    flat: Tensor,
    /// `[n]`: their gradients, which backward passes add to.
    grad: Tensor,
    /// `[n]`: AdamW's first moment.
    exp_avg: Tensor,
    /// `[n]`: AdamW's second moment.
    exp_avg_sq: Tensor,
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

/// Where a parameter lies in the buffer.
#[derive(Debug)]
struct Slot {
    name: String,
    start: i64,
    shape: Vec<i64>,
}

impl Slot {
    fn of(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.f_narrow(0, self.start, self.shape.iter().product())?.f_view(self.shape.as_slice())?)
    }
}

/// About what a checkpoint of so many trained parameters takes: they, both moments and the result, in float32, and an eighth
/// more for what is not.
pub(crate) fn checkpoint_bytes(parameters: u64) -> u64 {
    18 * parameters
}

impl FlatParams {
    /// Moves the leaves into one buffer; whoever holds them sees the same values, now as views.
    ///
    /// Norm weights and biases do not decay, as `TrainingArguments` has it; everything else does. With `plus`, B and
    /// adapters of embeddings have learning rates of their own.
    ///
    /// # Errors
    /// [`Error::NothingTrained`] without parameters, or [`Error::Torch`] when they differ in dtype or device.
    pub fn new(mut parameters: Vec<Parameter>, plus: Option<LoraPlus>) -> Result<Self> {
        // VeRA's vectors are its weights.
        let decays = |p: &Parameter| p.tensor.dim() > 1 || p.name.contains(".vera_lambda_");
        let rate = |p: &Parameter| LoraPlus::rate_of(plus, &p.name, p.tensor.dim() < 2);
        parameters.sort_by(|p, q| decays(q).cmp(&decays(p)).then(rate(p).total_cmp(&rate(q))));
        let Some(first) = parameters.first() else { return Err(Error::NothingTrained) };
        let options = (first.tensor.kind(), first.tensor.device());
        let total: i64 = parameters.iter().map(|p| p.tensor.numel() as i64).sum();
        let buffer = || Tensor::f_zeros([total], options).map_err(lora_torch::Error::from);
        let (flat, grad, exp_avg, exp_avg_sq) = (buffer()?, buffer()?, buffer()?, buffer()?);
        let mut groups: Vec<Group> = Vec::new();
        let mut slots = Vec::with_capacity(parameters.len());
        let mut start = 0;
        for p in parameters {
            let (n, decays, rate) = (p.tensor.numel() as i64, decays(&p), rate(&p));
            match groups.last_mut().filter(|g| (g.decays, g.rate) == (decays, rate)) {
                Some(group) => group.n += n,
                None => groups.push(Group { start, n, decays, rate }),
            }
            let slot = Slot { name: p.name, start, shape: p.tensor.size() };
            start += n;
            let home = slot.of(&flat)?;
            home.shallow_clone().f_copy_(&p.tensor.f_detach()?)?;
            p.tensor.shallow_clone().f_set_data(&home)?;
            set_grad(&p.tensor, &slot.of(&grad)?)?;
            slots.push(slot);
        }
        Ok(Self { slots, flat, grad, exp_avg, exp_avg_sq, groups })
    }

    /// How many numbers are trained.
    pub fn len(&self) -> i64 {
        self.flat.numel() as i64
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

    /// The 2-norm of all gradients together, before they are scaled down to `max_norm` (0 leaves them as they are), by
    /// PyTorch's rule: `max_norm / (norm + 1e-6)` where that is below 1.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn clip_grad_norm(&self, max_norm: f64) -> Result<f64> {
        let norm = grad_norm(&self.grad)?;
        let scale = max_norm / (norm + 1e-6);
        if max_norm > 0.0 && scale < 1.0 {
            let _grad = self.grad.shallow_clone().f_mul_scalar_(scale)?;
        }
        Ok(norm)
    }

    /// One step of AdamW.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn adamw(&self, scalars: &AdamWScalars) -> Result<()> {
        for group in &self.groups {
            let part = |t: &Tensor| t.f_narrow(0, group.start, group.n).map_err(lora_torch::Error::from);
            let weight_decay = if group.decays { scalars.weight_decay } else { 0.0 };
            let scalars = AdamWScalars { lr: scalars.lr * group.rate, weight_decay, ..*scalars };
            adamw_step(
                &part(&self.flat)?,
                &part(&self.grad)?,
                &part(&self.exp_avg)?,
                &part(&self.exp_avg_sq)?,
                &scalars,
            )?;
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

    /// Parameters and moments by name, as views: `NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut list = Vec::new();
        for (prefix, buffer) in self.buffers() {
            for slot in &self.slots {
                list.push((format!("{prefix}{}", slot.name), slot.of(buffer)?));
            }
        }
        Ok(list)
    }

    /// Takes parameters and moments back.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] when a tensor is missing or of another shape or dtype.
    pub fn load_state(&self, mut state: BTreeMap<String, Tensor>) -> Result<()> {
        for (prefix, buffer) in self.buffers() {
            for slot in &self.slots {
                let name = format!("{prefix}{}", slot.name);
                let home = slot.of(buffer)?;
                match state.remove(&name) {
                    Some(t) if t.size() == slot.shape && t.kind() == buffer.kind() => {
                        home.shallow_clone().f_copy_(&t)?
                    }
                    found => {
                        let found = found.map_or("nothing".into(), |t| format!("{:?} {:?}", t.kind(), t.size()));
                        return Err(Error::StateMismatch {
                            name,
                            expected: format!("{:?} {:?}", buffer.kind(), slot.shape),
                            found,
                        });
                    }
                };
            }
        }
        match state.into_keys().next() {
            Some(name) => Err(Error::StateMismatch { name, expected: "nothing".into(), found: "a tensor".into() }),
            None => Ok(()),
        }
    }

    /// The sha256 of the parameters, in hexadecimal.
    ///
    /// # Errors
    /// What copying them from a device reports.
    pub fn digest(&self) -> Result<String> {
        Ok(with_bytes(&self.flat, |bytes| hex(&Sha256::digest(bytes)))?)
    }

    fn buffers(&self) -> [(&'static str, &Tensor); 3] {
        [("", &self.flat), ("exp_avg.", &self.exp_avg), ("exp_avg_sq.", &self.exp_avg_sq)]
    }

    /// The dtype of the parameters.
    pub fn kind(&self) -> Kind {
        self.flat.kind()
    }
}
