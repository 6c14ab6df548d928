//! Merge adapters into checkpoints on files, shard by shard, and verify the result; mix adapters into one; export to GGUF.
//!
//! No model is built: merging needs names and matrices only, so every family works whose adapter names its tensors, and
//! memory holds little more than one tensor.
//!
//! ```no_run
//! use lora_export::{MergeOptions, merge, verify};
//! use std::path::{Path, PathBuf};
//!
//! let (base, out) = (Path::new("models/base"), Path::new("models/merged"));
//! let adapters = [PathBuf::from("runs/adapter")];
//! let report = merge(base, &adapters, out, &MergeOptions::default(), &mut |_done, _of| {})?;
//! let agreement = verify(base, &adapters, out)?;
//! assert_eq!(report.changed.len(), agreement.changed);
//! # Ok::<(), lora_export::Error>(())
//! ```

mod change;
mod companions;
mod error;
mod experts;
mod extract;
mod gguf;
mod merge;
mod mix;
mod orient;
mod plain;
mod plan;
mod provenance;
mod repair;
mod tied;
mod verify;

pub use error::{Error, Result};
pub use extract::{ExtractReport, extract};
pub use gguf::{GgufFallback, GgufFileType, GgufReport, export_gguf, export_gguf_lora};
pub use lora_core::{Combination, MajoritySign, MixOptions};
pub use merge::{MergeOptions, MergeReport, merge};
pub use mix::{MixReport, Weighted, mix_adapters};
pub use repair::{Renamed, Repair, repair_adapter};
pub use verify::{Agreement, verify};
