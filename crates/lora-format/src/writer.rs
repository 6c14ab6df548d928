//! Safetensors files written tensor by tensor, seen by others only when complete.

use crate::atomic::{create_temp, persist};
use crate::dtype::{SUPPORTED, name_of};
use crate::error::{Error, Result, TensorFault};
use crate::tensor_file::TensorFile;
use crate::write_behind::WriteBehind;
use lora_torch::{kind_bytes, kind_name, with_bytes};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};
use tempfile::NamedTempFile;

/// Writes tensors to a safetensors file in one go, widest dtype first so that all are aligned, then by name.
///
/// # Errors
/// [`Error::Io`] naming the path (a full disk, a missing folder); [`Error::Tensor`] for a dtype that the format lacks
/// or a name given twice. The file at `path` then is as it was before.
pub fn write_tensors(path: &Path, tensors: &[(String, Tensor)], metadata: &BTreeMap<String, String>) -> Result<()> {
    let mut order: Vec<&(String, Tensor)> = tensors.iter().collect();
    order.sort_by(|(a, x), (b, y)| kind_bytes(y.kind()).cmp(&kind_bytes(x.kind())).then_with(|| a.cmp(b)));
    let plan: Vec<_> = order.iter().map(|(name, t)| (name.clone(), t.kind(), t.size())).collect();
    let mut writer = TensorWriter::create(path, &plan, metadata)?;
    for (name, tensor) in order {
        writer.put(name, tensor)?;
    }
    writer.finish()
}

/// A safetensors file in the making: the header first, then each tensor in the announced order.
///
/// Dropped before [`finish`](Self::finish), it leaves nothing behind.
#[derive(Debug)]
pub struct TensorWriter {
    path: PathBuf,
    temp: NamedTempFile,
    plan: Vec<(String, Kind, Vec<i64>)>,
    next: usize,
    /// Bytes of the next tensor that were written already.
    begun: usize,
    behind: WriteBehind,
}

impl TensorWriter {
    /// Begins a file that will hold the tensors of `plan` (name, dtype, shape) in that order.
    ///
    /// # Errors
    /// As [`write_tensors`].
    pub fn create(path: &Path, plan: &[(String, Kind, Vec<i64>)], metadata: &BTreeMap<String, String>) -> Result<Self> {
        let header = encode_header(path, plan, metadata)?;
        let mut temp = create_temp(path)?;
        let length = (header.len() as u64).to_le_bytes();
        temp.write_all(&length).and_then(|()| temp.write_all(&header)).map_err(|e| Error::io("write", path, e))?;
        Ok(TensorWriter { path: path.into(), temp, plan: plan.to_vec(), next: 0, begun: 0, behind: WriteBehind::new() })
    }

    /// Writes the next tensor, from whatever device it is on.
    ///
    /// # Errors
    /// [`TensorFault::Order`], [`TensorFault::Shape`] or [`TensorFault::Dtype`] when it is not the announced one;
    /// [`Error::Io`]; [`Error::Torch`].
    pub fn put(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let (kind, shape) = self.due(name)?;
        let fail = |fault| Err(Error::tensor(&self.path, name, fault));
        if tensor.size() != shape {
            return fail(TensorFault::Shape { got: tensor.size(), wanted: format!("the announced {shape:?}") });
        }
        if tensor.kind() != kind {
            return fail(TensorFault::Dtype { got: kind_name(tensor.kind()).into(), wanted: "the announced one" });
        }
        self.put_rows(name, tensor)
    }

    /// Writes the next rows of the next tensor; the tensor is complete with its last row. Rows are written as they come, so
    /// that no more of a tensor than they need be in memory.
    ///
    /// # Errors
    /// As [`put`](Self::put); [`TensorFault::Size`] for more rows than are left.
    pub fn put_rows(&mut self, name: &str, rows: &Tensor) -> Result<()> {
        let (kind, _) = self.due(name)?;
        if rows.kind() != kind {
            let fault = TensorFault::Dtype { got: kind_name(rows.kind()).into(), wanted: "the announced one" };
            return Err(Error::tensor(&self.path, name, fault));
        }
        with_bytes(rows, |bytes| self.put_part(name, bytes))
            .map_err(|source| Error::Torch { path: self.path.clone(), source })?
    }

