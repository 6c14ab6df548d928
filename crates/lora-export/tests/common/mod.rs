//! Small bases and adapters on disk.
// Each test crate uses some of these.
#![allow(dead_code, unreachable_pub)]

use lora_export::{MergeOptions, MergeReport, merge};
use lora_format::{AdapterConfig, AdapterModule, Checkpoint, LoraTensors, write_adapter, write_tensors};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

/// A temporary folder in memory where there is one: these tests are about numbers, and fsync takes most of their time.
pub fn temp() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// A base with these tensors and this config.
pub fn write_base(config: &Value, tensors: &[(&str, &Tensor)]) -> (TempDir, PathBuf) {
    let dir = temp();
    let tensors: Vec<_> = tensors.iter().map(|(name, t)| (name.to_string(), t.shallow_clone())).collect();
    write_tensors(&dir.path().join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let path = dir.path().to_path_buf();
    (dir, path)
}

/// A copy of the weights and config of a family's fixture, its tensors changed by `change`.
pub fn base_copy(family: &str, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> (TempDir, PathBuf) {
    let from = fixtures().join(family);
    let checkpoint = Checkpoint::open(&from).unwrap();
    let mut tensors = checkpoint.names().map(|n| (n.to_string(), checkpoint.read(n).unwrap())).collect();
    change(&mut tensors);
    let config = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    let list: Vec<_> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
    write_base(&config, &list)
}

/// A random update of rank 2 of a linear layer.
pub fn linear(seed: i64, outputs: i64, inputs: i64) -> AdapterModule {
    tch::manual_seed(seed);
    let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
    AdapterModule::Linear(LoraTensors::new(random([2, inputs]), random([outputs, 2])))
}

/// A module saved in full.
pub fn saved(weight: &Tensor) -> AdapterModule {
    AdapterModule::Saved { tensors: BTreeMap::from([("weight".to_string(), weight.shallow_clone())]) }
}

/// An adapter folder of rank 2 and alpha 4 (scale 2).
pub fn adapter<const N: usize>(modules: [(&str, AdapterModule); N]) -> (TempDir, PathBuf) {
    let dir = temp();
    let path = dir.path().join("adapter");
    let saved = |m: &AdapterModule| matches!(m, AdapterModule::Saved { .. });
    let names: Vec<String> = modules.iter().filter(|(_, m)| saved(m)).map(|(name, _)| name.to_string()).collect();
    let config = AdapterConfig {
        r: 2,
        lora_alpha: 4.0,
        modules_to_save: Some(names).filter(|names| !names.is_empty()),
        ..AdapterConfig::default()
    };
    let modules = modules.into_iter().map(|(name, module)| (name.to_string(), module)).collect();
    write_adapter(&path, &config, &modules).unwrap();
    (dir, path)
}

/// Merges into a new folder.
pub fn merged(base: &Path, adapter: &Path) -> (TempDir, PathBuf, MergeReport) {
    let dir = temp();
    let out = dir.path().join("merged");
    let report = merge(base, &[adapter.to_path_buf()], &out, &MergeOptions::default(), &mut |_, _| {}).unwrap();
    (dir, out, report)
}

pub fn tensor_names(dir: &Path) -> Vec<String> {
    Checkpoint::open(dir).unwrap().names().map(str::to_string).collect()
}
