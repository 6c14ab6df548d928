//! Choosing the next token from logits: greedy, or by temperature and nucleus.

use crate::error::{Error, Result};
use lora_torch::mix_seed;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f64,
    /// Only the most likely tokens that together hold this share are drawn from (Holtzman et al., "The Curious Case of
    /// Neural Text Degeneration", 2020, section 3.1); 1 keeps all.
    pub top_p: f64,
    /// Where the draws come from.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Input`] for a temperature below 0 or a share outside `(0, 1]`.
    pub fn check(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            let got = self.temperature.to_string();
            return Err(Error::Input { what: "temperature", expected: "0 (greedy) or more".into(), got });
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::Input { what: "top_p", expected: "in (0, 1]".into(), got: self.top_p.to_string() });
        }
        Ok(())
    }

    /// The token at `position` of the text, from its logits: the same seed, position and logits give the same token.
    pub fn choose(&self, logits: &[f32], position: u64) -> usize {
        let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
        if self.temperature == 0.0 {
            return best;
        }
        let top = f64::from(logits[best]);
        let mut weights: Vec<(usize, f64)> =
            logits.iter().map(|&x| ((f64::from(x) - top) / self.temperature).exp()).enumerate().collect();
        if self.top_p < 1.0 {
            weights.sort_by(|a, b| b.1.total_cmp(&a.1));
            let all: f64 = weights.iter().map(|w| w.1).sum();
            let mut sum = 0.0;
            let keep = weights.iter().position(|w| {
                sum += w.1;
                sum >= self.top_p * all
            });
            weights.truncate(keep.map_or(weights.len(), |k| k + 1));
        }
        let all: f64 = weights.iter().map(|w| w.1).sum();
        // 53 random bits: uniform in [0, 1).
        let mut left = (mix_seed(&[self.seed, position]) >> 11) as f64 / (1u64 << 53) as f64 * all;
        for (id, weight) in &weights {
            left -= weight;
            if left < 0.0 {
                return *id;
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_distribution_and_stay_in_the_nucleus() {
        let logits = [1.0f32, 3.0, 2.0, -1.0];
        let all: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let s = Sampling { temperature: 1.0, top_p: 1.0, seed: 5 };
        let mut counts = [0u32; 4];
        for position in 0..20_000 {
            counts[s.choose(&logits, position)] += 1;
        }
        for (c, x) in counts.iter().zip(logits) {
            // Three standard deviations of a share from 20,000 draws are at most 1.1 %.
            assert!((f64::from(*c) / 20_000.0 - f64::from(x).exp() / all).abs() < 0.011, "{counts:?}");
        }
        let nucleus = Sampling { top_p: 0.8, ..s };
        assert!((0..2_000).all(|p| [1, 2].contains(&nucleus.choose(&logits, p))));
        assert_eq!(Sampling::default().choose(&logits, 7), 1);
    }

    #[test]
    fn ranges_are_checked() {
        for (temperature, top_p) in [(-1.0, 1.0), (f64::NAN, 1.0), (1.0, 0.0), (1.0, 1.1)] {
            assert!(Sampling { temperature, top_p, seed: 0 }.check().is_err());
        }
    }
}
