//! What the tests against TRL share: the fixtures of `tests/reference/make_preference.py`, and their model in float64.

use lora_model::{Decoder, Keeping, ModelConfig, Storage};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tch::{Device, Kind};

/// Losses are computed in float64 on both sides, rotary frequencies alone in float32 on both.
const LOSS_TOLERANCE: f64 = 1e-9;
/// Gradients of parameters are handed over in float32.
pub(crate) const GRADIENT_TOLERANCE: f64 = 1e-6;

pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama")
}

pub(crate) fn json(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(folder().join("preference").join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

pub(crate) fn model() -> Decoder {
    let keeping = Keeping { kind: Kind::Double, device: Device::Cpu, storage: Storage::Converted };
    let config = ModelConfig::read(&folder()).unwrap();
    Decoder::load_as(&folder(), config, 0, keeping, &mut |_, _| {}).unwrap()
}

pub(crate) fn near(got: f64, wanted: f64) -> bool {
    (got - wanted).abs() < LOSS_TOLERANCE * (1.0 + wanted.abs())
}
