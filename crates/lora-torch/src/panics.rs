//! Panics of tch that are errors.
//!
//! tch frees the scalar arguments of an operation (`f_full`, `f_mul_scalar`) before it reads what the operation reported, and the
//! destructor, which finds that report, panics with it: also the `f_` forms of such operations panic where memory runs out.

use crate::error::{Error, Result};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind, set_hook, take_hook};

/// How the message of such a panic begins.
const BEGINS: &str = "called `Result::unwrap()` on an `Err` value: Torch(\"";

/// Runs `work`, and makes an error of what tch panics with. What it worked on is as after an error in the middle of it. Other panics
/// go on.
///
/// # Errors
/// [`Error::OutOfMemory`], or what libtorch reported.
pub fn catching<T>(work: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| match report(&*payload) {
        Some(text) => Error::from_shim("operation", text),
        None => resume_unwind(payload),
    })
}

/// Lets panics that [`catching`] makes errors of print nothing, for the whole process: they are told as errors. Where memory ran out
/// there may also be too little to print a backtrace, in the middle of which the process would wait for itself.
pub fn tell_errors_once() {
    let before = take_hook();
    set_hook(Box::new(move |info| {
        if report(info.payload()).is_none() {
            before(info);
        }
    }));
}

/// What libtorch reported, in a panic of tch's.
fn report(payload: &(dyn Any + Send)) -> Option<&str> {
    let text = payload.downcast_ref::<String>()?.strip_prefix(BEGINS)?;
    // As `Debug` writes it; only its first line says something.
    Some(text.split("\\n").next().unwrap_or(text).trim_end_matches("\")"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn what_tch_panics_with_is_an_error() {
        tell_errors_once();
        // No machine has so much address space.
        let all = catching(|| Tensor::f_full([1i64 << 56], 1.0, (Kind::Float, Device::Cpu)));
        assert!(matches!(all, Err(Error::OutOfMemory { .. })), "{all:?}");
        let apart = catching(|| Tensor::zeros([2], (Kind::Float, Device::Cpu)).f_add_scalar("x".len() as i64));
        assert!(apart.unwrap().is_ok());
        let other = std::panic::catch_unwind(|| catching(|| assert_eq!(1, 2)));
        assert!(other.is_err(), "a panic that is none of tch's goes on");
    }
}
