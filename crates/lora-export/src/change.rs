//! How one merged tensor comes about, in blocks of rows.

use crate::error::{Error, Result};
use lora_core::StackedLora;
use lora_format::Checkpoint;
use lora_torch::Nf4;
use tch::{Kind, TchError, Tensor};

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

/// One thing that an adapter does to a tensor; several adapters are taken one after the other.
pub(crate) enum Step {
    /// A low-rank term is added.
    Delta(Delta),
    /// `scale * vector` is added to a bias.
    Vector {
        /// `[rows]`.
        vector: Tensor,
        scale: f64,
    },
    /// Each output is given the length that DoRA trained.
    Magnitude(Magnitude),
    /// Rows take the place of others.
    Rows(Rows),
    /// Each matrix of a stack `[E, out, in]` has a low-rank term of its own added.
    Stacked(StackedLora),
}

/// Rows of trained tokens.
pub(crate) struct Rows {
    pub(crate) ids: Vec<i64>,
    /// `[ids, columns]`.
    pub(crate) rows: Tensor,
}

impl Rows {
    /// A block of rows, beginning with `first`, with those that are replaced.
    pub(crate) fn put(&self, block: &Tensor, first: i64) -> std::result::Result<Tensor, TchError> {
        let last = first + block.size()[0];
        let here = self.ids.iter().enumerate().filter(|(_, id)| (first..last).contains(*id));
        let (slots, places): (Vec<i64>, Vec<i64>) = here.map(|(slot, id)| (slot as i64, id - first)).unzip();
        if slots.is_empty() {
            return Ok(block.shallow_clone());
        }
        let own = self.rows.f_index_select(0, &Tensor::f_from_slice(&slots)?)?.f_to_kind(block.kind())?;
        block.f_index_copy(0, &Tensor::f_from_slice(&places)?, &own)
    }
}

/// `scale · B A` of some matrices of a stack, `[count, out, in]`, in `kind`; of absolute values where these are asked for.
pub(crate) fn stacked_term(
    lora: &StackedLora,
    (first, count): (i64, i64),
    kind: Kind,
    absolute: bool,
) -> lora_core::Result<Tensor> {
    let (a, b) = lora.views()?;
    let of = |t: &Tensor| -> lora_core::Result<Tensor> {
        let t = t.f_narrow(0, first, count)?.f_to_kind(kind)?;
        Ok(if absolute { t.f_abs()? } else { t })
    };
    let scale = if absolute { lora.scale.abs() } else { lora.scale };
    Ok(of(&b)?.f_matmul(&of(&a)?)?.f_mul_scalar(scale)?)
}

/// DoRA's lengths: `m / n` on each output, where `n` is the norm of its weights as they are by then.
pub(crate) struct Magnitude {
    /// `[outputs]`, float64.
    pub(crate) m: Tensor,
    /// The norms `[outputs]`, float64, where outputs are the columns of the tensor as it is stored; where they are its
    /// rows, norms are taken from the rows themselves.
    pub(crate) column_norms: Option<Tensor>,
}

impl Magnitude {
    /// What some rows, beginning with `first`, are multiplied by.
    pub(crate) fn ratio(&self, rows: &Tensor, first: i64) -> std::result::Result<Tensor, TchError> {
        let ratio = match &self.column_norms {
            Some(norms) => self.m.f_div(norms)?.f_unsqueeze(0)?,
            None => {
                let norms = rows.f_square()?.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Double)?.f_sqrt()?;
                self.m.f_narrow(0, first, rows.size()[0])?.f_div(&norms)?.f_unsqueeze(1)?
            }
        };
        ratio.f_to_kind(rows.kind())
    }

    /// How many squares a norm sums, given some rows.
    pub(crate) fn terms(&self, rows: &Tensor) -> i64 {
        rows.size().get(1).copied().unwrap_or(1)
    }
}

/// A weight `[out, in]` as LoftQ packs it.
pub(crate) struct Packed {
    pub(crate) codes: Nf4,
    pub(crate) transposed: bool,
}

impl Packed {
    /// Some rows of the tensor as it is stored.
    fn rows(&self, first: i64, count: i64) -> lora_torch::Result<Tensor> {
        if !self.transposed {
            return self.codes.dense_rows(first, count);
        }
        let [outputs, _] = self.codes.shape();
        Ok(self.codes.dense_rows(0, outputs)?.f_narrow(1, first, count)?.f_tr()?)
    }
}

/// How one tensor comes about.
pub(crate) struct Change {
    /// The tensor of the base to begin with, unless `replacement` is given.
    pub(crate) source: String,
    /// The value to begin with, from `modules_to_save` or a saved base layer.
    pub(crate) replacement: Option<Tensor>,
    /// What LoftQ put in the place of the base's value; `transposed` where the tensor is stored as `[in, out]`.
    pub(crate) packed: Option<Packed>,
    /// Whether the replacement was trained, and is no copy of the base's value.
    pub(crate) trained: bool,
    pub(crate) steps: Vec<Step>,
}

impl Change {
    pub(crate) fn of(source: &str) -> Self {
        Change { source: source.into(), replacement: None, packed: None, trained: false, steps: Vec::new() }
    }

    /// The dtype that sums are taken in: float32, or float64 for a float64 base.
    pub(crate) fn wide(&self, base: &Checkpoint) -> Result<Kind> {
        // The head of a classifier may be one that the base lacks.
        let new = self.replacement.is_some() && !base.contains(&self.source);
        Ok(if !new && base.info(&self.source)?.kind == Kind::Double { Kind::Double } else { Kind::Float })
    }

