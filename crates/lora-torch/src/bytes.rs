//! Tensors from bytes and back, little-endian as in safetensors files.

use crate::dtype::kind_bytes;
use crate::error::{Error, Result};
use crate::ffi;
use tch::{Device, Kind, Tensor};

/// A CPU tensor over a copy of `bytes`.
///
/// # Errors
/// [`Error::Shape`] when the number of bytes is not that of the shape and dtype.
pub fn tensor_from_bytes(bytes: &[u8], shape: &[i64], kind: Kind) -> Result<Tensor> {
    let wanted = shape
        .iter()
        .try_fold(kind_bytes(kind), |n, &d| usize::try_from(d).ok().and_then(|d| n.checked_mul(d)))
        .filter(|_| kind_bytes(kind) > 0);
    if wanted != Some(bytes.len()) {
        return Err(Error::shape("tensor_from_bytes", "bytes", format!("{shape:?} of {kind:?}"), bytes.len()));
    }
    ffi::copy_from_bytes(bytes, shape, kind)
}

/// A copy of the elements of a tensor on any device, in row-major order.
///
/// # Errors
/// What libtorch reports, or [`Error::Shape`] for a dtype that no file here holds.
pub fn tensor_bytes(t: &Tensor) -> Result<Vec<u8>> {
    with_bytes(t, <[u8]>::to_vec)
}

/// Calls `f` with the elements of a tensor in row-major order, without a copy when it is contiguous and on the CPU.
///
/// # Errors
/// As [`tensor_bytes`].
pub fn with_bytes<R>(t: &Tensor, f: impl FnOnce(&[u8]) -> R) -> Result<R> {
    let width = kind_bytes(t.kind());
    if width == 0 {
        return Err(Error::shape("tensor_bytes", "dtype", "a dtype of safetensors", t.kind()));
    }
    let t = t.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
    Ok(f(ffi::bytes_of(&t, t.numel() * width)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_and_wrong_sizes_are_refused() {
        let t = Tensor::from_slice(&[1.0f32, -2.5, 3.25, 0.0, 7.0, -0.0]).view([2, 3]);
        let bytes = tensor_bytes(&t.transpose(0, 1)).unwrap();
        let back = tensor_from_bytes(&bytes, &[3, 2], Kind::Float).unwrap();
        assert!(back.equal(&t.transpose(0, 1)));
        assert!(tensor_from_bytes(&bytes, &[3, 3], Kind::Float).is_err());
        assert!(tensor_from_bytes(&bytes, &[i64::MAX, i64::MAX], Kind::Float).is_err());
        assert!(tensor_from_bytes(&[], &[0, 4], Kind::BFloat16).unwrap().numel() == 0);
    }
}
