//! A run's folder: where it stands, and whether its checkpoints are whole.

use super::adapter;
use crate::out;
use anyhow::{Context, Result};
use lora_format::ADAPTER_CONFIG;
use lora_train::METRICS_FILE;
use lora_train::checkpoint::{CHECKPOINTS_DIR, verify_checkpoint};
use lora_train::config::Optim;
use serde::Serialize;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// What is known of a run.
#[derive(Serialize)]
struct Found {
    kind: &'static str,
    path: PathBuf,
    last_step: Option<Value>,
    last_evaluation: Option<Value>,
    /// Why it ended; absent while it runs, and where it was killed.
    ended_by: Option<Value>,
    checkpoints: Vec<Saved>,
    adapter: Option<adapter::Found>,
}

/// A checkpoint, and what is wrong with it.
#[derive(Serialize)]
struct Saved {
    name: String,
    whole: bool,
    /// Whose moments it holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    optim: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fault: Option<String>,
}

/// Shows a run. Every byte of its checkpoints is checked, and nothing is changed.
///
/// # Errors
/// A folder or a metrics file that cannot be read.
pub(super) fn show(path: &Path, as_json: bool) -> Result<()> {
    let metrics = path.join(METRICS_FILE);
    let text = if metrics.is_file() {
        std::fs::read_to_string(&metrics).with_context(|| format!("cannot read {}", metrics.display()))?
    } else {
        String::new()
    };
    // The last line of a run that was killed may be torn.
    let last = |key: &str| {
        text.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find(|v| v.get(key).is_some())
    };
    let adapter = path.join(ADAPTER_CONFIG).is_file().then(|| adapter::find(path)).transpose()?;
    let found = Found {
        kind: "run",
        path: path.to_path_buf(),
        last_step: last("loss"),
        last_evaluation: last("eval_loss"),
        ended_by: last("ended_by").map(|line| line["ended_by"].clone()),
        checkpoints: checkpoints(&path.join(CHECKPOINTS_DIR))?,
        adapter,
    };
    if as_json {
        return out::json(&found);
    }
    out::line(format!("run         {}", path.display()))?;
    let field = |v: &Value, key: &str| v.get(key).map_or_else(|| "-".to_string(), Value::to_string);
    if let Some(v) = &found.last_step {
        out::line(format!("last step   {}: loss {}, {} s", field(v, "step"), field(v, "loss"), field(v, "seconds")))?;
    }
    if let Some(v) = &found.last_evaluation {
        out::line(format!("evaluation  after step {}: loss {}", field(v, "step"), field(v, "eval_loss")))?;
    }
    if let Some(Value::String(why)) = &found.ended_by {
        out::line(format!("ended by    {why}"))?;
    }
    for c in &found.checkpoints {
        let optim = c.optim.as_ref().map(|optim| format!(", moments of {optim}")).unwrap_or_default();
        out::line(format!("checkpoint  {}: {}{optim}", c.name, c.fault.as_deref().unwrap_or("whole")))?;
    }
    found.adapter.map_or(Ok(()), |adapter| adapter.print())
}

fn checkpoints(dir: &Path) -> Result<Vec<Saved>> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut names: Vec<String> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    names.retain(|name| name.starts_with("step-") || (name.starts_with("quarantine-") && dir.join(name).is_dir()));
    names.sort_by_key(|name| (name.rsplit('-').next().and_then(|n| n.parse::<u64>().ok()), name.clone()));
    let check = |name: String| match verify_checkpoint(&dir.join(&name)) {
        Ok(manifest) => {
            // A configuration does not name the usual one.
            let own = manifest.run.config.get("train.optim");
            let optim = own.map_or(Optim::AdamW.name(), |text| text.trim_matches('"')).to_string();
            Saved { name, whole: true, optim: Some(optim), fault: None }
        }
        Err(e) => Saved { name, whole: false, optim: None, fault: Some(e.to_string()) },
    };
    Ok(names.into_iter().map(check).collect())
}
