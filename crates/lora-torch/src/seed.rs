//! Seeds. Randomness is derived from (seed, step, micro-batch) and never from a generator that runs on, so that a
//! resumed run draws what the uninterrupted one would have drawn.

use crate::error::Result;
use crate::ffi;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tch::Tensor;

/// Matrices drawn in turn, fp32 on the CPU, each uniform in `[-bound, bound)`. They come from a generator of their own, whose
/// bits are those of `torch.Generator().manual_seed(seed)` and `Tensor.uniform_`, whatever other threads draw meanwhile.
///
/// # Shapes
/// `[rows, columns]` and the bound of each.
///
/// # Errors
/// What libtorch reports.
pub fn uniform_from_seed<const N: usize>(seed: u64, matrices: [([i64; 2], f64); N]) -> Result<Vec<Tensor>> {
    let (shapes, bounds) = (matrices.map(|(shape, _)| shape), matrices.map(|(_, bound)| bound));
    ffi::uniform(seed, &shapes, &bounds)
}

/// The right to draw from libtorch's generators: they are one for the whole process, so while one thread draws what follows
/// from its seed, others wait.
#[derive(Debug)]
#[must_use = "others draw from the same generators as soon as it is dropped"]
pub struct Drawing {
    _alone: MutexGuard<'static, ()>,
}

/// Seeds libtorch's generators on every device, and keeps other callers away until what it returns is dropped. A thread that
/// calls it again before waits for ever.
pub fn manual_seed(seed: u64) -> Drawing {
    static GENERATORS: Mutex<()> = Mutex::new(());
    // A thread that broke down while it drew has left nothing behind that a new seed does not set right.
    let alone = GENERATORS.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed as i64);
    Drawing { _alone: alone }
}

/// Mixes several numbers into one seed: the finaliser of SplitMix64 (Steele, Lea & Flood, 2014) over a running sum.
pub fn mix_seed(parts: &[u64]) -> u64 {
    parts.iter().fold(0x9E37_79B9_7F4A_7C15, |state, &part| {
        let mut z = (state ^ part).wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    })
}

#[cfg(test)]
mod tests {
    use super::mix_seed;

    #[test]
    fn order_and_every_part_matter() {
        let all =
            [mix_seed(&[1, 2, 3]), mix_seed(&[1, 3, 2]), mix_seed(&[1, 2]), mix_seed(&[1, 2, 4]), mix_seed(&[0, 2, 3])];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b), "{all:?}");
        }
        assert_eq!(mix_seed(&[7, 8]), mix_seed(&[7, 8]));
    }
}
