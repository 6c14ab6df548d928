//! Writing a PEFT adapter folder.

use crate::adapter::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterModule, BASE_BIAS, BASE_WEIGHT, LORA_A, LORA_B, LORA_B_BIAS,
    LORA_EMBEDDING_A, LORA_EMBEDDING_B, MAGNITUDE, PREFIX, TOKEN_ROWS, TOKEN_ROWS_ALONE, check_module,
};
use crate::adapter_config::AdapterConfig;
use crate::atomic::write_atomic;
use crate::error::{Error, Result};
use crate::stacked::stacked_key;
use crate::writer::write_tensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Kind, Tensor};

/// Writes `adapter_model.safetensors` and then `adapter_config.json`, as PEFT's `save_pretrained` lays them out; the
/// folder is made if it is not there. Tensors are saved as float32.
///
/// PEFT saves the frozen weight of an embedding or head that is a target; it is written when the module carries it.
///
/// # Errors
/// [`Error::Field`] for an impossible configuration; [`Error::Tensor`] for a shape that disagrees with it or a value
/// that is not finite: such an adapter is never saved. [`Error::Io`].
pub fn write_adapter(dir: &Path, config: &AdapterConfig, modules: &BTreeMap<String, AdapterModule>) -> Result<()> {
    let config_path = dir.join(ADAPTER_CONFIG);
    let path = dir.join(ADAPTER_WEIGHTS);
    config.check(&config_path)?;
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
    if tensors.is_empty() {
        return Err(Error::EmptyAdapter { path });
    }
    std::fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))?;
    write_tensors(&path, &tensors, &BTreeMap::from([("format".to_string(), "pt".to_string())]))?;
    let text = serde_json::to_string_pretty(&Value::Object(config.to_json())).map_err(|source| Error::Json {
        path: config_path.clone(),
        excerpt: String::new(),
        source,
    })?;
    write_atomic(&config_path, text.as_bytes())
}
