//! Weights as bitsandbytes saves them: 4-bit NormalFloat codes under the name of the weight, and what undoes them beside.

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, TensorFault};
use crate::fields::Fields;
use lora_torch::{Nf4, Scales};
use serde_json::{Map, Value, json};
use std::path::Path;
use tch::{Kind, Tensor};

/// What stands after the name of a weight for the settings of its codes.
const STATE: &str = ".quant_state.bitsandbytes__nf4";
/// The same of the older 4-bit type.
const STATE_FP4: &str = ".quant_state.bitsandbytes__fp4";

/// Whether the checkpoint has a weight in packed form.
pub fn is_packed(checkpoint: &Checkpoint, name: &str) -> bool {
    checkpoint.contains(&format!("{name}{STATE}")) || checkpoint.contains(&format!("{name}{STATE_FP4}"))
}

/// Whether a tensor belongs to the packed form of another one.
pub fn is_part(name: &str) -> bool {
    let ends = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE, STATE_FP4];
    ends.iter().any(|end| name.strip_suffix(end).is_some_and(|weight| weight.ends_with(".weight")))
}

/// The shape of a packed weight, from its settings alone.
///
/// # Errors
/// As [`read_nf4`].
pub fn packed_shape(checkpoint: &Checkpoint, name: &str) -> Result<Vec<i64>> {
    let path = checkpoint.shard_of(name)?.path().to_path_buf();
    let state = if checkpoint.contains(&format!("{name}{STATE_FP4}")) { STATE_FP4 } else { STATE };
    let state = settings(&path, name, &checkpoint.read(&format!("{name}{state}"))?)?;
    Ok(Fields::new(&path, "", &state).ints("shape", 1, i64::from(i32::MAX))?.unwrap_or_default())
}

/// Reads a packed weight.
///
/// # Errors
/// [`Error::Tensor`] for a part that is missing or does not fit, for another 4-bit type, for settings that cannot be read, or
/// for a code table that is not that of NormalFloat.
pub fn read_nf4(checkpoint: &Checkpoint, name: &str) -> Result<Nf4> {
    let path = checkpoint.shard_of(name)?.path().to_path_buf();
    let fault = |part: &str, why: String| Error::tensor(&path, format!("{name}{part}"), TensorFault::Packed { why });
    if checkpoint.contains(&format!("{name}{STATE_FP4}")) {
        let why = "FP4 codes are not read; pack the model with quant_type \"nf4\", or give the unpacked checkpoint";
        return Err(fault(STATE_FP4, why.into()));
    }
    let part = |suffix: &str| checkpoint.read(&format!("{name}{suffix}"));
    let state = settings(&path, name, &part(STATE)?)?;
    let fields = Fields::new(&path, "", &state);
    let kind = fields.string("quant_type")?;
    if kind.as_deref() != Some("nf4") {
        return Err(fault(STATE, format!("quant_type is {kind:?} and not \"nf4\"")));
    }
    let shape = fields.ints("shape", 1, i64::from(i32::MAX))?.unwrap_or_default();
    let &[rows, cols] = shape.as_slice() else {
        return Err(fault(STATE, format!("shape {shape:?} is not that of a matrix")));
    };
    check_table(&part(".quant_map")?).map_err(|why| fault(".quant_map", why))?;
    let whole = |key: &str| fields.int(key, 1, i64::from(i32::MAX));
    let block = whole("blocksize")?.unwrap_or(lora_torch::NF4_BLOCK);
    let absmax = part(".absmax")?;
    let scales = match whole("nested_blocksize")? {
        None => Scales::Plain(absmax),
        Some(block) => Scales::Nested {
            codes: absmax,
            absmax: part(".nested_absmax")?,
            table: part(".nested_quant_map")?,
            offset: fields.float("nested_offset")?.unwrap_or(0.0),
            block,
        },
    };
    Nf4::from_parts(checkpoint.read(name)?, scales, block, [rows, cols]).map_err(|e| fault("", e.to_string()))
}

/// The tensors under which a packed weight is saved, and what `quantization_config` of `config.json` says of such a model is
/// [`quantization_config`].
///
/// # Errors
/// What libtorch reports.
pub fn nf4_tensors(name: &str, weight: &Nf4) -> Result<Vec<(String, Tensor)>> {
    let torch = |source| Error::Torch { path: name.into(), source };
    let tch = |e| torch(lora_torch::Error::from(e));
    let mut state = Map::new();
    state.insert("quant_type".into(), json!("nf4"));
    state.insert("blocksize".into(), json!(weight.block));
    state.insert("dtype".into(), json!("float32"));
    state.insert("shape".into(), json!(weight.shape()));
    let mut list = vec![
        (name.to_string(), weight.codes.f_unsqueeze(1).map_err(tch)?),
        (format!("{name}.quant_map"), Nf4::table().map_err(torch)?),
    ];
    match &weight.scales {
        Scales::Plain(absmax) => list.push((format!("{name}.absmax"), absmax.shallow_clone())),
        Scales::Nested { codes, absmax, table, offset, block } => {
            list.push((format!("{name}.absmax"), codes.shallow_clone()));
            list.push((format!("{name}.nested_absmax"), absmax.shallow_clone()));
            list.push((format!("{name}.nested_quant_map"), table.shallow_clone()));
            state.insert("nested_blocksize".into(), json!(block));
            state.insert("nested_dtype".into(), json!("float32"));
            state.insert("nested_offset".into(), json!(offset));
        }
    }
    let text = Value::Object(state).to_string();
    list.push((format!("{name}{STATE}"), Tensor::f_from_slice(text.as_bytes()).map_err(tch)?));
    Ok(list)
}

/// What `config.json` says of a model packed so, for transformers.
pub fn quantization_config(double: bool, skipped: &[&str]) -> Value {
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    })
}

/// The settings, JSON in a tensor of bytes.
fn settings(path: &Path, name: &str, bytes: &Tensor) -> Result<Map<String, Value>> {
    let fault = |why: String| Error::tensor(path, format!("{name}{STATE}"), TensorFault::Packed { why });
    if bytes.kind() != Kind::Uint8 {
        return Err(fault("it is not a text in bytes".into()));
    }
    let bytes = lora_torch::tensor_bytes(bytes).map_err(|source| Error::Torch { path: path.into(), source })?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(fault("it is not a JSON object".into())),
        Err(e) => Err(fault(format!("it is not JSON: {e}"))),
    }
}

/// Codes mean nothing under another table.
fn check_table(table: &Tensor) -> std::result::Result<(), String> {
    let ours = Nf4::table().map_err(|e| e.to_string())?;
    let same = table.kind() == Kind::Float && table.size() == ours.size() && table.equal(&ours);
    if same { Ok(()) } else { Err("it is not the table of 4-bit NormalFloat".into()) }
}
