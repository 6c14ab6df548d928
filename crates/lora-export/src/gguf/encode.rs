//! Numbers as GGUF's types hold them.

use crate::error::{Error, Result};
use lora_format::{GGUF_BLOCK, GgufType};
use tch::{Kind, Tensor};

/// The bytes of a float32 tensor in a type; of a blocked type its rows are a multiple of the block.
pub(crate) fn encode(name: &str, tensor: &Tensor, kind: GgufType) -> Result<Vec<u8>> {
    let fail = |e: tch::TchError| Error::merge(name, e);
    let plain = |kind: Kind| -> Result<Vec<u8>> {
        let cast = tensor.f_to_kind(kind).and_then(|t| t.f_contiguous()).map_err(fail)?;
        lora_torch::with_bytes(&cast, <[u8]>::to_vec).map_err(|e| Error::merge(name, e))
    };
    let block = match kind {
        GgufType::F32 => return plain(Kind::Float),
        GgufType::F16 => return plain(Kind::Half),
        GgufType::BF16 => return plain(Kind::BFloat16),
        GgufType::Q8_0 => q8_0,
        GgufType::Q4_0 => q4_0,
    };
    let flat = tensor.f_to_kind(Kind::Float).and_then(|t| t.f_reshape([-1])).map_err(fail)?;
    let values = Vec::<f32>::try_from(&flat).map_err(fail)?;
    let mut bytes = Vec::with_capacity(kind.bytes(values.len() as u64) as usize);
    values.chunks_exact(GGUF_BLOCK).for_each(|x| block(x, &mut bytes));
    Ok(bytes)
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

    #[test]
    fn zeros_stay_zeros() {
        for block in [q8_0, q4_0] {
            let mut bytes = Vec::new();
            block(&[0.0; GGUF_BLOCK], &mut bytes);
            assert_eq!(scale(&bytes), 0.0);
        }
    }
}
