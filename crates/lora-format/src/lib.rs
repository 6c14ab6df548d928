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
mod checkpoint;
mod dtype;
mod error;
mod fields;
mod gguf;
mod hash;
mod header;
mod hf_config;
mod json;
mod pattern;
mod pickle;
mod rope;
mod stacked;
mod target;
mod tensor_file;
mod writer;

pub use adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder, AdapterModule, LoraTensors, read_adapter};
pub use adapter_config::{AdapterConfig, InitLoraWeights, TokenIndices};
pub use adapter_write::write_adapter;
pub use atomic::{create_staging_dir, sync_dir, write_atomic};
pub use checkpoint::Checkpoint;
pub use error::{Error, HeaderFault, Result, ShardFault, TensorFault};
pub use gguf::{GGUF_BLOCK, GgufTensor, GgufType, GgufValue, GgufWriter};
pub use hash::sha256_file;
pub use header::TensorInfo;
pub use hf_config::{HfConfig, read_hf_config};
pub use json::read_json_object;
pub use rope::RopeParameters;
pub use stacked::{STACKED, stacked_key, turn_stacked};
pub use target::TargetModules;
pub use tensor_file::TensorFile;
pub use writer::{TensorWriter, write_tensors};
