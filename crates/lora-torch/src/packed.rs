//! Weights in 4 and 8 bits, in the form of bitsandbytes: equal codes there and here are equal numbers.

use crate::error::{Error, Result};
use crate::ffi;
use tch::{Device, Kind, Tensor, no_grad};

/// Numbers that share a scale in NF4 (Dettmers et al., "QLoRA", 2023, section 3).
pub const NF4_BLOCK: i64 = 64;
/// Scales that share a scale of their own under double quantisation.
pub const NESTED_BLOCK: i64 = 256;

/// 4-bit NormalFloat: each number is the nearest of 16 quantiles of a normal distribution, times the largest magnitude of
/// its block.
#[derive(Debug)]
pub struct Nf4 {
    /// uint8, `[ceil(out · in / 2)]`: row-major, the first number of a pair in the high half of the byte.
    pub codes: Tensor,
    /// The scales of the blocks.
    pub scales: Scales,
    /// Numbers in a block.
    pub block: i64,
    shape: [i64; 2],
}

/// Scales of blocks, `[ceil(out · in / block)]`.
#[derive(Debug)]
pub enum Scales {
    /// fp32.
    Plain(Tensor),
    /// Double quantisation: `table[codes] · absmax[block of codes] + offset`.
    Nested {
        /// uint8
        codes: Tensor,
        /// fp32, one for each [`block`](Self::Nested::block) codes.
        absmax: Tensor,
        /// fp32, `[256]`
        table: Tensor,
        /// The mean of the scales.
        offset: f64,
        /// Codes that share an entry of `absmax`.
        block: i64,
    },
}

impl Nf4 {
    /// Packs a weight; `double` packs the scales, too.
    ///
    /// # Shapes
    /// `weight` `[out, in]`, any floating-point dtype; the codes lie on its device.
    ///
    /// # Errors
    /// [`Error::Shape`] for another shape or a weight that is not finite.
    pub fn pack(weight: &Tensor, double: bool) -> Result<Self> {
        const OP: &str = "pack_nf4";
        let size = weight.size();
        let &[rows, cols] = size.as_slice() else { return Err(Error::shape(OP, "weight", "[out, in]", size)) };
        let device = weight.device();
        let wide = weight.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
        if !wide.f_sum(Kind::Double)?.f_double_value(&[])?.is_finite() {
            return Err(Error::shape(OP, "weight", "finite numbers", "a NaN or an infinity"));
        }
        let (codes, scales) = ffi::pack_nf4(&wide, NF4_BLOCK)?;
        let scales = if double { Scales::nested(&scales)? } else { Scales::Plain(scales) };
        Self { codes, scales, block: NF4_BLOCK, shape: [rows, cols] }.to_device(device)
    }

    /// Some of its rows, dense, `[count, in]` fp32.
    ///
    /// # Errors
    /// What libtorch reports, as for rows that it does not have.
    pub fn dense_rows(&self, first: i64, count: i64) -> Result<Tensor> {
        let [_, cols] = self.shape;
        let (begin, numbers) = (first * cols, count * cols);
        if begin % self.block != 0 || begin % 2 != 0 {
            return Ok(ffi::dense(&self.raw())?.f_narrow(0, first, count)?);
        }
        let part = Self {
            codes: self.codes.f_narrow(0, begin / 2, (numbers + 1) / 2)?,
            scales: Scales::Plain(self.scales.some(begin / self.block, (numbers + self.block - 1) / self.block)?),
            block: self.block,
            shape: [count, cols],
        };
        ffi::dense(&part.raw())
    }

