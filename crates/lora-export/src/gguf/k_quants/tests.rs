//! Blocks unpacked by a reader of the tests' own, and held against the bounds of the types.

use super::*;
use proptest::prelude::*;

/// float16 keeps 11 bits: scale and minimum are off by this share of themselves, in the whole block of this share of its
/// reach.
const HALF: f32 = 1.0 / 2048.0;
/// Below 2^-14 float16 has steps of 2^-24; a block multiplies half of one by at most 63 * 31.
const TINY: f32 = 63.0 * 31.0 / 33_554_432.0;
/// Sums of 256 squares in float32.
const SUM: f32 = 1.0 + 1e-4;
/// What a search gains at least on Gaussian weights, as a share of the error of plain rounding.
const GAIN: f32 = 0.02;

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Every weight of a `Q4_K` (144 bytes) or `Q5_K` (176 bytes) block, and its step.
fn lines(bytes: &[u8]) -> Vec<(f32, f32)> {
    let (d, low, s) = (half_at(bytes, 0), half_at(bytes, 2), &bytes[4..16]);
    let five = bytes.len() == 176;
    let q = &bytes[bytes.len() - 128..];
    let one = |i: usize| {
        let (part, l) = (i / 32, i % 32);
        let (scale, minus) = if part < 4 {
            (s[part] & 63, s[part + 4] & 63)
        } else {
            (s[part + 4] & 15 | (s[part - 4] >> 6) << 4, s[part + 4] >> 4 | (s[part] >> 6) << 4)
        };
        let byte = q[part / 2 * 32 + l];
        let mut level = if part % 2 == 0 { byte & 15 } else { byte >> 4 };
        if five {
            level += (bytes[16 + l] >> part & 1) * 16;
        }
        let step = d * f32::from(scale);
        (step * f32::from(level) - low * f32::from(minus), step)
    };
    (0..256).map(one).collect()
}

/// Every weight of a `Q6_K` block, and its step.
fn scales(bytes: &[u8]) -> Vec<(f32, f32)> {
    let d = half_at(bytes, 208);
    let one = |i: usize| {
        let (half, at) = (i / 128, i % 128);
        let low = bytes[64 * half + at % 64] >> (at / 64 * 4) & 15;
        let high = bytes[128 + 32 * half + at % 32] >> (at / 32 * 2) & 3;
        let step = d * f32::from(bytes[192 + i / 16] as i8);
        (step * (f32::from(low | high << 4) - 32.0), step)
    };
    (0..256).map(one).collect()
}

/// Blocks of random bits and the weights that the gguf package takes them for; see `tests/reference/make_k_blocks.py`.
const GOLDEN: &[u8] = include_bytes!("../../../tests/golden/k_blocks.bin");

#[test]
fn blocks_are_read_as_the_gguf_package_reads_them() {
    let mut rest = GOLDEN;
    for (size, unpack) in [(144, lines as fn(&[u8]) -> Vec<(f32, f32)>), (176, lines), (210, scales)] {
        let (blocks, after) = rest.split_at(2 * size);
        let (weights, after) = after.split_at(4 * 512);
        rest = after;
        let wanted = weights.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let got = blocks.chunks_exact(size).flat_map(unpack).map(|(weight, _)| weight);
        assert!(got.map(f32::to_bits).eq(wanted.map(f32::to_bits)), "blocks of {size} bytes");
    }
    assert!(rest.is_empty());
}

fn encoded(block: fn(&[f32], &mut Vec<u8>), x: &[f32], wanted: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    block(x, &mut bytes);
    assert_eq!(bytes.len(), wanted);
    bytes
}

fn rms(x: &[f32], y: &[(f32, f32)]) -> f32 {
    (x.iter().zip(y).map(|(x, (y, _))| (x - y).powi(2)).sum::<f32>() / 256.0).sqrt()
}

/// Parts of very different sizes, as rows have them, some one-sided, some constant.
fn rows() -> impl Strategy<Value = Vec<f32>> {
    let part = (-12i32..4, 0u8..4, prop::collection::vec(-1f32..1.0, 32)).prop_map(|(size, shape, x)| {
        let size = 2f32.powi(size);
        let of = |v: f32| match shape {
            0 => v.abs() * size,
            1 => -size,
            2 => v * v * v * size,
            _ => v * size,
        };
        x.into_iter().map(of).collect::<Vec<f32>>()
    });
    prop::collection::vec(part, 8).prop_map(|parts| parts.concat())
}

