//! A safetensors file: its tensors.

use crate::out;
use anyhow::Result;
use lora_format::TensorFile;
use lora_torch::kind_name;
use serde_json::json;
use std::path::Path;

/// Shows the tensors of a file.
///
/// # Errors
/// What is wrong with the file.
pub(super) fn show(path: &Path, as_json: bool) -> Result<()> {
    let file = TensorFile::open(path)?;
    let parameters: u64 = file.tensors().map(|(_, info)| info.shape.iter().product::<i64>().unsigned_abs()).sum();
    if as_json {
        let tensors: Vec<_> = file
            .tensors()
            .map(|(name, info)| json!({"name": name, "dtype": kind_name(info.kind), "shape": info.shape, "bytes": info.bytes.len()}))
            .collect();
        let (bytes, metadata) = (file.data_bytes(), file.metadata());
        return out::json(&json!({
            "kind": "safetensors", "path": path, "parameters": parameters, "bytes": bytes, "metadata": metadata, "tensors": tensors
        }));
    }
    let width = file.names().map(str::len).max().unwrap_or(0);
    for (name, info) in file.tensors() {
        out::line(format!("{name:<width$}  {:<9} {:?}", kind_name(info.kind), info.shape))?;
    }
    for (key, value) in file.metadata() {
        out::line(format!("metadata: {key} = {value}"))?;
    }
    out::line(format!(
        "{} tensors, {} elements, {}",
        file.names().count(),
        out::count(parameters),
        out::bytes(file.data_bytes())
    ))
}
