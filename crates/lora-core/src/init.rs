//! Initial values of adapters, as PEFT has them. Drawn on the CPU from a seed of their own, so that an adapter starts from
//! the same bits on every device and in whatever order modules are made.

use crate::Lora;
use crate::error::Result;
use crate::spec::LoraSpec;
use tch::{Device, Kind, Tensor};

/// How an adapter of a linear layer starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Init {
    /// `A` uniform in `±1/sqrt(in)` (Kaiming uniform with a = sqrt 5; He et al., 2015), `B` zero: PEFT's default.
    #[default]
    Kaiming,
    /// `A` normal with standard deviation `1/r`, `B` zero.
    Gaussian,
    /// Both uniform in `±1/sqrt(fan_in)`: the adapter changes the output from the first step. For tests.
    Random,
}

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn uniform(rows: i64, columns: i64) -> Result<Tensor> {
    let bound = 1.0 / (columns as f64).sqrt();
    Ok(Tensor::f_rand([rows, columns], CPU)?.f_mul_scalar(2.0 * bound)?.f_sub_scalar(bound)?)
}

fn trained(t: Tensor, device: Device) -> Result<Tensor> {
    Ok(t.f_to_device(device)?.f_set_requires_grad(true)?)
}

/// A fresh adapter for a linear layer.
///
/// # Errors
/// What libtorch reports.
pub fn init_linear(
    in_features: i64,
    out_features: i64,
    spec: LoraSpec,
    init: Init,
    seed: u64,
    device: Device,
) -> Result<Lora> {
    let _drawing = lora_torch::manual_seed(seed);
    let r = spec.r();
    let a = match init {
        Init::Kaiming | Init::Random => uniform(r, in_features)?,
        Init::Gaussian => Tensor::f_randn([r, in_features], CPU)?.f_mul_scalar(1.0 / r as f64)?,
    };
    let b = match init {
        Init::Random => uniform(out_features, r)?,
        Init::Kaiming | Init::Gaussian => Tensor::f_zeros([out_features, r], CPU)?,
    };
    Lora::from_parts(trained(a, device)?, trained(b, device)?, spec.scale())
}

/// A fresh adapter for an embedding: `A` zero, `B` standard normal.
///
/// # Errors
/// What libtorch reports.
pub fn init_embedding(vocab: i64, hidden: i64, spec: LoraSpec, seed: u64, device: Device) -> Result<Lora> {
    let _drawing = lora_torch::manual_seed(seed);
    let a = Tensor::f_zeros([spec.r(), vocab], CPU)?;
    let b = Tensor::f_randn([hidden, spec.r()], CPU)?;
    Lora::from_parts(trained(a, device)?, trained(b, device)?, spec.scale())
}