proptest! {
    /// With R the widest range (0 included) of a part, rounding without a search is off by at most half a step of its part,
    /// `R / (2 top)`, by `top` times half a step of the scales, `top * (R / top) / 126`, by half a step of the minima,
    /// `R / 126`, and by float16's share of both; the search is only taken where it is no worse over the block.
    #[test]
    fn four_and_five_bits_keep_their_bound(x in rows()) {
        let range = x.chunks(32).map(|p| {
            p.iter().fold(0f32, |m, v| m.max(*v)) - p.iter().fold(0f32, |m, v| m.min(*v))
        }).fold(0f32, f32::max);
        for (top, block, wanted) in [(15.0, q4_k as fn(&[f32], &mut Vec<u8>), 144), (31.0, q5_k, 176)] {
            let bytes = encoded(block, &x, wanted);
            let bound = range * (0.5 / top + 2.0 / 126.0 + 2.0 * HALF) * SUM + TINY;
            prop_assert!(rms(&x, &lines(&bytes)) <= bound, "{} > {}", rms(&x, &lines(&bytes)), bound);
        }
    }

    /// With A the largest size, rounding without a search is off by at most one step of its part, `A / 32` (31 is the last
    /// level above), and by 32 times half a step of the scales, `32 * (A / 32) / 256`, twice that at the end of their range.
    #[test]
    fn six_bits_keep_their_bound(x in rows()) {
        let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        let got = scales(&encoded(q6_k, &x, 210));
        let bound = largest * (1.0 / 32.0 + 1.0 / 128.0 + HALF) * SUM + TINY;
        prop_assert!(rms(&x, &got) <= bound, "{} > {}", rms(&x, &got), bound);
    }

    /// No other level of a weight's part is nearer to it.
    #[test]
    fn each_weight_has_the_nearest_level_of_its_part(x in rows()) {
        let (four, five) = (lines(&encoded(q4_k, &x, 144)), lines(&encoded(q5_k, &x, 176)));
        let six = scales(&encoded(q6_k, &x, 210));
        for blocks in [four, five, six] {
            for (part, y) in x.chunks(16).zip(blocks.chunks(16)) {
                let (low, high) = y.iter().fold((f32::MAX, f32::MIN), |(l, h), (v, _)| (l.min(*v), h.max(*v)));
                for (v, (w, step)) in part.iter().zip(y) {
                    // Levels that the part does not use cannot be told from those it lacks.
                    if *v > low && *v < high {
                        prop_assert!((v - w).abs() <= 0.5 * step.abs() * SUM + TINY * HALF, "{} {} {}", v, w, step);
                    }
                }
            }
        }
    }
}

#[test]
fn the_search_is_better_than_rounding_with_the_widest_scale() {
    // Gaussian weights, by the central limit theorem.
    let mut seed = 1u32;
    let mut uniform = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(seed >> 8) / f64::from(1 << 24) - 0.5
    };
    let x: Vec<f32> = (0..256 * 64).map(|_| (0..12).map(|_| uniform()).sum::<f64>() as f32).collect();
    let plain_lines = |x: &[f32], top: f32| {
        let mut lines = [Line::default(); PARTS];
        lines.iter_mut().zip(x.chunks_exact(PART)).for_each(|(line, x)| *line = Line::plain(x, top));
        Lines::round(x, &lines, top).error
    };
    let (mut found, mut plain) = ([0f32; 3], [0f32; 3]);
    for x in x.chunks_exact(256) {
        let mut small = [0f32; SMALLS];
        small.iter_mut().zip(x.chunks_exact(SMALL)).for_each(|(scale, x)| *scale = plain_scale(x));
        let errors = [plain_lines(x, 15.0), plain_lines(x, 31.0), Scales::round(x, &small).error];
        let blocks = [lines(&encoded(q4_k, x, 144)), lines(&encoded(q5_k, x, 176)), scales(&encoded(q6_k, x, 210))];
        for i in 0..3 {
            plain[i] += errors[i];
            found[i] += rms(x, &blocks[i]).powi(2) * 256.0;
        }
    }
    for i in 0..3 {
        let gain = 1.0 - (found[i] / plain[i]).sqrt();
        assert!(gain > GAIN, "type {i}: {gain}");
    }
}
