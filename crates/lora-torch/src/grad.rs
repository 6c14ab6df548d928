//! What tch leaves out of autograd: backward with given gradients, and gradients that live in a buffer of ours.

use crate::error::{Error, Result};
use crate::ffi;
use tch::Tensor;

/// Runs the backward pass from `outputs` with the given gradients; leaves accumulate into their `.grad`.
///
/// # Errors
/// [`Error::Shape`] when the two lists differ in length, or what autograd reports.
pub fn backward(outputs: &[&Tensor], grads: &[&Tensor]) -> Result<()> {
    if outputs.len() != grads.len() {
        return Err(Error::shape("backward", "grads", format!("{} tensors", outputs.len()), grads.len()));
    }
    ffi::backward(outputs, grads)
}

/// Makes `grad` the gradient of the leaf `param`, so that later backward passes accumulate into it in place.
///
/// # Errors
/// [`Error::Shape`] when the shapes differ.
pub fn set_grad(param: &Tensor, grad: &Tensor) -> Result<()> {
    if param.size() != grad.size() {
        return Err(Error::shape("set_grad", "grad", format!("{:?}", param.size()), grad.size()));
    }
    ffi::set_grad(param, grad)
}
