//! A merged model checked against base and adapters, weight by weight, in float64.

use crate::change::{Change, Step, blocks, stacked_term};
use crate::error::{Disagreement, Error, Result};
use crate::plan::Plan;
use crate::tied::{TIE_KEY, tied_pair};
use lora_format::{Checkpoint, read_json_object};
use std::path::{Path, PathBuf};
use tch::{Kind, TchError, Tensor};

/// How well a merged model agrees with base and adapters; it lies within what rounding explains.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Agreement {
    /// The tensors compared.
    pub tensors: usize,
    /// Those that the adapters change.
    pub changed: usize,
    /// The largest absolute error of a changed one.
    pub max_error: f64,
    /// The largest error over its rounding bound, at most 1.
    pub max_ratio: f64,
    /// Where that is; empty when nothing is changed.
    pub worst: String,
}

/// Checks that a merged model is the base plus the adapters' updates within one rounding to its dtype and the rounding
/// of float32 sums, and that all else is the base's bit for bit.
///
/// An element `m` of a changed tensor is compared with the exact `w + sum(s l r)` in float64. The bound is
/// `u |exact| + (k + 2) v (|w| + sum(|s| |l| |r|))`, where `u` and `v` are the unit roundoffs of the stored and of the
/// summing dtype and `k` counts the products and sums of the row (Higham, Accuracy and Stability of Numerical
/// Algorithms, section 3.1).
///
/// # Errors
/// [`Error::Disagrees`] naming the first tensor that is wrong; as [`merge`](crate::merge()) for the inputs.
pub fn verify(base: &Path, adapters: &[PathBuf], merged: &Path) -> Result<Agreement> {
    let config = read_json_object(&base.join("config.json"))?;
    let base = Checkpoint::open_unpacked(base)?;
    let plan = Plan::make(&base, &config, adapters)?;
    let merged_config = read_json_object(&merged.join("config.json"))?;
    let merged = Checkpoint::open_unpacked(merged)?;
    let disagree = |tensor: &str, fault| Error::Disagrees { merged: merged.dir().into(), tensor: tensor.into(), fault };

    if let Some(pair) = plan.untied
        && merged_config.get(TIE_KEY).and_then(serde_json::Value::as_bool) != Some(false)
        && tied_pair(&merged, &merged_config).is_some()
    {
        return Err(disagree(pair.head, Disagreement::StillTied));
    }
    let kept = || base.names().filter(|name| !plan.drops(name));
    let wanted = || kept().chain(plan.changes.keys().map(String::as_str));
    if let Some(name) = wanted().find(|name| !merged.contains(name)) {
        return Err(disagree(name, Disagreement::Missing));
    }
    let mut agreement =
        Agreement { tensors: 0, changed: plan.changes.len(), max_error: 0.0, max_ratio: 0.0, worst: String::new() };
    for name in merged.names() {
        let change = plan.changes.get(name);
        if change.is_none() && !base.contains(name) {
            return Err(disagree(name, Disagreement::Unexpected));
        }
        agreement.tensors += 1;
        match change {
            None => check_untouched(name, &base, &merged)?,
            Some(change) => {
                let (error, ratio) = compare(name, change, &base, &merged)?;
                if ratio > 1.0 {
                    return Err(disagree(name, Disagreement::Value { error, ratio }));
                }
                agreement.max_error = agreement.max_error.max(error);
                if ratio >= agreement.max_ratio {
                    (agreement.max_ratio, agreement.worst) = (ratio, name.into());
                }
            }
        }
    }
    Ok(agreement)
}

fn check_shape(name: &str, wanted: &[i64], merged: &Checkpoint) -> Result<()> {
    let got = &merged.info(name)?.shape;
    if got == wanted {
        return Ok(());
    }
    let fault = Disagreement::Shape { got: got.clone(), wanted: wanted.to_vec() };
    Err(Error::Disagrees { merged: merged.dir().into(), tensor: name.into(), fault })
}

/// The base's bytes, or its values rounded to the merged dtype.
fn check_untouched(name: &str, base: &Checkpoint, merged: &Checkpoint) -> Result<()> {
    let (from, to) = (base.info(name)?, merged.info(name)?);
    check_shape(name, &from.shape, merged)?;
    let same = if from.kind == to.kind && !base.unpacks(name) {
        base.bytes(name)? == merged.bytes(name)?
    } else {
        let rounded = base.read(name)?.f_to_kind(to.kind).map_err(|e| Error::merge(name, e))?;
        rounded.f_equal(&merged.read(name)?).map_err(|e| Error::merge(name, e))?
    };
    if same {
        return Ok(());
    }
    Err(Error::Disagrees { merged: merged.dir().into(), tensor: name.into(), fault: Disagreement::Touched })
}

