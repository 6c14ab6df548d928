//! How one merged tensor comes about, in blocks of rows.

use crate::error::{Error, Result};
use lora_format::Checkpoint;
use tch::{Kind, Tensor};

/// Elements that are merged at once: some MiB, which stay in the cache and are cheap to allocate again and again.
const BLOCK: i64 = 1 << 20;

/// A low-rank term `scale * left right`, oriented as the tensor is stored.
pub(crate) struct Delta {
    /// `[rows, r]`.
    pub(crate) left: Tensor,
    /// `[r, columns]`.
    pub(crate) right: Tensor,
    pub(crate) scale: f64,
}

/// How one tensor comes about.
pub(crate) struct Change {
    /// The tensor of the base to begin with, unless `replacement` is given.
    pub(crate) source: String,
    /// The value to begin with, from `modules_to_save` or a saved base layer.
    pub(crate) replacement: Option<Tensor>,
    /// Whether the replacement was trained, and is no copy of the base's value.
    pub(crate) trained: bool,
    pub(crate) deltas: Vec<Delta>,
}

impl Change {
    pub(crate) fn of(source: &str) -> Self {
        Change { source: source.into(), replacement: None, trained: false, deltas: Vec::new() }
    }

    /// The dtype that sums are taken in: float32, or float64 for a float64 base.
    pub(crate) fn wide(&self, base: &Checkpoint) -> Result<Kind> {
        Ok(if base.info(&self.source)?.kind == Kind::Double { Kind::Double } else { Kind::Float })
    }

    /// Some rows before the deltas, in the dtype of the base or the adapter.
    pub(crate) fn start(&self, name: &str, base: &Checkpoint, first: i64, count: i64) -> Result<Tensor> {
        match &self.replacement {
            Some(tensor) => {
                tensor.f_atleast_1d().and_then(|t| t.f_narrow(0, first, count)).map_err(|e| Error::merge(name, e))
            }
            None => Ok(base.read_rows(&self.source, first, count)?),
        }
    }

    /// Some merged rows, not yet rounded to the output dtype.
    pub(crate) fn rows(&self, name: &str, base: &Checkpoint, first: i64, count: i64) -> Result<Tensor> {
        let start = self.start(name, base, first, count)?;
        let mut rows = start.f_to_kind(self.wide(base)?).map_err(|e| Error::merge(name, e))?;
        for Delta { left, right, scale } in &self.deltas {
            let left = left.f_narrow(0, first, count).map_err(|e| Error::merge(name, e))?;
            rows = lora_core::merge_into(&rows, right, &left, *scale).map_err(|e| Error::merge(name, e))?;
        }
        Ok(rows)
    }
}

/// The rows of a tensor in blocks: the first row and the number of rows of each. A scalar is one row.
pub(crate) fn blocks(shape: &[i64]) -> impl Iterator<Item = (i64, i64)> {
    let rows = shape.first().copied().unwrap_or(1);
    let columns: i64 = shape.iter().skip(1).product();
    let step = (BLOCK / columns.max(1)).max(1);
    (0..rows).step_by(step as usize).map(move |first| (first, step.min(rows - first)))
}
