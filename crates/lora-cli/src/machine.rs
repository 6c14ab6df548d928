//! What the machine can do.

use anyhow::Result;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// Operations a second of a square product of this size: fp32 on the CPU, bf16 on a GPU. The best of five, after one that
/// warms up.
///
/// # Errors
/// What libtorch reports.
pub(crate) fn matmul_rate(device: Device, n: i64) -> Result<f64> {
    let kind = if device == Device::Cpu { Kind::Float } else { Kind::BFloat16 };
    let torch = lora_torch::Error::from;
    let random = || Tensor::f_randn([n, n], (kind, device)).map_err(torch);
    let (x, y) = (random()?, random()?);
    let mut best = f64::INFINITY;
    for i in 0..6 {
        lora_torch::synchronize(device)?;
        let start = Instant::now();
        let _product = x.f_matmul(&y).map_err(torch)?;
        lora_torch::synchronize(device)?;
        if i > 0 {
            best = best.min(start.elapsed().as_secs_f64());
        }
    }
    Ok(2.0 * (n as f64).powi(3) / best)
}

/// A field of `/proc/meminfo` in bytes, where there is such a file.
pub(crate) fn memory(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    value.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}
