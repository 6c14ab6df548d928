//! `lora doctor`: what this machine has to offer.

use crate::machine::memory;
use crate::out;
use anyhow::Result;
use lora_torch::{CudaStatus, cuda_status, device_memory, libtorch_version, num_threads};
use lora_train::matrix_rate;
use serde_json::json;
use std::path::PathBuf;
use tch::Device;

/// The flags of `lora doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
///
/// # Errors
/// When libtorch does not compute.
pub(crate) fn run(args: &Args) -> Result<()> {
    let cuda = match cuda_status() {
        CudaStatus::Loaded { devices } => format!("{devices} device{}", if *devices == 1 { "" } else { "s" }),
        CudaStatus::Absent { looked_for } => {
            format!("absent: no {}; `cargo xtask setup --cuda` gets it", looked_for.display())
        }
        CudaStatus::Failed { reason } => format!("not usable: {reason}"),
    };
    let from = loaded_from("libtorch_cpu.so").map_or_else(|| "unknown".to_string(), |p| p.display().to_string());
    let cpu_rate = matrix_rate(Device::Cpu, 1024)?;
    let gpu = match cuda_status() {
        CudaStatus::Loaded { .. } => {
            let device = Device::Cuda(0);
            let rate = matrix_rate(device, 8192)?;
            device_memory(device)?.map(|m| (rate, m.peak))
        }
        _ => None,
    };
    if args.json {
        return out::json(&json!({
            "lora": env!("CARGO_PKG_VERSION"),
            "libtorch": libtorch_version(),
            "libtorch_path": from,
            "cuda": cuda,
            "threads": num_threads(),
            "memory_bytes": memory("MemTotal"),
            "available_bytes": memory("MemAvailable"),
            "cpu_matmul_gflops": cpu_rate / 1e9,
            "gpu_matmul_gflops": gpu.map(|(rate, _)| rate / 1e9),
        }));
    }
    let shown = |field| memory(field).map_or_else(|| "unknown".into(), out::bytes);
    out::line(format!("lora       {}", env!("CARGO_PKG_VERSION")))?;
    out::line(format!("libtorch   {} from {from}", libtorch_version()))?;
    out::line(format!("CUDA       {cuda}"))?;
    out::line(format!("threads    {}", num_threads()))?;
    out::line(format!("memory     {}, {} available", shown("MemTotal"), shown("MemAvailable")))?;
    out::line(format!("CPU        {:.1} GFLOP/s in float32 matrix products", cpu_rate / 1e9))?;
    if let Some((rate, _)) = gpu {
        out::line(format!("GPU        {:.0} GFLOP/s in bfloat16 matrix products", rate / 1e9))?;
    }
    Ok(())
}

/// The file that a library of this process was loaded from.
fn loaded_from(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let paths = maps.lines().filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..])));
    paths.into_iter().find(|path| path.file_name().is_some_and(|n| n == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorch_is_found_and_computes() {
        assert!(loaded_from("libtorch_cpu.so").is_some_and(|p| p.is_file()));
        assert!(matrix_rate(Device::Cpu, 64).unwrap() > 0.0);
    }
}
