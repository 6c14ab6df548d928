//! Decoders and encoders on libtorch: weights, target matching, adapter injection, generation.
//!
//! One decoder, described by [`ModelConfig`], runs every supported family. The way of a batch is [`Decoder::loss`] ->
//! `Decoder::block` -> [`Block::forward`] -> `lora_core::forward_many`.
//!
//! ```no_run
//! use lora_model::{Decoder, GenerateOptions, Sampling, all_linear, plan_injection};
//! use std::path::Path;
//! use tch::{Device, Kind};
//!
//! let mut model = Decoder::load(Path::new("checkpoint"), Kind::Float, Device::Cpu, &mut |_, _| {})?;
//! let plan = plan_injection(&model.config, &all_linear(8, 16.0))?;
//! println!("{} trained parameters", plan.trained());
//! model.inject(&plan, 42)?;
//! let options = GenerateOptions { max_new_tokens: 16, stop_ids: vec![2], sampling: Sampling::default() };
//! let ids = model.generate(&[1, 15, 27], &options, |_| true)?;
//! # Ok::<(), lora_model::Error>(())
//! ```

mod adapters;
mod backward;
mod batch;
mod block;
mod by_block;
mod cache;
mod classify;
mod config;
mod decoder;
mod error;
mod family;
mod fits;
mod generate;
mod hosted;
mod inject;
mod inputs;
mod keep;
mod layout;
mod methods;
mod mlp;
mod names;
mod noise;
mod norm;
mod rope;
mod sampler;
mod stacked;
mod stage;
mod target;
mod tokens;
mod weights;

pub use adapters::{AdapterMix, AdapterSet};
pub use backward::{Passage, Recompute, Slopes};
pub use batch::TokenBatch;
pub use block::{Block, Pass, Qkv};
pub use cache::{KvCache, LayerCache};
pub use classify::{ClassHead, ClassTargets, Head};
pub use config::{Activation, ExpertsConfig, ModelConfig};
pub use decoder::{Decoder, Mode, ModuleMut, ModuleRef, loss_chunk_rows};
pub use error::{Error, Result};
pub use family::families;
pub use fits::check_adapter;
pub use generate::GenerateOptions;
pub use inject::{Parameter, all_linear};
pub use keep::{Keeping, Packing, Storage, base_bytes, packed_already, packed_modules};
pub use layout::{ClassifierLayout, ExpertsLayout, Layout, MlpLayout, NormKind, QkNorm, QkvLayout};
pub use mlp::{Gated, Mlp};
pub use names::{ModuleKind, ModuleSpec, checkpoint_tensors, modules};
pub use norm::NormLayer;
pub use rope::{Frequencies, RotaryTable, RotaryTables, frequencies};
pub use sampler::Sampling;
pub use stacked::{PlannedStack, StackSpec, StackedAdapters, stacks};
pub use stage::Stage;
pub use target::{InjectionPlan, PlannedAdapter, plan_injection, saved_form};
pub use tokens::{TokenAdapters, TokenPlan};
pub use weights::{Progress, absent_head, check_weights};
