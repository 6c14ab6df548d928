//! What `quantization_config` may say of weights that are packed already.

use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::json::shorten;
use serde_json::Value;

const KEY: &str = "quantization_config";
const REMEDY: &str = "the weights are quantised in a form that is not read; give the checkpoint in bfloat16, float16 or float32, \
                      or one that bitsandbytes packed as nf4 or int8";
const FP4: &str = "the 4-bit codes of FP4 are not read, which this type is where nothing is said; give the checkpoint in \
                   bfloat16, float16 or float32, or one that was packed with bnb_4bit_quant_type \"nf4\"";

/// Refuses every form of packed weights but those that are read (`crate::bnb`): bitsandbytes' nf4 and int8.
///
/// # Errors
/// [`Error::Unsupported`] naming the key that says otherwise; [`Error::Field`] for a value of another type.
pub(super) fn check(f: Fields<'_>) -> Result<()> {
    if f.is_null(KEY) || f.get(KEY).is_none_or(|v| v.as_bool() == Some(false)) {
        return Ok(());
    }
    let settings = f.object(KEY)?;
    let prefix = format!("{KEY}.");
    let f = Fields::new(f.path(), &prefix, settings);
    let refuse = |key: &str, reason: &'static str| {
        let value = shorten(&settings.get(key).unwrap_or(&Value::Null).to_string());
        Err(Error::Unsupported { path: f.path().into(), field: format!("{prefix}{key}"), value, reason })
    };
    let [four, eight] = ["load_in_4bit", "load_in_8bit"].map(|key| f.bool(key));
    let (four, eight) = (four?.unwrap_or(false), eight?.unwrap_or(false));
    // Configs of the first versions name no method.
    let method = f.string("quant_method")?;
    match method.as_deref() {
        Some("bitsandbytes") => {}
        None if four || eight => {}
        _ => return refuse("quant_method", REMEDY),
    }
    match (four, eight, f.string("bnb_4bit_quant_type")?.as_deref()) {
        (true, false, Some("nf4")) | (false, true, _) => Ok(()),
        (true, false, _) => refuse("bnb_4bit_quant_type", FP4),
        _ => refuse("load_in_4bit", REMEDY),
    }
}