/// The largest error and the largest ratio of error to bound.
fn compare(name: &str, change: &Change, base: &Checkpoint, merged: &Checkpoint) -> Result<(f64, f64)> {
    let shape = change.shape(base)?;
    check_shape(name, &shape, merged)?;
    let summed = change.wide(base)?;
    let mut worst = (0.0f64, 0.0f64);
    for (first, count) in blocks(&shape) {
        let start = change.start(name, base, first, count)?;
        let stored = merged.read_rows(name, first, count)?;
        let (error, ratio) = compare_rows(change, &start, &stored, first, summed).map_err(|e| Error::merge(name, e))?;
        worst = (worst.0.max(error), worst.1.max(ratio));
    }
    Ok(worst)
}

fn compare_rows(
    change: &Change,
    start: &Tensor,
    stored: &Tensor,
    first: i64,
    summed: Kind,
) -> std::result::Result<(f64, f64), TchError> {
    let wide = |t: &Tensor| t.f_to_kind(Kind::Double);
    let mut exact = wide(start)?;
    let mut size = exact.f_abs()?;
    let mut terms = 2.0;
    for step in &change.steps {
        match step {
            Step::Delta(delta) => {
                let (left, right) = (wide(&delta.left.f_narrow(0, first, start.size()[0])?)?, wide(&delta.right)?);
                exact = exact.f_add(&left.f_matmul(&right)?.f_mul_scalar(delta.scale)?)?;
                size = size.f_add(&left.f_abs()?.f_matmul(&right.f_abs()?)?.f_mul_scalar(delta.scale.abs())?)?;
                terms += delta.right.size()[0] as f64 + 2.0;
            }
            Step::Vector { vector, scale } => {
                let part = wide(&vector.f_narrow(0, first, start.size()[0])?)?.f_mul_scalar(*scale)?;
                (exact, size) = (exact.f_add(&part)?, size.f_add(&part.f_abs()?)?);
                terms += 1.0;
            }
            Step::Magnitude(magnitude) => {
                // The norm sums as many squares as the row has entries.
                let ratio = magnitude.ratio(&exact, first)?;
                (exact, size) = (exact.f_mul(&ratio)?, size.f_mul(&ratio.f_abs()?)?);
                terms += magnitude.terms(&exact) as f64 + 2.0;
            }
            Step::Rows(own) => (exact, size) = (own.put(&exact, first)?, own.put(&size, first)?.f_abs()?),
            Step::Stacked(lora) => {
                let term = |absolute| {
                    let term = stacked_term(lora, (first, start.size()[0]), Kind::Double, absolute);
                    term.map_err(|e| TchError::Torch(e.to_string()))
                };
                (exact, size) = (exact.f_add(&term(false)?)?, size.f_add(&term(true)?)?);
                terms += lora.r() as f64 + 2.0;
            }
        }
    }
    let (unit, least) = rounding(stored.kind());
    let bound = exact.f_abs()?.f_mul_scalar(unit)?.f_add(&size.f_mul_scalar(terms * rounding(summed).0)?)?;
    let bound = bound.f_add_scalar(least)?;
    let error = wide(stored)?.f_sub(&exact)?.f_abs()?;
    // Not a number is as wrong as can be, and must not be lost in comparisons.
    let largest = |t: &Tensor| -> std::result::Result<f64, TchError> {
        let max = if t.numel() == 0 { 0.0 } else { t.f_max()?.f_double_value(&[])? };
        Ok(if max.is_nan() { f64::INFINITY } else { max })
    };
    Ok((largest(&error)?, largest(&error.f_div(&bound)?)?))
}

/// The unit roundoff of a dtype, and half its least positive number.
fn rounding(kind: Kind) -> (f64, f64) {
    let (digits, least) = match kind {
        Kind::BFloat16 => (8, -133),
        Kind::Half => (11, -24),
        Kind::Float => (24, -149),
        _ => (53, -1022),
    };
    (2f64.powi(-digits), 2f64.powi(least - 1))
}