    /// The shape of the tensor: what was trained in full counts, as a head may be for other labels than the base's.
    pub(crate) fn shape(&self, base: &Checkpoint) -> Result<Vec<i64>> {
        match &self.replacement {
            Some(tensor) if self.trained => Ok(tensor.size()),
            _ => Ok(base.info(&self.source)?.shape.clone()),
        }
    }

    /// Some rows before the deltas, in the dtype of the base or the adapter.
    pub(crate) fn start(&self, name: &str, base: &Checkpoint, first: i64, count: i64) -> Result<Tensor> {
        match &self.replacement {
            Some(tensor) => {
                tensor.f_atleast_1d().and_then(|t| t.f_narrow(0, first, count)).map_err(|e| Error::merge(name, e))
            }
            None => match &self.packed {
                Some(packed) => {
                    let kind = base.info(&self.source)?.kind;
                    let rows = packed.rows(first, count).map_err(|e| Error::merge(name, e))?;
                    rows.f_to_kind(kind).map_err(|e| Error::merge(name, e))
                }
                None => Ok(base.read_rows(&self.source, first, count)?),
            },
        }
    }

    /// Some merged rows, not yet rounded to the output dtype; all of them are finite where a low-rank term was added.
    pub(crate) fn rows(&self, name: &str, base: &Checkpoint, first: i64, count: i64) -> Result<Tensor> {
        let rows = self.unchecked_rows(name, base, first, count)?;
        if self.has_delta() && !all_finite(&rows).map_err(|e| Error::merge(name, e))? {
            self.refuse_infinite(name, &rows)?;
        }
        Ok(rows)
    }

    fn has_delta(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, Step::Delta(_)))
    }

    /// # Errors
    /// [`lora_core::Error::NotFinite`] when a low-rank term left values that are not finite.
    pub(crate) fn refuse_infinite(&self, name: &str, rows: &Tensor) -> Result<()> {
        match count_infinite(rows).map_err(|e| Error::merge(name, e))? {
            count if count > 0 && self.has_delta() => Err(Error::merge(name, lora_core::Error::NotFinite { count })),
            _ => Ok(()),
        }
    }

    /// Some merged rows, whatever they hold. Low-rank terms are added in place: a block of rows is read and written once for
    /// each.
    pub(crate) fn unchecked_rows(&self, name: &str, base: &Checkpoint, first: i64, count: i64) -> Result<Tensor> {
        let start = self.start(name, base, first, count)?;
        let wide = self.wide(base)?;
        let mut rows = start.f_to_kind(wide).map_err(|e| Error::merge(name, e))?;
        if self.replacement.is_some() && self.has_delta() {
            // It may be the adapter's own memory.
            let mut own = rows.f_empty_like().map_err(|e| Error::merge(name, e))?;
            own.f_copy_(&rows).map_err(|e| Error::merge(name, e))?;
            rows = own;
        }
        for step in &self.steps {
            let taken = match step {
                Step::Delta(Delta { left, right, scale }) => {
                    let left = left.f_narrow(0, first, count).and_then(|left| left.f_to_kind(wide));
                    let scaled = left.and_then(|left| left.f_mul_scalar(*scale));
                    let sum = scaled.and_then(|left| rows.f_addmm_(&left, &right.f_to_kind(wide)?));
                    sum.map_err(|e| Error::merge(name, e))?
                }
                Step::Vector { vector, scale } => vector
                    .f_narrow(0, first, count)
                    .and_then(|v| rows.f_add(&v.f_mul_scalar(*scale)?.f_to_kind(rows.kind())?))
                    .map_err(|e| Error::merge(name, e))?,
                Step::Magnitude(magnitude) => magnitude
                    .ratio(&rows, first)
                    .and_then(|ratio| rows.f_mul(&ratio))
                    .map_err(|e| Error::merge(name, e))?,
                Step::Rows(own) => own.put(&rows, first).map_err(|e| Error::merge(name, e))?,
                Step::Stacked(lora) => {
                    let term =
                        stacked_term(lora, (first, count), rows.kind(), false).map_err(|e| Error::merge(name, e))?;
                    rows.f_add(&term).map_err(|e| Error::merge(name, e))?
                }
            };
            rows = taken;
        }
        Ok(rows)
    }
}

/// Whether every value is finite. A sum is finite only if every value is; it is cheaper than counting, and may only err on the
/// side of counting.
pub(crate) fn all_finite(t: &Tensor) -> std::result::Result<bool, TchError> {
    let wide = if t.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    Ok(t.f_sum(wide)?.f_double_value(&[])?.is_finite())
}

/// How many values are not finite.
pub(crate) fn count_infinite(t: &Tensor) -> std::result::Result<i64, TchError> {
    t.f_isfinite()?.f_logical_not()?.f_sum(Kind::Int64)?.f_int64_value(&[])
}

/// The rows of a tensor in blocks: the first row and the number of rows of each. A scalar is one row.
pub(crate) fn blocks(shape: &[i64]) -> impl Iterator<Item = (i64, i64)> {
    let rows = shape.first().copied().unwrap_or(1);
    let columns: i64 = shape.iter().skip(1).product();
    let step = (BLOCK / columns.max(1)).max(1);
    (0..rows).step_by(step as usize).map(move |first| (first, step.min(rows - first)))
}