    /// Writes the next tensor as it lies in another file, without bringing its elements into this program where the system
    /// can copy between files.
    ///
    /// # Errors
    /// As [`put_bytes`](Self::put_bytes); [`TensorFault::Missing`] when the other file lacks it.
    pub fn copy_from(&mut self, name: &str, file: &TensorFile, stored: &str) -> Result<()> {
        let (got, left) = (file.bytes(stored)?.len(), self.left(name)?);
        if got != left {
            return Err(Error::tensor(&self.path, name, TensorFault::Size { got, wanted: left }));
        }
        let copied = file.copy_to(stored, self.temp.as_file_mut())?;
        let behind = self.behind.wrote(self.temp.as_file(), copied);
        behind.map_err(|e| Error::io("write", &self.path, e))?;
        self.advance(got, left);
        Ok(())
    }

    /// Writes the next tensor from its elements, row-major and little-endian.
    ///
    /// # Errors
    /// [`TensorFault::Order`], [`TensorFault::Size`], [`Error::Io`].
    pub fn put_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let left = self.left(name)?;
        if bytes.len() != left {
            return Err(Error::tensor(&self.path, name, TensorFault::Size { got: bytes.len(), wanted: left }));
        }
        self.put_part(name, bytes)
    }

    fn put_part(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let left = self.left(name)?;
        if bytes.len() > left {
            return Err(Error::tensor(&self.path, name, TensorFault::Size { got: bytes.len(), wanted: left }));
        }
        let written = self.temp.write_all(bytes);
        let written = written.and_then(|()| self.behind.wrote(self.temp.as_file(), bytes.len() as u64));
        written.map_err(|e| Error::io("write", &self.path, e))?;
        self.advance(bytes.len(), left);
        Ok(())
    }

    /// The bytes of the next tensor that are not written yet.
    fn left(&self, name: &str) -> Result<usize> {
        let (kind, shape) = self.due(name)?;
        Ok(shape.iter().fold(kind_bytes(kind), |n, &d| n * d as usize) - self.begun)
    }

    fn advance(&mut self, written: usize, left: usize) {
        self.begun += written;
        if written == left {
            (self.next, self.begun) = (self.next + 1, 0);
        }
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// [`TensorFault::Missing`] when announced tensors were not written; [`Error::Io`].
    pub fn finish(mut self) -> Result<()> {
        if let Some((name, ..)) = self.plan.get(self.next) {
            return Err(Error::tensor(&self.path, name, TensorFault::Missing));
        }
        self.behind.finish().map_err(|e| Error::io("write", &self.path, e))?;
        persist(self.temp, &self.path)
    }

    fn due(&self, name: &str) -> Result<(Kind, Vec<i64>)> {
        match self.plan.get(self.next) {
            Some((due, kind, shape)) if due == name => Ok((*kind, shape.clone())),
            due => {
                let wanted = due.map_or("the end", |(due, ..)| due).to_string();
                Err(Error::tensor(&self.path, name, TensorFault::Order { wanted }))
            }
        }
    }
}

fn encode_header(
    path: &Path,
    plan: &[(String, Kind, Vec<i64>)],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut seen = HashSet::new();
    let mut offset = 0u64;
    for (name, kind, shape) in plan {
        let fail = |fault| Err(Error::tensor(path, name, fault));
        if name == "__metadata__" || !seen.insert(name) {
            return fail(TensorFault::Unexpected { why: "the name is taken" });
        }
        let Some(dtype) = name_of(*kind) else {
            return fail(TensorFault::Dtype { got: kind_name(*kind).into(), wanted: SUPPORTED });
        };
        let bytes = shape
            .iter()
            .try_fold(kind_bytes(*kind) as u64, |n, &d| u64::try_from(d).ok().and_then(|d| n.checked_mul(d)))
            .and_then(|n| offset.checked_add(n));
        let Some(end) = bytes else {
            return fail(TensorFault::Overflow { shape: shape.iter().map(|&d| d.max(0) as u64).collect() });
        };
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    // The data begins at a multiple of 8, as the format's own writer leaves it.
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok(text)
}
