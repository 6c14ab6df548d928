//! Moments of an optimizer in 8 bits, block by block, and AdamW over them.

use crate::error::{Error, Result};
use crate::ffi;
use crate::optim::{AdamWScalars, raw_adamw};
use crate::packed::{dynamic_table, unsigned_dynamic_table};
use tch::{Device, Kind, Tensor, no_grad};

/// Numbers of a moment that share a scale, as in bitsandbytes.
pub const MOMENT_BLOCK: i64 = 256;

/// A moment in 8 bits (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022): each number is the nearest
/// entry of the dynamic table times the largest magnitude of its block. Tables, blocks and codes are those of bitsandbytes,
/// except that in a table without signs a number that is not zero never gets the code of zero: a second moment that has
/// become zero beside a first one that has not would make a step of that over epsilon.
#[derive(Debug)]
pub struct Blockwise {
    /// uint8, `[blocks · 256]`
    pub codes: Tensor,
    /// fp32, `[blocks]`: the largest magnitude of each block.
    pub absmax: Tensor,
    table: Tensor,
}

impl Blockwise {
    /// Zeros; `signed` says whether its numbers have signs.
    ///
    /// # Errors
    /// [`Error::Shape`] for a number of numbers that is not one of whole blocks.
    pub fn zeros(n: i64, signed: bool, device: Device) -> Result<Self> {
        if n % MOMENT_BLOCK != 0 {
            return Err(Error::shape("blockwise", "numbers", format!("a multiple of {MOMENT_BLOCK}"), n));
        }
        let table = if signed { dynamic_table()? } else { unsigned_dynamic_table()? };
        let zero = table.f_eq(0.0)?.f_to_kind(Kind::Uint8)?.f_argmax(None, false)?.f_int64_value(&[])?;
        Ok(Self {
            codes: Tensor::f_full([n], zero, (Kind::Uint8, device))?,
            absmax: Tensor::f_zeros([n / MOMENT_BLOCK], (Kind::Float, device))?,
            table: table.f_to_device(device)?,
        })
    }

    /// What the codes stand for, `[blocks · 256]` fp32.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn dense(&self) -> Result<Tensor> {
        no_grad(|| {
            let numbers = self.table.f_index_select(0, &self.codes.f_to_kind(Kind::Int64)?)?;
            Ok(numbers.f_view([-1, MOMENT_BLOCK])?.f_mul(&self.absmax.f_unsqueeze(1)?)?.f_view([-1])?)
        })
    }

    fn raw(&self) -> ffi::RawBlockwise {
        ffi::RawBlockwise::new(&self.codes, &self.absmax, &self.table)
    }
}

/// One step of AdamW in place with moments in 8 bits. The step is made with the moments as they are before they are packed
/// again.
///
/// # Shapes
/// Parameter and gradient contiguous fp32, `[blocks · 256]` as the moments.
///
/// # Errors
/// [`Error::Shape`] for other shapes or dtypes, or a step number below 1.
pub fn adamw_8bit_step(
    param: &Tensor,
    grad: &Tensor,
    exp_avg: &Blockwise,
    exp_avg_sq: &Blockwise,
    h: &AdamWScalars,
) -> Result<()> {
    const OP: &str = "adamw_8bit";
    for (what, t, kind) in [
        ("param", param, Kind::Float),
        ("grad", grad, Kind::Float),
        ("exp_avg", &exp_avg.codes, Kind::Uint8),
        ("exp_avg_sq", &exp_avg_sq.codes, Kind::Uint8),
    ] {
        if t.size() != exp_avg.codes.size() || t.kind() != kind {
            let expected = format!("{kind:?} {:?}", exp_avg.codes.size());
            return Err(Error::shape(OP, what, expected, (t.kind(), t.size())));
        }
    }
    ffi::adamw_8bit(param, grad, &exp_avg.raw(), &exp_avg_sq.raw(), &raw_adamw(OP, h)?)
}
