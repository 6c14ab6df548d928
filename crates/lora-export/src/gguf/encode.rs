//! Numbers as GGUF's types hold them.

use super::k_quants::{q4_k, q5_k, q6_k};
use crate::error::{Error, Result};
use lora_format::{GGUF_BLOCK, GgufType};
use rayon::prelude::*;
use tch::{Kind, Tensor};

/// Weights that one thread takes at a time: a whole number of blocks of every type.
const PIECE: usize = 1 << 16;

/// The bytes of a float32 tensor in a type; of a blocked type its rows are a multiple of the block.
///
/// # Errors
/// [`Error::Overflow`] for values that float16, or a float16 scale, cannot hold.
pub(crate) fn encode(name: &str, tensor: &Tensor, kind: GgufType) -> Result<Vec<u8>> {
    let fail = |e: tch::TchError| Error::merge(name, e);
    let plain = |kind: Kind| -> Result<Vec<u8>> {
        let cast = tensor.f_to_kind(kind).and_then(|t| t.f_contiguous()).map_err(fail)?;
        lora_torch::with_bytes(&cast, <[u8]>::to_vec).map_err(|e| Error::merge(name, e))
    };
    let block: fn(&[f32], &mut Vec<u8>) = match kind {
        GgufType::F32 => return plain(Kind::Float),
        GgufType::BF16 => return plain(Kind::BFloat16),
        GgufType::F16 => {
            check_range(name, tensor, kind)?;
            return plain(Kind::Half);
        }
        GgufType::Q8_0 => q8_0,
        GgufType::Q4_0 => q4_0,
        GgufType::Q5_0 => q5_0,
        GgufType::Q5_1 => q5_1,
        GgufType::Q4K => q4_k,
        GgufType::Q5K => q5_k,
        GgufType::Q6K => q6_k,
    };
    check_range(name, tensor, kind)?;
    let flat = tensor.f_to_kind(Kind::Float).and_then(|t| t.f_reshape([-1])).map_err(fail)?;
    let values = Vec::<f32>::try_from(&flat).map_err(fail)?;
    let of = |piece: &[f32]| {
        let mut bytes = Vec::with_capacity(kind.bytes(piece.len() as u64) as usize);
        piece.chunks_exact(kind.block() as usize).for_each(|x| block(x, &mut bytes));
        bytes
    };
    let pieces: Vec<Vec<u8>> = values.par_chunks(PIECE).map(of).collect();
    Ok(pieces.concat())
}

fn check_range(name: &str, tensor: &Tensor, kind: GgufType) -> Result<()> {
    let limit = f64::from(half::f16::MAX.to_f32());
    // Written so that what is not a number counts, too.
    let count = tensor.f_abs().and_then(|t| t.f_le(limit)).and_then(|t| t.f_logical_not());
    let count = count.and_then(|t| t.f_sum(Kind::Int64)).and_then(|t| t.f_int64_value(&[]));
    match count.map_err(|e| Error::merge(name, e))? {
        0 => Ok(()),
        count => Err(Error::Overflow { tensor: name.into(), count, dtype: kind.name() }),
    }
}

/// `d = max |x| / 127`, `q = round(x / d)`: off by at most half of d.
fn q8_0(x: &[f32], out: &mut Vec<u8>) {
    let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
    let d = largest / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    out.extend(half::f16::from_f32(d).to_le_bytes());
    out.extend(x.iter().map(|v| (v * inverse).round() as i8 as u8));
}

