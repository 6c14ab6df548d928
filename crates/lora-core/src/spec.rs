//! Rank, alpha, and the scale that they make.

use crate::error::{Error, Result};

/// Rank and scaling of one adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraSpec {
    r: i64,
    lora_alpha: f64,
    use_rslora: bool,
}

impl LoraSpec {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Value`] when `r` is below 1 or `lora_alpha` is not finite.
    pub fn new(r: i64, lora_alpha: f64, use_rslora: bool) -> Result<Self> {
        if r < 1 {
            return Err(Error::Value { what: "r", value: r.to_string(), expected: "at least 1" });
        }
        if !lora_alpha.is_finite() {
            return Err(Error::Value {
                what: "lora_alpha",
                value: lora_alpha.to_string(),
                expected: "a finite number",
            });
        }
        Ok(Self { r, lora_alpha, use_rslora })
    }

    /// The rank.
    pub fn r(&self) -> i64 {
        self.r
    }

    /// `lora_alpha / r` (Hu et al., 2021, section 4.1), or `lora_alpha / sqrt(r)` under rsLoRA (Kalajdzievski, "A Rank
    /// Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023).
    pub fn scale(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }
}
