//! Where a merged model comes from.

use crate::error::{Error, Result};
use lora_format::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, sha256_file};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The name of the record in the merged model's folder.
pub(crate) const FILE: &str = "provenance.json";

/// The record: every input file by name, size and SHA-256, the tool and its options.
pub(crate) fn record(
    base: &Checkpoint,
    adapters: &[PathBuf],
    named_bases: &[Option<String>],
    options: Value,
) -> Result<Value> {
    let base_files = base.shards().iter().map(|shard| describe(shard.path())).collect::<Result<Vec<_>>>()?;
    let mut adapter_entries = Vec::new();
    for (dir, named_base) in adapters.iter().zip(named_bases) {
        let files = [describe(&dir.join(ADAPTER_CONFIG))?, describe(&dir.join(ADAPTER_WEIGHTS))?];
        let path = dir.to_string_lossy();
        adapter_entries.push(json!({"path": path, "base_model_name_or_path": named_base, "files": files}));
    }
    Ok(json!({
        "operation": "merge",
        "tool": env!("CARGO_PKG_NAME"),
        "tool_version": env!("CARGO_PKG_VERSION"),
        "options": options,
        "base": {"path": base.dir().to_string_lossy(), "files": base_files},
        "adapters": adapter_entries,
    }))
}

fn describe(path: &Path) -> Result<Value> {
    let bytes = std::fs::metadata(path).map_err(|e| Error::io("read", path, e))?.len();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok(json!({"name": name, "bytes": bytes, "sha256": sha256_file(path)?}))
}
