//! Frozen weights in the form in which they are kept: dense, or packed into 4 or 8 bits.

use crate::error::{Error, Result};
use crate::ffi;
use crate::packed::{Int8, Nf4};
use tch::{Device, Tensor};

/// A weight of a linear layer, `[out_features, in_features]`.
///
/// A product takes it as it is where its dtype is that of the input; otherwise it is made dense tile by tile, so that no
/// copy of its size ever exists.
#[derive(Debug)]
pub enum Weight {
    /// Numbers of any floating-point dtype.
    Plain(Tensor),
    /// 4-bit codes with a scale for each block.
    Nf4(Nf4),
    /// 8-bit integers with a scale for each row.
    Int8(Int8),
}

impl Weight {
    /// `[out_features, in_features]`; of a plain tensor its own shape, whatever it is.
    pub fn size(&self) -> Vec<i64> {
        match self {
            Self::Plain(t) => t.size(),
            Self::Nf4(w) => w.shape().to_vec(),
            Self::Int8(w) => w.codes.size(),
        }
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        match self {
            Self::Plain(t) => t.device(),
            Self::Nf4(w) => w.codes.device(),
            Self::Int8(w) => w.codes.device(),
        }
    }

    /// The numbers themselves, where they are kept as such.
    pub fn plain(&self) -> Option<&Tensor> {
        match self {
            Self::Plain(t) => Some(t),
            _ => None,
        }
    }

    /// The whole weight, dense: a plain one as it is (no copy), a packed one in fp32.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn dense(&self) -> Result<Tensor> {
        match self {
            Self::Plain(t) => Ok(t.shallow_clone()),
            _ => ffi::dense(&self.raw()),
        }
    }

    /// Some of its rows, dense: of a plain weight a view, of a packed one in fp32.
    ///
    /// # Shapes
    /// `[count, in_features]`
    ///
    /// # Errors
    /// What libtorch reports, as for rows that it does not have.
    pub fn dense_rows(&self, first: i64, count: i64) -> Result<Tensor> {
        match self {
            Self::Plain(t) => Ok(t.f_narrow(0, first, count)?),
            Self::Nf4(w) => w.dense_rows(first, count),
            Self::Int8(w) => {
                let (codes, scales) = (w.codes.f_narrow(0, first, count)?, w.scales.f_narrow(0, first, count)?);
                ffi::dense(&ffi::RawWeight::int8(&codes, &scales))
            }
        }
    }

    /// The Euclidean norm of each row, `[out_features]`, fp32 (fp64 of an fp64 weight).
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn row_norms(&self) -> Result<Tensor> {
        ffi::row_norms(&self.raw())
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        let of = |t: &Tensor| t.numel() * crate::kind_bytes(t.kind());
        match self {
            Self::Plain(t) => of(t),
            Self::Nf4(w) => w.tensors().into_iter().map(of).sum(),
            Self::Int8(w) => of(&w.codes) + of(&w.scales),
        }
    }

    /// Another handle of the same memory.
    pub fn shallow_clone(&self) -> Self {
        match self {
            Self::Plain(t) => Self::Plain(t.shallow_clone()),
            Self::Nf4(w) => Self::Nf4(w.shallow_clone()),
            Self::Int8(w) => Self::Int8(Int8 { codes: w.codes.shallow_clone(), scales: w.scales.shallow_clone() }),
        }
    }

    /// The same on another device; what is there already is shared.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        Ok(match self {
            Self::Plain(t) => Self::Plain(t.f_to_device(device)?),
            Self::Nf4(w) => Self::Nf4(w.to_device(device)?),
            Self::Int8(w) => {
                Self::Int8(Int8 { codes: w.codes.f_to_device(device)?, scales: w.scales.f_to_device(device)? })
            }
        })
    }

    /// Its shape, where an input of this width fits it.
    pub(crate) fn check(&self, op: &'static str, width: i64) -> Result<[i64; 2]> {
        let size = self.size();
        match size.as_slice() {
            &[rows, cols] if cols == width => Ok([rows, cols]),
            _ => Err(Error::shape(op, "weight", format!("[out_features, {width}]"), size)),
        }
    }

    pub(crate) fn raw(&self) -> ffi::RawWeight {
        match self {
            Self::Plain(t) => ffi::RawWeight::plain(t),
            Self::Nf4(w) => w.raw(),
            Self::Int8(w) => ffi::RawWeight::int8(&w.codes, &w.scales),
        }
    }
}

impl From<Tensor> for Weight {
    fn from(t: Tensor) -> Self {
        Self::Plain(t)
    }
}
