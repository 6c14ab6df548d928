//! Attention over examples laid end to end, causal or within the whole example, without a mask over the whole batch.

use crate::error::{Error, Result};
use crate::ffi;
use tch::Tensor;

/// The lengths of the examples of a batch, in tokens, in the order in which they lie end to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    lens: Vec<i64>,
    total: i64,
}

impl Segments {
    /// Checks the lengths.
    ///
    /// # Errors
    /// [`Error::Shape`] when a length is not positive, or their sum overflows.
    pub fn new(lens: &[i64]) -> Result<Self> {
        let mut total = 0i64;
        for &n in lens {
            match total.checked_add(n) {
                Some(sum) if n > 0 => total = sum,
                _ => return Err(Error::shape("segments", "length", "positive", n)),
            }
        }
        Ok(Self { lens: lens.to_vec(), total })
    }

    /// The lengths, in tokens.
    pub fn lens(&self) -> &[i64] {
        &self.lens
    }

    /// All tokens.
    pub fn total(&self) -> i64 {
        self.total
    }
}

/// What an attention does to its scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionRule {
    /// The factor on the scores, `1 / sqrt(head_dim)` in most families.
    pub scale: f64,
    /// With `w`, query `i` sees key `j` iff `0 <= i - j < w`; absent, all before it.
    pub window: Option<i64>,
    /// Scores become `c · tanh(score / c)` (Gemma 2 report, 2024, section 2): absent in most families. No fused kernel
    /// takes it, so it costs the square of the longest segment for each head.
    pub softcap: Option<f64>,
    /// A query sees no key after it; an encoder's sees all of its segment, and has no window.
    pub causal: bool,
}

/// Scaled dot-product attention (Vaswani et al., 2017, equation 1), within each segment and blind to the others.
/// `heads` must be a multiple of `kv_heads` (grouped queries; keys are not repeated in memory).
///
/// # Shapes
/// `q` `[tokens, heads, head_dim]`, `k` and `v` `[tokens, kv_heads, head_dim]`; the result is like `q`.
///
/// # Errors
/// [`Error::Shape`] when the shapes or the segments do not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, segments: &Segments, rule: AttentionRule) -> Result<Tensor> {
    const OP: &str = "attention";
    let (qs, ks) = (q.size(), k.size());
    if qs.len() != 3 || qs[0] != segments.total() {
        return Err(Error::shape(OP, "q", format!("[{}, heads, head_dim]", segments.total()), qs));
    }
    if ks.len() != 3 || ks[0] != qs[0] || ks[2] != qs[2] || ks[1] == 0 || qs[1] % ks[1] != 0 {
        return Err(Error::shape(OP, "k", format!("[{}, a divisor of {}, {}]", qs[0], qs[1], qs[2]), ks));
    }
    if v.size() != ks {
        return Err(Error::shape(OP, "v", format!("{ks:?}"), v.size()));
    }
    if let Some(w) = rule.window.filter(|&w| w < 1) {
        return Err(Error::shape(OP, "window", "at least 1", w));
    }
    if let Some(w) = rule.window.filter(|_| !rule.causal) {
        return Err(Error::shape(OP, "window", "absent where attention is not causal", w));
    }
    if let Some(c) = rule.softcap.filter(|&c| c <= 0.0) {
        return Err(Error::shape(OP, "softcap", "above 0", c));
    }
    let (window, softcap) = (rule.window.unwrap_or(0), rule.softcap.unwrap_or(0.0));
    ffi::attention(q, k, v, segments.lens(), rule.scale, window, softcap, rule.causal)
}
