//! Causal attention over examples laid end to end, without a mask over the whole batch.

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

/// Scaled dot-product attention (Vaswani et al., 2017, equation 1), causal within each segment and blind to the others.
/// `heads` must be a multiple of `kv_heads` (grouped queries; keys are not repeated in memory). With `window = w`, query
/// `i` sees key `j` iff `0 <= i - j < w`.
///
/// # Shapes
/// `q` `[tokens, heads, head_dim]`, `k` and `v` `[tokens, kv_heads, head_dim]`; the result is like `q`.
///
/// # Errors
/// [`Error::Shape`] when the shapes or the segments do not fit.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &Segments,
    scale: f64,
    window: Option<i64>,
) -> Result<Tensor> {
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
    if let Some(w) = window.filter(|&w| w < 1) {
        return Err(Error::shape(OP, "window", "at least 1", w));
    }
    ffi::attention(q, k, v, segments.lens(), scale, window.unwrap_or(0))
}
