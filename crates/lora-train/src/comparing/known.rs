//! What the reference says of a run's answers, and the file in the run's folder that keeps it.

use super::to_host;
use crate::error::Result;
use lora_format::{TensorFile, write_tensors};
use std::collections::BTreeMap;
use std::path::Path;
use tch::Tensor;

/// The name of the file.
pub(super) const REFERENCE_FILE: &str = "reference.safetensors";
/// The key of its metadata that says what it belongs to.
const BELONGS_TO: &str = "belongs_to";

/// The log-probabilities of answers under the reference, summed over their tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Known {
    pub(super) of_rows: Vec<f64>,
    pub(super) of_unrelated: Vec<f64>,
}

impl Known {
    pub(super) fn get(list: &[f64], row: usize) -> f64 {
        list.get(row).copied().unwrap_or(0.0)
    }
}

pub(super) fn write_known(path: &Path, belongs_to: &str, known: &[Known; 2]) -> Result<()> {
    let mut tensors = Vec::new();
    for (name, Known { of_rows, of_unrelated }) in ["train", "eval"].iter().zip(known) {
        for (part, list) in [("logps", of_rows), ("unrelated", of_unrelated)] {
            tensors.push((format!("{name}.{part}"), Tensor::f_from_slice(list).map_err(lora_torch::Error::from)?));
        }
    }
    Ok(write_tensors(path, &tensors, &BTreeMap::from([(BELONGS_TO.into(), belongs_to.into())]))?)
}

/// What an earlier part of the same run was told; nothing where the file is missing, damaged or of another run.
pub(super) fn read_known(path: &Path, belongs_to: &str) -> Result<Option<[Known; 2]>> {
    let Ok(file) = TensorFile::open(path) else { return Ok(None) };
    if file.metadata().get(BELONGS_TO).map(String::as_str) != Some(belongs_to) {
        return Ok(None);
    }
    let read = |name: &str| -> Result<Vec<f64>> { Ok(to_host(&file.read(name)?)?) };
    let of = |name: &str| -> Result<Known> {
        Ok(Known { of_rows: read(&format!("{name}.logps"))?, of_unrelated: read(&format!("{name}.unrelated"))? })
    };
    Ok(Some([of("train")?, of("eval")?]))
}