/// `d = x_m / -8` for the x_m of the largest size, `q = x / d + 8` rounded to 0..=15: off by at most half of |d|, and by |d|
/// next to 15. The first half of a block lies in the low bits, the second in the high ones.
fn q4_0(x: &[f32], out: &mut Vec<u8>) {
    let largest = x.iter().fold(0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    let d = largest / -8.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    out.extend(half::f16::from_f32(d).to_le_bytes());
    let quant = |v: f32| ((v * inverse + 8.5) as i32).clamp(0, 15) as u8;
    let (low, high) = x.split_at(GGUF_BLOCK / 2);
    out.extend(low.iter().zip(high).map(|(a, b)| quant(*a) | (quant(*b) << 4)));
}

/// As `q4_0` with 16 steps a side. The fifth bits of a block lie together before the others.
fn q5_0(x: &[f32], out: &mut Vec<u8>) {
    let largest = x.iter().fold(0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    let d = largest / -16.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    out.extend(half::f16::from_f32(d).to_le_bytes());
    five_bits(x.iter().map(|v| ((v * inverse + 16.5) as i32).clamp(0, 31) as u8), out);
}

/// `d = (max - min) / 31`, `q = round((x - min) / d)`: off by at most half of d.
fn q5_1(x: &[f32], out: &mut Vec<u8>) {
    let (low, high) = x.iter().fold((f32::MAX, f32::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
    let d = (high - low) / 31.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    out.extend(half::f16::from_f32(d).to_le_bytes());
    out.extend(half::f16::from_f32(low).to_le_bytes());
    five_bits(x.iter().map(|v| ((v - low) * inverse + 0.5).clamp(0.0, 31.0) as u8), out);
}

/// The fifth bits of 32 numbers, then their low halves as in `q4_0`.
fn five_bits(levels: impl Iterator<Item = u8>, out: &mut Vec<u8>) {
    let mut q = [0u8; GGUF_BLOCK];
    q.iter_mut().zip(levels).for_each(|(q, level)| *q = level);
    let high = q.iter().rev().fold(0u32, |bits, q| bits << 1 | u32::from(q >> 4));
    out.extend(high.to_le_bytes());
    let (low, high) = q.split_at(GGUF_BLOCK / 2);
    out.extend(low.iter().zip(high).map(|(a, b)| (a & 15) | (b & 15) << 4));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scale(bytes: &[u8]) -> f32 {
        half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }

    proptest! {
        #[test]
        fn eight_bits_are_off_by_half_a_step(x in prop::collection::vec(-100f32..100.0, GGUF_BLOCK)) {
            let mut bytes = Vec::new();
            q8_0(&x, &mut bytes);
            prop_assert_eq!(bytes.len(), 34);
            let d = scale(&bytes);
            for (v, q) in x.iter().zip(&bytes[2..]) {
                // The scale itself is rounded to 11 bits.
                prop_assert!((v - d * f32::from(*q as i8)).abs() <= 0.5 * d + v.abs() / 1024.0, "{} {}", v, d);
            }
        }

        #[test]
        fn four_bits_are_off_by_a_step(x in prop::collection::vec(-100f32..100.0, GGUF_BLOCK)) {
            let mut bytes = Vec::new();
            q4_0(&x, &mut bytes);
            prop_assert_eq!(bytes.len(), 18);
            let d = scale(&bytes);
            for (i, v) in x.iter().enumerate() {
                let byte = bytes[2 + i % 16];
                let q = if i < 16 { byte & 15 } else { byte >> 4 };
                prop_assert!((v - d * (f32::from(q) - 8.0)).abs() <= d.abs() * 1.01 + v.abs() / 1024.0, "{} {}", v, d);
            }
        }
    }

    fn fives(bytes: &[u8]) -> Vec<f32> {
        let high = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        let low = |i: usize| if i < 16 { bytes[4 + i] & 15 } else { bytes[4 + i - 16] >> 4 };
        (0..GGUF_BLOCK).map(|i| f32::from(low(i)) + 16.0 * ((high >> i) & 1) as f32).collect()
    }

    proptest! {
        #[test]
        fn five_bits_are_off_by_a_step_or_by_half_of_one(x in prop::collection::vec(-100f32..100.0, GGUF_BLOCK)) {
            let (mut zero, mut one) = (Vec::new(), Vec::new());
            q5_0(&x, &mut zero);
            q5_1(&x, &mut one);
            prop_assert_eq!((zero.len(), one.len()), (22, 24));
            let (d0, d1, low) = (scale(&zero), scale(&one), scale(&one[2..]));
            for ((v, a), b) in x.iter().zip(fives(&zero[2..])).zip(fives(&one[4..])) {
                prop_assert!((v - d0 * (a - 16.0)).abs() <= d0.abs() * 1.01 + v.abs() / 1024.0, "{} {}", v, d0);
                // Scale and minimum are rounded to 11 bits.
                let rounding = (31.0 * d1 + low.abs()) / 2048.0;
                prop_assert!((v - d1 * b - low).abs() <= 0.5 * d1 + 2.0 * rounding, "{} {} {}", v, d1, low);
            }
        }
    }

    #[test]
    fn what_a_scale_cannot_hold_is_refused() {
        for (value, kind) in [(f32::NAN, GgufType::Q8_0), (f32::INFINITY, GgufType::Q4K), (7e4, GgufType::F16)] {
            let mut x = [1f32; 256];
            x[3] = value;
            let error = encode("w", &Tensor::from_slice(&x), kind).unwrap_err();
            assert!(matches!(error, Error::Overflow { count: 1, .. }), "{error}");
        }
        assert!(encode("w", &Tensor::from_slice(&[7e4f32; 256]), GgufType::BF16).is_ok());
    }

    #[test]
    fn zeros_stay_zeros() {
        type Block = (fn(&[f32], &mut Vec<u8>), usize, usize);
        let blocks: [Block; 7] = [
            (q8_0, 32, 0),
            (q4_0, 32, 0),
            (q5_0, 32, 0),
            (q5_1, 32, 0),
            (q4_k, 256, 0),
            (q5_k, 256, 0),
            (q6_k, 256, 208),
        ];
        for (block, width, at) in blocks {
            let mut bytes = Vec::new();
            block(&vec![0.0; width], &mut bytes);
            assert_eq!(scale(&bytes[at..]), 0.0);
        }
    }
}
