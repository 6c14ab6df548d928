//! AdamW and the gradient norm over flat buffers.

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
    if h.step < 1 {
        return Err(Error::shape("adamw", "step", "at least 1", h.step));
    }
    let raw = ffi::RawAdamW {
        lr: h.lr,
        beta1: h.beta1,
        beta2: h.beta2,
        eps: h.eps,
        weight_decay: h.weight_decay,
        step: h.step,
    };
    ffi::adamw(param, grad, exp_avg, exp_avg_sq, &raw)
}

/// The L2 norm of a tensor, summed in fp64; not finite when an entry is not.
///
/// # Errors
/// What libtorch reports.
pub fn grad_norm(flat_grad: &Tensor) -> Result<f64> {
    ffi::norm(flat_grad)
}
