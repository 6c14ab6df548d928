//! The loss straight from hidden states, by chunks of rows: the logits are never held whole.

use crate::error::{Error, Result};
use crate::ffi;
use crate::linear::LoraPart;
use crate::weight::Weight;
use tch::{Kind, Tensor};

/// The output head.
#[derive(Clone, Copy, Debug)]
pub struct HeadPart<'a> {
    /// `[vocab, hidden]`
    pub weight: &'a Weight,
    /// `[vocab]`
    pub bias: Option<&'a Tensor>,
    /// An adapter over the head, if it has one.
    pub adapter: Option<LoraPart<'a>>,
    /// Logits become `c · tanh(logit / c)` (Gemma 2).
    pub softcap: Option<f64>,
}

/// The SUM over rows of `weight · (-log softmax(head(hidden))[target])`, fp32 (fp64 for fp64 input); without weights they
/// are 1.
///
/// Gradients for `hidden`, and for the head and its adapter where they require them, are made in the forward pass chunk
/// by chunk, so that no more than `chunk_rows x vocab` logits exist at any time. The weights get none.
///
/// # Shapes
/// `hidden` `[n, hidden]`, `targets` `[n]` int64 in `[0, vocab)`, `weights` `[n]` float; the result is a scalar.
///
/// # Errors
/// [`Error::Shape`] when the shapes do not fit.
pub fn cross_entropy(
    hidden: &Tensor,
    head: HeadPart<'_>,
    targets: &Tensor,
    weights: Option<&Tensor>,
    chunk_rows: i64,
) -> Result<Tensor> {
    const OP: &str = "cross_entropy";
    let raw = checked(OP, hidden, head, targets)?;
    if let Some(w) = weights.filter(|w| w.size() != targets.size() || !w.is_floating_point()) {
        let expected = format!("{:?} of floating point", targets.size());
        return Err(Error::shape(OP, "weights", expected, (w.size(), w.kind())));
    }
    ffi::cross_entropy(hidden, &raw, targets, weights, head.softcap.unwrap_or(0.0), chunk_rows.max(1))
}

/// `-log softmax(head(hidden))[target]` of every row, in fp64 and without a gradient; logits as in [`cross_entropy`].
///
/// # Shapes
/// `hidden` `[n, hidden]`, `targets` `[n]` int64 in `[0, vocab)`; the result is `[n]`.
///
/// # Errors
/// [`Error::Shape`] when the shapes do not fit.
pub fn token_losses(hidden: &Tensor, head: HeadPart<'_>, targets: &Tensor, chunk_rows: i64) -> Result<Tensor> {
    let raw = checked("token_losses", hidden, head, targets)?;
    ffi::token_losses(hidden, &raw, targets, head.softcap.unwrap_or(0.0), chunk_rows.max(1))
}

fn checked(op: &'static str, hidden: &Tensor, head: HeadPart<'_>, targets: &Tensor) -> Result<ffi::RawProjection> {
    let h = hidden.size();
    let &[_, width] = h.as_slice() else { return Err(Error::shape(op, "hidden", "[n, hidden]", h)) };
    let w = head.weight.check(op, width)?;
    if targets.size() != [h[0]] || targets.kind() != Kind::Int64 {
        return Err(Error::shape(op, "targets", format!("[{}] int64", h[0]), (targets.size(), targets.kind())));
    }
    if let Some(l) = head.adapter {
        let r = l.a.size().first().copied().unwrap_or(0);
        if l.a.size() != [r, w[1]] || l.b.size() != [w[0], r] {
            let expected = format!("[r, {}], [{}, r]", w[1], w[0]);
            return Err(Error::shape(op, "lora_A, lora_B", expected, (l.a.size(), l.b.size())));
        }
    }
    Ok(ffi::raw_projection(head.weight, head.bias, head.adapter.map(|l| (l.a, l.b, l.scale))))
}
