//! Writing a PEFT adapter folder.

use crate::adapter::methods::pair_to_write;
use crate::adapter::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterModule, BASE_BIAS, BASE_WEIGHT, LORA_A, LORA_B, LORA_B_BIAS,
    LORA_EMBEDDING_A, LORA_EMBEDDING_B, MAGNITUDE, PREFIX, TOKEN_ROWS, TOKEN_ROWS_ALONE, check_module,
};
use crate::adapter_config::AdapterConfig;
use crate::atomic::{create_staging_dir, parent, sync_dir, write_atomic};
use crate::error::{Error, Result};
use crate::stacked::stacked_key;
use crate::writer::write_tensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Kind, Tensor};

/// Writes `adapter_model.safetensors` and then `adapter_config.json`, as PEFT's `save_pretrained` lays them out; the
/// folder, if it is not there, appears with both of them or not at all. Tensors are saved as float32.
///
/// PEFT saves the frozen weight of an embedding or head that is a target; it is written when the module carries it.
///
/// # Errors
/// [`Error::Field`] for an impossible configuration; [`Error::Tensor`] for a shape that disagrees with it or a value
/// that is not finite: such an adapter is never saved. [`Error::Io`].
pub fn write_adapter(dir: &Path, config: &AdapterConfig, modules: &BTreeMap<String, AdapterModule>) -> Result<()> {
    write_adapter_tensors(dir, config, &adapter_tensors(dir, config, modules)?)
}

/// The tensors that [`write_adapter`] would write into `dir`, under their names there.
///
/// # Errors
/// [`Error::Field`] for an impossible configuration, [`Error::Tensor`] for a shape that disagrees with it.
pub fn adapter_tensors(
    dir: &Path,
    config: &AdapterConfig,
    modules: &BTreeMap<String, AdapterModule>,
) -> Result<Vec<(String, Tensor)>> {
    let path = dir.join(ADAPTER_WEIGHTS);
    config.check(&dir.join(ADAPTER_CONFIG))?;
    let mut tensors = Vec::new();
    for (module, content) in modules {
        check_module(&path, config, module, content)?;
        let wrapper = match content {
            AdapterModule::Stacked(_) => stacked_key(module, |other| modules.contains_key(other)),
            _ => module.clone(),
        };
        let mut add = |suffix: &str, tensor: &Tensor| -> Result<()> {
            let tensor = tensor.f_detach().and_then(|t| t.f_to_kind(Kind::Float)).map_err(|e| Error::tch(&path, e))?;
            tensors.push((format!("{PREFIX}{wrapper}{suffix}"), tensor));
            Ok(())
        };
        let (lora, suffix_a, suffix_b) = match content {
            AdapterModule::Linear(lora) | AdapterModule::Stacked(lora) => (lora, LORA_A, LORA_B),
            AdapterModule::Embedding(lora) => (lora, LORA_EMBEDDING_A, LORA_EMBEDDING_B),
            AdapterModule::Vera(vera) => {
                vera.named().into_iter().try_for_each(|(suffix, tensor)| add(suffix, tensor))?;
                continue;
            }
            AdapterModule::AdaLora(adalora) => {
                adalora.named().into_iter().try_for_each(|(suffix, tensor)| add(suffix, tensor))?;
                continue;
            }
            AdapterModule::Saved { tensors } => {
                tensors.iter().try_for_each(|(name, tensor)| add(&format!(".{name}"), tensor))?;
                continue;
            }
            AdapterModule::Tokens(rows) => {
                add(if config.is_tokens_alone() { TOKEN_ROWS_ALONE } else { TOKEN_ROWS }, rows)?;
                continue;
            }
        };
        add(suffix_a, &lora.a)?;
        add(suffix_b, &lora.b)?;
        let optional = [
            (LORA_B_BIAS, &lora.bias),
            (MAGNITUDE, &lora.magnitude),
            (BASE_WEIGHT, &lora.base_weight),
            (BASE_BIAS, &lora.base_bias),
        ];
        for (suffix, tensor) in optional {
            tensor.iter().try_for_each(|t| add(suffix, t))?;
        }
    }
    for (name, tensor) in pair_to_write(&path, config, modules)? {
        let tensor = tensor.f_detach().and_then(|t| t.f_to_kind(Kind::Float)).map_err(|e| Error::tch(&path, e))?;
        tensors.push((name.to_string(), tensor));
    }
    Ok(tensors)
}

/// Writes an adapter's folder from tensors that [`adapter_tensors`] gave, all of an adapter's or those of its parts together.
///
/// # Errors
/// As [`write_adapter`].
pub fn write_adapter_tensors(dir: &Path, config: &AdapterConfig, tensors: &[(String, Tensor)]) -> Result<()> {
    let config_path = dir.join(ADAPTER_CONFIG);
    if tensors.is_empty() {
        return Err(Error::EmptyAdapter { path: dir.join(ADAPTER_WEIGHTS) });
    }
    let text = serde_json::to_string_pretty(&Value::Object(config.to_json())).map_err(|source| Error::Json {
        path: config_path.clone(),
        excerpt: String::new(),
        source,
    })?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let write = |dir: &Path| {
        write_tensors(&dir.join(ADAPTER_WEIGHTS), tensors, &metadata)?;
        write_atomic(&dir.join(ADAPTER_CONFIG), text.as_bytes())
    };
    if dir.exists() {
        return write(dir);
    }
    // A new folder appears with all that belongs into it, or not at all.
    let above = parent(dir);
    std::fs::create_dir_all(above).map_err(|e| Error::io("create", above, e))?;
    let staging = create_staging_dir(dir)?;
    write(staging.path())?;
    sync_dir(staging.path())?;
    std::fs::rename(staging.path(), dir).map_err(|e| Error::io("rename to", dir, e))?;
    // The staged folder has its final name now; there is nothing left to remove.
    let _ = staging.keep();
    sync_dir(above)
}
