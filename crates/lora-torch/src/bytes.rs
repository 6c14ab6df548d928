//! Tensors from bytes and back, little-endian as in safetensors files.

use crate::dtype::kind_bytes;
use crate::error::{Error, Result};
use crate::ffi;
use std::sync::Arc;
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

/// A CPU tensor over the bytes of `owner` from `offset` on, as of a mapped file: nothing is copied, and `owner` lives as long
/// as the tensor and its views do. It must not be written to.
///
/// # Errors
/// [`Error::Shape`] when the bytes end before the tensor does, or lie where the dtype cannot be read.
pub fn tensor_over<O: AsRef<[u8]> + Send + Sync + 'static>(
    owner: Arc<O>,
    offset: usize,
    shape: &[i64],
    kind: Kind,
) -> Result<Tensor> {
    const OP: &str = "tensor_over";
    let width = kind_bytes(kind);
    let len = shape.iter().try_fold(width, |n, &d| usize::try_from(d).ok().and_then(|d| n.checked_mul(d)));
    let all = (*owner).as_ref();
    let inside = len.and_then(|len| all.get(offset..offset.checked_add(len)?)).filter(|_| width > 0);
    match inside {
        None => Err(Error::shape(OP, "bytes", format!("{shape:?} of {kind:?} from byte {offset} on"), all.len())),
        Some(part) if !(part.as_ptr() as usize).is_multiple_of(width) => {
            Err(Error::shape(OP, "offset", format!("a multiple of {width}"), offset))
        }
        Some(_) => ffi::view_bytes(owner, offset, shape, scalar_type(kind)?),
    }
}

/// libtorch's number of a dtype (`c10::ScalarType`), of those that files hold.
fn scalar_type(kind: Kind) -> Result<i32> {
    Ok(match kind {
        Kind::Uint8 => 0,
        Kind::Int8 => 1,
        Kind::Int16 => 2,
        Kind::Int => 3,
        Kind::Int64 => 4,
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::Bool => 11,
        Kind::BFloat16 => 15,
        other => return Err(Error::shape("tensor_over", "dtype", "a dtype of safetensors", other)),
    })
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