    /// Takes the parts as a file holds them.
    ///
    /// # Errors
    /// [`Error::Shape`] when a part does not fit the shape.
    pub fn from_parts(codes: Tensor, scales: Scales, block: i64, shape: [i64; 2]) -> Result<Self> {
        const OP: &str = "nf4";
        let numbers = shape.iter().try_fold(1i64, |n, &d| n.checked_mul(d)).filter(|&n| n > 0);
        let Some(numbers) = numbers.filter(|_| block > 1 && block % 2 == 0) else {
            return Err(Error::shape(OP, "shape and block", "[out, in] and an even block", (shape, block)));
        };
        let (pairs, blocks) = (numbers.div_euclid(2) + numbers % 2, (numbers + block - 1) / block);
        if codes.kind() != Kind::Uint8 || codes.numel() as i64 != pairs {
            return Err(Error::shape(OP, "codes", format!("{pairs} of uint8"), (codes.size(), codes.kind())));
        }
        let codes = codes.f_reshape([-1])?.f_contiguous()?;
        let fault = |what, wanted: i64, kind, t: &Tensor| {
            let wrong = t.kind() != kind || t.numel() as i64 != wanted;
            if wrong {
                return Err(Error::shape(OP, what, format!("{wanted} of {kind:?}"), (t.size(), t.kind())));
            }
            Ok(t.f_reshape([-1])?.f_contiguous()?)
        };
        let scales = match scales {
            Scales::Plain(t) => Scales::Plain(fault("absmax", blocks, Kind::Float, &t)?),
            Scales::Nested { codes, absmax, table, offset, block } => {
                if block < 1 {
                    return Err(Error::shape(OP, "nested_blocksize", "at least 1", block));
                }
                Scales::Nested {
                    codes: fault("absmax", blocks, Kind::Uint8, &codes)?,
                    absmax: fault("nested_absmax", (blocks + block - 1) / block, Kind::Float, &absmax)?,
                    table: fault("nested_quant_map", 256, Kind::Float, &table)?,
                    offset,
                    block,
                }
            }
        };
        Ok(Self { codes, scales, block, shape })
    }

    /// The 16 quantiles that codes stand for, `[16]` fp32, ascending.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn table() -> Result<Tensor> {
        // A code a number: packed in pairs, unpacked with a scale of one.
        let codes: Vec<u8> = (0..8u8).map(|pair| (2 * pair) << 4 | (2 * pair + 1)).collect();
        let scales = Scales::Plain(Tensor::f_from_slice(&[1.0f32])?);
        let all = Self::from_parts(Tensor::f_from_slice(&codes)?, scales, 16, [1, 16])?;
        Ok(ffi::dense(&all.raw())?.f_view([16])?)
    }

    /// `[out, in]`
    pub fn shape(&self) -> [i64; 2] {
        self.shape
    }

    pub(crate) fn tensors(&self) -> Vec<&Tensor> {
        let mut list = vec![&self.codes];
        match &self.scales {
            Scales::Plain(t) => list.push(t),
            Scales::Nested { codes, absmax, table, .. } => list.extend([codes, absmax, table]),
        }
        list
    }

    pub(crate) fn to_device(&self, device: Device) -> Result<Self> {
        let mut moved = self.shallow_clone();
        let mut move_all = vec![&mut moved.codes];
        match &mut moved.scales {
            Scales::Plain(t) => move_all.push(t),
            Scales::Nested { codes, absmax, table, .. } => move_all.extend([codes, absmax, table]),
        }
        for t in move_all {
            *t = t.f_to_device(device)?;
        }
        Ok(moved)
    }

    pub(crate) fn shallow_clone(&self) -> Self {
        let copy = |t: &Tensor| t.shallow_clone();
        let scales = match &self.scales {
            Scales::Plain(t) => Scales::Plain(copy(t)),
            Scales::Nested { codes, absmax, table, offset, block } => Scales::Nested {
                codes: copy(codes),
                absmax: copy(absmax),
                table: copy(table),
                offset: *offset,
                block: *block,
            },
        };
        Self { codes: copy(&self.codes), scales, block: self.block, shape: self.shape }
    }

    pub(crate) fn raw(&self) -> ffi::RawWeight {
        match &self.scales {
            Scales::Plain(scales) => ffi::RawWeight::nf4(&self.codes, self.shape, self.block, scales),
            Scales::Nested { codes, absmax, table, offset, block } => {
                ffi::RawWeight::nf4(&self.codes, self.shape, self.block, codes).nested(absmax, table, *offset, *block)
            }
        }
    }
}

impl Scales {
    /// Some of the scales, in fp32, rounded as where all are unpacked.
    fn some(&self, first: i64, count: i64) -> Result<Tensor> {
        Ok(match self {
            Self::Plain(all) => all.f_narrow(0, first, count)?,
            Self::Nested { codes, absmax, table, offset, block } => {
                let place = Tensor::f_arange_start(first, first + count, (Kind::Int64, codes.device()))?;
                let of_block = absmax.f_index_select(0, &place.f_floor_divide_scalar(*block)?)?;
                let known = table.f_index_select(0, &codes.f_narrow(0, first, count)?.f_to_kind(Kind::Int)?)?;
                known.f_mul(&of_block)?.f_add_scalar(*offset)?
            }
        })
    }

