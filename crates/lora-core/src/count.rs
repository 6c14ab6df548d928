//! How few parameters an adapter trains.

use std::iter::Sum;

/// Parameters that an adapter trains, and those that full fine-tuning of the same weights would train.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParameterCount {
    /// `r · (in + out)`
    pub trained: i64,
    /// `in · out`
    pub full: i64,
}

impl ParameterCount {
    /// Counts for a linear layer, or for an embedding with `in_features` its vocabulary.
    pub fn of_linear(in_features: i64, out_features: i64, r: i64) -> Self {
        Self { trained: r * (in_features + out_features), full: in_features * out_features }
    }

    /// `trained / full`; 0 for nothing.
    pub fn share(&self) -> f64 {
        if self.full == 0 { 0.0 } else { self.trained as f64 / self.full as f64 }
    }
}

impl Sum for ParameterCount {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), |a, b| Self { trained: a.trained + b.trained, full: a.full + b.full })
    }
}
