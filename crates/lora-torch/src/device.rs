//! Which device to compute on. One build serves CPU and CUDA: the CUDA backend is loaded at run time when it lies beside
//! the libtorch that is loaded.

use crate::error::{Error, Result};
use crate::ffi;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::OnceLock;
use tch::Device;

/// What the user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first CUDA device, or the CPU where there is none.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device by its index.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let unknown = || Error::Device { device: s.to_string(), reason: "known are auto, cpu, cuda and cuda:N".into() };
        match s {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => s.strip_prefix("cuda:").and_then(|n| n.parse().ok()).map(Self::Cuda).ok_or_else(unknown),
        }
    }
}

/// What became of the CUDA backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CudaStatus {
    /// Loaded, with this many devices.
    Loaded {
        /// Number of devices.
        devices: usize,
    },
    /// There is no `libtorch_cuda.so` beside `libtorch_cpu.so`.
    Absent {
        /// Where it was looked for.
        looked_for: PathBuf,
    },
    /// The library is there and did not load, or found no device.
    Failed {
        /// What the loader or the driver said.
        reason: String,
    },
}

/// Loads the CUDA backend, once, before anything asks for a device.
pub fn cuda_status() -> &'static CudaStatus {
    static STATUS: OnceLock<CudaStatus> = OnceLock::new();
    STATUS.get_or_init(load_cuda)
}

fn load_cuda() -> CudaStatus {
    if !ffi::cuda_registered() {
        let folder =
            loaded_library("libtorch_cpu.so").and_then(|p| p.parent().map(Path::to_path_buf)).unwrap_or_default();
        let library = folder.join("libtorch_cuda.so");
        if !library.is_file() {
            return CudaStatus::Absent { looked_for: library };
        }
        if let Err(reason) = ffi::load_forever(&library) {
            return CudaStatus::Failed { reason };
        }
    }
    match tch::Cuda::device_count() {
        n if n > 0 => CudaStatus::Loaded { devices: n as usize },
        _ => CudaStatus::Failed {
            reason: "the CUDA backend is loaded and finds no device (is the driver there?)".into(),
        },
    }
}

/// Where a library of this process was loaded from, as the loader spelt it (links are kept, so that what lies beside the
/// link is found).
fn loaded_library(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|l| l.split_once('/').map(|(_, p)| PathBuf::from(format!("/{p}"))))
        .find(|p| p.ends_with(name))
}

/// The device for a choice.
///
/// # Errors
/// [`Error::Device`] when a CUDA device was asked for that is not there.
pub fn resolve_device(choice: DeviceChoice) -> Result<Device> {
    match (choice, cuda_status()) {
        (DeviceChoice::Cpu, _) => Ok(Device::Cpu),
        (DeviceChoice::Auto, CudaStatus::Loaded { .. }) => Ok(Device::Cuda(0)),
        (DeviceChoice::Auto, _) => Ok(Device::Cpu),
        (DeviceChoice::Cuda(i), CudaStatus::Loaded { devices }) if i < *devices => Ok(Device::Cuda(i)),
        (DeviceChoice::Cuda(i), status) => Err(Error::Device {
            device: format!("cuda:{i}"),
            reason: match status {
                CudaStatus::Loaded { devices } => format!("there are {devices} CUDA devices"),
                CudaStatus::Absent { looked_for } => format!("no {}", looked_for.display()),
                CudaStatus::Failed { reason } => reason.clone(),
            },
        }),
    }
}

/// `cpu` or `cuda:N`.
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cpu => "cpu".into(),
        Device::Cuda(i) => format!("cuda:{i}"),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// Waits until the device has finished what it was given; at once on the CPU.
///
/// # Errors
/// What the device reports.
pub fn synchronize(device: Device) -> Result<()> {
    if device == Device::Cpu { Ok(()) } else { ffi::synchronize() }
}

/// The version of libtorch that this build is made against.
pub fn libtorch_version() -> &'static str {
    "2.11.0"
}

/// Threads that one operation on the CPU uses.
pub fn num_threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1)
}

/// Sets the number of threads that one operation on the CPU uses.
pub fn set_num_threads(n: usize) {
    tch::set_num_threads(i32::try_from(n.max(1)).unwrap_or(1));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_parse() {
        assert_eq!("auto".parse::<DeviceChoice>().unwrap(), DeviceChoice::Auto);
        assert_eq!("cuda:3".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(3));
        assert!("gpu".parse::<DeviceChoice>().unwrap_err().to_string().contains("cuda:N"));
    }

    #[test]
    fn the_cpu_is_always_there_and_an_absent_device_is_named() {
        assert_eq!(resolve_device(DeviceChoice::Cpu).unwrap(), Device::Cpu);
        let e = resolve_device(DeviceChoice::Cuda(4096)).unwrap_err().to_string();
        assert!(e.contains("cuda:4096") && e.contains("cpu"), "{e}");
    }

    #[test]
    fn libtorch_is_found_where_it_was_loaded_from() {
        assert!(loaded_library("libtorch_cpu.so").is_some_and(|p| p.is_file()));
    }
}