    /// Packs scales into 8 bits (QLoRA, section 3, "Double Quantization"): the mean is taken off, and each block is coded
    /// by the nearest entry of the dynamic table.
    fn nested(scales: &Tensor) -> Result<Self> {
        no_grad(|| {
            let offset = scales.f_mean(Kind::Float)?;
            let rest = scales.f_sub(&offset)?;
            let n = rest.size()[0];
            let padded = rest.f_constant_pad_nd([0, padding(n)])?;
            let blocks = padded.f_view([-1, NESTED_BLOCK])?;
            let absmax = blocks.f_abs()?.f_amax([1i64].as_slice(), false)?;
            let scaled = blocks.f_div(&absmax.f_clamp_min(f64::from(f32::MIN_POSITIVE))?.f_unsqueeze(1)?)?;
            let table = dynamic_table()?;
            let midpoints = table.f_narrow(0, 0, 255)?.f_add(&table.f_narrow(0, 1, 255)?)?.f_div_scalar(2.0)?;
            let codes = scaled.f_bucketize(&midpoints, true, false)?.f_view([-1])?.f_narrow(0, 0, n)?;
            Ok(Self::Nested {
                codes: codes.f_to_kind(Kind::Uint8)?.f_contiguous()?,
                absmax,
                table,
                offset: offset.f_double_value(&[])?,
                block: NESTED_BLOCK,
            })
        })
    }
}

/// What is missing to a whole number of blocks.
fn padding(n: i64) -> i64 {
    (NESTED_BLOCK - n % NESTED_BLOCK) % NESTED_BLOCK
}

/// The signed 8-bit table with a moving exponent (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015,
/// section 2.3), `[256]` fp32, ascending: seven decades, the higher ones with more steps, and 0 and 1 besides.
///
/// # Errors
/// What libtorch reports.
pub fn dynamic_table() -> Result<Tensor> {
    moving_exponent(true)
}

/// The same without signs, for numbers that are not negative: twice the steps in each decade.
///
/// # Errors
/// What libtorch reports.
pub fn unsigned_dynamic_table() -> Result<Tensor> {
    moving_exponent(false)
}

fn moving_exponent(signed: bool) -> Result<Tensor> {
    const DECADES: i32 = 7;
    let mut parts = Vec::new();
    for decade in 0..DECADES {
        let steps = 1 << (decade + i32::from(!signed));
        let edges = Tensor::f_linspace(0.1, 1.0, steps + 1, (Kind::Float, Device::Cpu))?;
        let n = edges.size()[0] - 1;
        let middles = edges.f_narrow(0, 0, n)?.f_add(&edges.f_narrow(0, 1, n)?)?.f_div_scalar(2.0)?;
        let scale = 10f64.powi(decade - DECADES + 1);
        parts.push(middles.f_mul_scalar(scale)?);
        if signed {
            parts.push(middles.f_mul_scalar(-scale)?);
        }
    }
    parts.push(Tensor::f_from_slice(&[0.0f32, 1.0])?);
    Ok(Tensor::f_cat(&parts, 0)?.f_sort(0, false)?.0)
}

/// 8-bit integers with a scale for each row (Dettmers et al., "LLM.int8()", 2022, section 2.1): `codes · scale / 127`.
#[derive(Debug)]
pub struct Int8 {
    /// int8, `[out, in]`
    pub codes: Tensor,
    /// fp32, `[out]`: the largest magnitude of each row.
    pub scales: Tensor,
}

impl Int8 {
    /// Packs a weight.
    ///
    /// # Shapes
    /// `weight` `[out, in]`, any floating-point dtype; the codes lie on its device.
    ///
    /// # Errors
    /// [`Error::Shape`] for another shape or a weight that is not finite.
    pub fn pack(weight: &Tensor) -> Result<Self> {
        const OP: &str = "pack_int8";
        if weight.dim() != 2 {
            return Err(Error::shape(OP, "weight", "[out, in]", weight.size()));
        }
        no_grad(|| {
            let wide = weight.f_detach()?.f_to_kind(Kind::Float)?.f_contiguous()?;
            let scales = wide.f_abs()?.f_amax([1i64].as_slice(), false)?;
            if !scales.f_sum(Kind::Double)?.f_double_value(&[])?.is_finite() {
                return Err(Error::shape(OP, "weight", "finite numbers", "a NaN or an infinity"));
            }
            let up = scales.f_clamp_min(f64::from(f32::MIN_POSITIVE))?.f_reciprocal()?.f_mul_scalar(127.0)?;
            let codes = wide.f_mul(&up.f_unsqueeze(1)?)?.f_round()?.f_to_kind(Kind::Int8)?;
            Ok(Self { codes, scales })
        })
    }
}
