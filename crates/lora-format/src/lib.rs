//! Files: safetensors, sharded checkpoints, PEFT adapter folders, Hugging Face configs.
//!
//! Nothing that is read is trusted: headers and configs are checked before anything is allocated for them, pickle is
//! refused, and an error names the file, the field or tensor, the value, and what to do. Nothing that is written is ever
//! seen half: files appear at their final name complete and on disk, or not at all.
//!
//! ```
//! use lora_format::{TensorFile, write_tensors};
//! use std::collections::BTreeMap;
//! use tch::{Device, Kind, Tensor};
//!
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("w.safetensors");
//! let w = Tensor::f_ones([2, 3], (Kind::BFloat16, Device::Cpu))?;
//! write_tensors(&path, &[("w".to_string(), w.shallow_clone())], &BTreeMap::new())?;
//! let file = TensorFile::open(&path)?;
//! assert_eq!(file.info("w")?.shape, [2, 3]);
//! assert!(file.read("w")?.equal(&w));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod adapter;
mod adapter_config;
mod adapter_write;
mod atomic;
mod bnb;
mod checkpoint;
mod dtype;
mod error;
mod fields;
mod gguf;
mod hash;
mod header;
mod hf_config;
mod json;
mod labels;
mod pattern;
mod pickle;
mod repair;
mod rope;
mod stacked;
mod target;
mod tensor_file;
mod write_behind;
mod writer;

pub use adapter::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdaLoraTensors, AdapterFolder, AdapterModule, LoraTensors, VeraPair, VeraTensors,
    read_adapter,
};
pub use adapter_config::{AdaLoraConfig, AdapterConfig, InitLoraWeights, Method, TokenIndices, VeraConfig};
pub use adapter_write::{adapter_tensors, write_adapter, write_adapter_tensors};
pub use atomic::{copy_atomic, create_staging_dir, sync_dir, write_atomic};
pub use bnb::{PackedWeight, is_packed, is_part, nf4_tensors, packed_weight, quantization_config, read_packed};
pub use checkpoint::Checkpoint;
pub use error::{Error, HeaderFault, Result, ShardFault, TensorFault};
pub use gguf::{GGUF_BLOCK, GGUF_SUPER_BLOCK, GgufTensor, GgufType, GgufValue, GgufWriter};
pub use hash::sha256_file;
pub use header::TensorInfo;
pub use hf_config::{HfConfig, read_hf_config};
pub use json::read_json_object;
pub use labels::{CLASSIFIER_TASK, LABELS_FILE, LabelSettings, Labels, ProblemType, names_classifier, numbered_labels};
pub use repair::{KeyRule, RepairedKey, adapter_key, rehome, repair_key};
pub use rope::RopeParameters;
pub use stacked::{STACKED, stacked_key, turn_stacked};
pub use target::TargetModules;
pub use tensor_file::TensorFile;
pub use writer::{TensorWriter, write_tensors};
