//! AdamW, Lion and the gradient norm over flat buffers.

use crate::error::{Error, Result};
use crate::ffi;
use tch::Tensor;

/// The numbers of one AdamW step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWScalars {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of this step, counted from 1.
    pub step: i64,
}

/// One AdamW step in place (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2).
///
/// # Shapes
/// Four contiguous tensors of one shape and dtype (fp32 or fp64): parameter, gradient, first and second moment.
///
/// # Errors
/// [`Error::Shape`] when they differ in shape, or the step number is below 1.
pub fn adamw_step(
    param: &Tensor,
    grad: &Tensor,
    exp_avg: &Tensor,
    exp_avg_sq: &Tensor,
    h: &AdamWScalars,
) -> Result<()> {
    for (what, t) in [("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)] {
        if t.size() != param.size() {
            return Err(Error::shape("adamw", what, format!("{:?}", param.size()), t.size()));
        }
    }
    ffi::adamw(param, grad, exp_avg, exp_avg_sq, &raw_adamw("adamw", h)?)
}

pub(crate) fn raw_adamw(op: &'static str, h: &AdamWScalars) -> Result<ffi::RawAdamW> {
    if h.step < 1 {
        return Err(Error::shape(op, "step", "at least 1", h.step));
    }
    let AdamWScalars { lr, beta1, beta2, eps, weight_decay, step } = *h;
    Ok(ffi::RawAdamW { lr, beta1, beta2, eps, weight_decay, step })
}

/// The numbers of one step of Lion.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LionScalars {
    /// Learning rate of this step.
    pub lr: f64,
    /// Share of the moment in the direction of the step.
    pub beta1: f64,
    /// Decay of the moment.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// One step of Lion in place (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2): the sign of
/// `beta1 · moment + (1 - beta1) · gradient`, then the moment's own mean.
///
/// # Shapes
/// Three contiguous tensors of one shape and dtype: parameter, gradient, moment.
///
/// # Errors
/// [`Error::Shape`] when they differ in shape or dtype.
pub fn lion_step(param: &Tensor, grad: &Tensor, exp_avg: &Tensor, h: &LionScalars) -> Result<()> {
    for (what, t) in [("grad", grad), ("exp_avg", exp_avg)] {
        if t.size() != param.size() || t.kind() != param.kind() {
            let expected = format!("{:?} {:?}", param.kind(), param.size());
            return Err(Error::shape("lion", what, expected, (t.kind(), t.size())));
        }
    }
    let LionScalars { lr, beta1, beta2, weight_decay } = *h;
    ffi::lion(param, grad, exp_avg, &ffi::RawLion { lr, beta1, beta2, weight_decay })
}

/// The L2 norm of a tensor, summed in fp64; not finite when an entry is not.
///
/// # Errors
/// What libtorch reports.
pub fn grad_norm(flat_grad: &Tensor) -> Result<f64> {
    ffi::norm(flat_grad)
}
