//! How much memory the process and a device use.

use crate::error::Result;
use crate::ffi;
use tch::Device;

/// Bytes in use on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    /// In use now.
    pub current: u64,
    /// The most that was in use since the start of the process.
    pub peak: u64,
    /// Held by the caching allocator.
    pub reserved: u64,
}

/// Memory of a CUDA device as its caching allocator counts it; `None` on the CPU.
///
/// # Errors
/// What libtorch reports.
pub fn device_memory(device: Device) -> Result<Option<DeviceMemory>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let [current, peak, reserved] = ffi::device_memory(index as i64)?.map(|n| u64::try_from(n).unwrap_or(0));
    Ok(Some(DeviceMemory { current, peak, reserved }))
}

/// Bytes of a CUDA device that no process has taken; `None` on the CPU.
///
/// # Errors
/// What the device reports.
pub fn free_device_memory(device: Device) -> Result<Option<u64>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    ffi::device_free(index as i64).map(Some)
}

/// The most resident memory that this process has had, in bytes; 0 where the system does not say.
pub fn peak_rss_bytes() -> u64 {
    status_field("VmHWM:")
}

/// The resident memory of this process now, in bytes; 0 where the system does not say.
pub fn current_rss_bytes() -> u64 {
    status_field("VmRSS:")
}

fn status_field(field: &str) -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/self/status") else { return 0 };
    let value = text.lines().find_map(|line| line.strip_prefix(field));
    let kib = value.and_then(|v| v.split_whitespace().next()).and_then(|v| v.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Lets the C library keep freed tensors of up to 32 MiB for the next that ask, for the whole process: a training step then
/// does not wait for its pages to be cleared by the system. A program that trains calls it once, early; memory that was in
/// use at the peak stays with the process. Without effect where the C library is not glibc.
///
/// # Errors
/// None that is known; what the shim reports.
pub fn keep_freed_memory() -> Result<()> {
    ffi::keep_freed_memory()
}

/// Gives back to the system what the C library keeps of freed memory. Between parts of a step that need it in other sizes, such as
/// blocks and logits, this keeps the peak at what is in use. Without effect where the C library is not glibc.
///
/// # Errors
/// None that is known; what the shim reports.
pub fn give_back_freed_memory() -> Result<()> {
    ffi::give_back_freed_memory()
}
