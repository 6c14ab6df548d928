//! The only crate of the workspace with C++ and `unsafe`: fused operations on libtorch, devices, memory, seeds.
//!
//! Everything above this crate speaks to libtorch through `tch` and through the functions here. The fused operations
//! are `torch::autograd::Function`s with hand-written backward passes (`shim/`); each has a plain twin in its tests and
//! a gradient check in float64.
//!
//! ```
//! use lora_torch::{LoraPart, Projection, lora_linear};
//! use tch::{Device, Kind, Tensor};
//!
//! let x = Tensor::f_randn([3, 8], (Kind::Float, Device::Cpu))?;
//! let w = Tensor::f_randn([5, 8], (Kind::Float, Device::Cpu))?;
//! let a = Tensor::f_randn([2, 8], (Kind::Float, Device::Cpu))?.f_set_requires_grad(true)?;
//! let b = Tensor::f_zeros([5, 2], (Kind::Float, Device::Cpu))?.f_set_requires_grad(true)?;
//! let adapter = LoraPart { a: &a, b: &b, scale: 2.0 };
//! let y = lora_linear(&x, &[Projection { weight: &w.into(), bias: None, adapter: Some(adapter) }], 0.0)?;
//! assert_eq!(y[0].size(), [3, 5]);
//! y[0].f_sum(Kind::Float)?.f_backward()?;
//! assert_eq!(b.f_grad()?.size(), [5, 2]);
//! # Ok::<(), lora_torch::Error>(())
//! ```

mod attention;
mod blockwise;
mod bytes;
mod device;
mod device_kernels;
pub mod distributed;
mod dtype;
mod error;
#[allow(unsafe_code)]
mod ffi;
mod grad;
mod host;
mod linear;
mod loss;
mod memory;
mod optim;
mod packed;
mod panics;
mod pointwise;
mod products;
mod seed;
mod weight;

pub use attention::{AttentionRule, Segments, attention};
pub use blockwise::{Blockwise, MOMENT_BLOCK, adamw_8bit_step};
pub use bytes::{tensor_bytes, tensor_from_bytes, tensor_over, with_bytes};
pub use device::{
    CudaStatus, DeviceChoice, cuda_status, device_name, libtorch_version, num_threads, resolve_device, set_num_threads,
    synchronize,
};
pub use device_kernels::{DeviceKernels, compile_device_kernels, use_device_kernels};
pub use dtype::{kind_bytes, kind_name, named_kind, parse_kind};
pub use error::{Error, Result};
pub use grad::{backward, set_grad};
pub use host::{Coming, OnHost, set_data};
pub use linear::{LoraPart, Origin, Projection, lora_linear, lora_linear_of};
pub use loss::{HeadPart, cross_entropy, token_losses};
pub use memory::{
    DeviceMemory, current_rss_bytes, device_memory, free_device_memory, give_back_freed_memory, keep_freed_memory,
    peak_rss_bytes,
};
pub use optim::{AdamWScalars, LionScalars, adamw_step, grad_norm, lion_step};
pub use packed::{Int8, NESTED_BLOCK, NF4_BLOCK, Nf4, Scales, dynamic_table, unsigned_dynamic_table};
pub use panics::{catching, tell_errors_once};
pub use pointwise::{Gate, dropout, gated, rms_norm, rotary};
pub use products::{Products, use_products};
pub use seed::{Drawing, manual_seed, mix_seed, uniform_from_seed};
pub use weight::Weight;
