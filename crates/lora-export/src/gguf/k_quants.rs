//! The K types of llama.cpp: blocks of 256 weights in parts, each part with a scale of few bits under one float16 scale.
//!
//! Rounding with the widest scale is the least that is done. Scales a little finer and coarser are tried beside it, each
//! refitted to its own roundings by weighted least squares, and the best is kept. Whole blocks then are compared once more
//! with their plain rounding, scales rounded, too: the search never loses.

use half::f16;
use lora_format::GGUF_SUPER_BLOCK;

/// Weights of a part of `Q4_K` and `Q5_K`.
const PART: usize = 32;
const PARTS: usize = GGUF_SUPER_BLOCK / PART;
/// Weights of a part of `Q6_K`.
const SMALL: usize = 16;
const SMALLS: usize = GGUF_SUPER_BLOCK / SMALL;
/// The largest scale and minimum of 6 bits.
const MAX_6: f32 = 63.0;
/// How far from the plain number of steps scales are tried, in tenths of a step.
const REACH: i32 = 10;

/// The nearest whole number, ties to even, of a number below 2^22: adding 1.5 * 2^23 leaves no bits for a fraction. Unlike a
/// call of `round` it runs on vectors everywhere.
fn nearest(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

fn over(a: f32, b: f32) -> f32 {
    if b == 0.0 { 0.0 } else { a / b }
}

/// `x ~ scale * q + low` with a scale of at least 0 and a low of at most 0.
#[derive(Clone, Copy, Default)]
struct Line {
    scale: f32,
    low: f32,
}

impl Line {
    /// From the least value, or 0, to the largest in `top` steps.
    fn plain(x: &[f32], top: f32) -> Self {
        let low = x.iter().fold(0f32, |m, v| m.min(*v));
        let high = x.iter().fold(f32::MIN, |m, v| m.max(*v));
        Line { scale: (high - low) / top, low }
    }

    /// The best of those that are tried; large weights count more than small ones.
    fn search(x: &[f32], top: f32) -> Self {
        let plain = Line::plain(x, top);
        if plain.scale <= 0.0 {
            return plain;
        }
        let mean = (x.iter().map(|v| v * v).sum::<f32>() / PART as f32).sqrt();
        let mut weights = [0f32; PART];
        weights.iter_mut().zip(x).for_each(|(w, v)| *w = mean + v.abs());
        let (mut sum_w, mut sum_x) = (0f32, 0f32);
        for (w, v) in weights.iter().zip(x) {
            sum_w += w;
            sum_x += w * v;
        }
        let error = |line: Line, levels: &[f32; PART]| -> f32 {
            let parts = weights.iter().zip(x).zip(levels);
            parts.map(|((w, v), l)| w * (line.scale * l + line.low - v).powi(2)).sum()
        };
        let mut levels = [0f32; PART];
        let mut round = |steps: f32| {
            levels.iter_mut().zip(x).for_each(|(l, v)| *l = nearest((v - plain.low) * steps).clamp(0.0, top));
            levels
        };
        let range = plain.scale * top;
        let (mut best, mut least) = (plain, error(plain, &round(top / range)));
        for tenths in -REACH..=REACH {
            let levels = round((top + tenths as f32 / 10.0) / range);
            let (mut sum_l, mut sum_ll, mut sum_lx) = (0f32, 0f32, 0f32);
            for ((w, v), l) in weights.iter().zip(x).zip(&levels) {
                sum_l += w * l;
                sum_ll += w * l * l;
                sum_lx += w * l * v;
            }
            let determinant = sum_w * sum_ll - sum_l * sum_l;
            if determinant <= 0.0 {
                continue;
            }
            let low = (sum_ll * sum_x - sum_l * sum_lx) / determinant;
            let line = if low > 0.0 {
                Line { scale: sum_lx / sum_ll, low: 0.0 }
            } else {
                Line { scale: (sum_w * sum_lx - sum_x * sum_l) / determinant, low }
            };
            let found = error(line, &levels);
            if found < least && line.scale > 0.0 {
                (best, least) = (line, found);
            }
        }
        best
    }
}

/// A block of `Q4_K` or `Q5_K` before its bits are packed.
struct Lines {
    d: f16,
    low: f16,
    scales: [u8; PARTS],
    lows: [u8; PARTS],
    levels: [u8; GGUF_SUPER_BLOCK],
    error: f32,
}

impl Lines {
    /// Rounds the lines of the parts to 6 bits, and every weight to the nearest level of its rounded line.
    fn round(x: &[f32], lines: &[Line; PARTS], top: f32) -> Self {
        let (d, low) = lines.iter().fold((0f32, 0f32), |(d, low), l| (d.max(l.scale), low.max(-l.low)));
        let (d, low) = (f16::from_f32(d / MAX_6), f16::from_f32(low / MAX_6));
        let mut block =
            Lines { d, low, scales: [0; PARTS], lows: [0; PARTS], levels: [0; GGUF_SUPER_BLOCK], error: 0.0 };
        for (i, (line, x)) in lines.iter().zip(x.chunks_exact(PART)).enumerate() {
            let bits = |value: f32, unit: f16| nearest(over(value, unit.to_f32())).clamp(0.0, MAX_6);
            let (scale, minus) = (bits(line.scale, d), bits(-line.low, low));
            (block.scales[i], block.lows[i]) = (scale as u8, minus as u8);
            let (step, minus) = (d.to_f32() * scale, low.to_f32() * minus);
            let inverse = over(1.0, step);
            for (q, v) in block.levels[i * PART..].iter_mut().zip(x) {
                let level = nearest(((v + minus) * inverse).clamp(0.0, top));
                *q = level as u8;
                block.error += (step * level - minus - v).powi(2);
            }
        }
        block
    }

    fn of(x: &[f32], top: f32) -> Self {
        let lines = |find: fn(&[f32], f32) -> Line| {
            let mut lines = [Line::default(); PARTS];
            lines.iter_mut().zip(x.chunks_exact(PART)).for_each(|(line, x)| *line = find(x, top));
            Lines::round(x, &lines, top)
        };
        let (found, plain) = (lines(Line::search), lines(Line::plain));
        if found.error <= plain.error { found } else { plain }
    }

    /// Scale, low, and eight pairs of 6 bits in 12 bytes: the first four whole, the others in four bits and the two free ones.
    fn head(&self, out: &mut Vec<u8>) {
        out.extend(self.d.to_le_bytes());
        out.extend(self.low.to_le_bytes());
        let (s, m) = (&self.scales, &self.lows);
        out.extend((0..4).map(|i| s[i] | (s[i + 4] >> 4) << 6));
        out.extend((0..4).map(|i| m[i] | (m[i + 4] >> 4) << 6));
        out.extend((4..8).map(|i| (s[i] & 15) | (m[i] & 15) << 4));
    }

    /// Two parts of 32 side by side in the low and high halves of 32 bytes.
    fn low_bits(&self, out: &mut Vec<u8>) {
        for pair in self.levels.chunks_exact(2 * PART) {
            let (a, b) = pair.split_at(PART);
            out.extend(a.iter().zip(b).map(|(a, b)| (a & 15) | (b & 15) << 4));
        }
    }
}

/// `Q4_K`: 144 bytes of 256 weights.
pub(super) fn q4_k(x: &[f32], out: &mut Vec<u8>) {
    let block = Lines::of(x, 15.0);
    block.head(out);
    block.low_bits(out);
}

/// `Q5_K`: 176 bytes of 256 weights; bit i of byte l of the high bits is that of weight l of part i.
pub(super) fn q5_k(x: &[f32], out: &mut Vec<u8>) {
    let block = Lines::of(x, 31.0);
    block.head(out);
    let high = |l: usize| (0..PARTS).fold(0, |byte, part| byte | (block.levels[part * PART + l] >> 4) << part);
    out.extend((0..PART).map(high));
    block.low_bits(out);
}

/// The scale of 16 weights in -32..=31 steps: the largest one on -32.
fn plain_scale(x: &[f32]) -> f32 {
    x.iter().fold(0f32, |m, v| if v.abs() > m.abs() { *v } else { m }) / -32.0
}

/// The scale that leaves the least squared error, weights counting by their squares.
fn search_scale(x: &[f32]) -> f32 {
    let plain = plain_scale(x);
    if plain == 0.0 {
        return 0.0;
    }
    // With levels l the best scale is s = sum(w x l) / sum(w l l), and takes s * sum(w x l) off the error.
    let (mut best, mut most) = (plain, 0f32);
    for tenths in -REACH..=REACH {
        let inverse = (32.0 + tenths as f32 / 10.0) / (32.0 * plain);
        let (mut sum_lx, mut sum_ll) = (0f32, 0f32);
        for v in x {
            let l = nearest(v * inverse).clamp(-32.0, 31.0);
            let w = v * v;
            sum_lx += w * v * l;
            sum_ll += w * l * l;
        }
        if sum_ll > 0.0 && sum_lx * sum_lx > most * sum_ll {
            best = sum_lx / sum_ll;
            most = best * sum_lx;
        }
    }
    best
}

/// A block of `Q6_K` before its bits are packed.
struct Scales {
    d: f16,
    scales: [i8; SMALLS],
    levels: [u8; GGUF_SUPER_BLOCK],
    error: f32,
}

impl Scales {
    fn round(x: &[f32], scales: &[f32; SMALLS]) -> Self {
        let largest = scales.iter().fold(0f32, |m, s| if s.abs() > m.abs() { *s } else { m });
        let d = f16::from_f32(largest / -128.0);
        let mut block = Scales { d, scales: [0; SMALLS], levels: [32; GGUF_SUPER_BLOCK], error: 0.0 };
        for (i, (scale, x)) in scales.iter().zip(x.chunks_exact(SMALL)).enumerate() {
            let bits = nearest(over(*scale, d.to_f32())).clamp(-128.0, 127.0);
            block.scales[i] = bits as i8;
            let step = d.to_f32() * bits;
            let inverse = over(1.0, step);
            for (q, v) in block.levels[i * SMALL..].iter_mut().zip(x) {
                let level = nearest((v * inverse).clamp(-32.0, 31.0));
                *q = (level + 32.0) as u8;
                block.error += (step * level - v).powi(2);
            }
        }
        block
    }
}

/// `Q6_K`: 210 bytes of 256 weights. Each half of 128 has its low bits in 64 bytes, weights 64 apart sharing one, and its high
/// bits in 32 bytes, weights 32 apart sharing one.
pub(super) fn q6_k(x: &[f32], out: &mut Vec<u8>) {
    let rounded = |find: fn(&[f32]) -> f32| {
        let mut scales = [0f32; SMALLS];
        scales.iter_mut().zip(x.chunks_exact(SMALL)).for_each(|(scale, x)| *scale = find(x));
        Scales::round(x, &scales)
    };
    let (found, plain) = (rounded(search_scale), rounded(plain_scale));
    let block = if found.error <= plain.error { found } else { plain };
    for half in block.levels.chunks_exact(128) {
        let (a, b) = half.split_at(64);
        out.extend(a.iter().zip(b).map(|(a, b)| (a & 15) | (b & 15) << 4));
    }
    for half in block.levels.chunks_exact(128) {
        out.extend((0..32).map(|l| (0..4).fold(0, |byte, i| byte | (half[32 * i + l] >> 4) << (2 * i))));
    }
    out.extend(block.scales.map(|s| s as u8));
    out.extend(block.d.to_le_bytes());
}

#[cfg(test)]
mod tests;
