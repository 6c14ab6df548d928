//! Who computes, on a CUDA device, what memory alone makes slow.

use crate::error::Result;
use crate::ffi;

/// Who computes gates, rotary embeddings, dropout, the loss of rows of logits and the numbers of NF4 codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKernels {
    /// libtorch, by a chain of its own operations on a CUDA device; on the CPU this crate's loops.
    Libtorch,
    /// On a CUDA device kernels of this crate, each one pass over memory. NVRTC, which comes with libtorch's CUDA libraries, compiles
    /// them when the first is needed, once for a process.
    Compiled,
    /// On the CPU the text of those kernels, one thread after the other: for tests.
    Emulated,
}

impl DeviceKernels {
    /// From its name: `libtorch` or `compiled`.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "libtorch" => Some(Self::Libtorch),
            "compiled" => Some(Self::Compiled),
            _ => None,
        }
    }
}

/// Chooses for the whole process; until it is called libtorch computes. The bits of most results differ between the two, and so do
/// the values that dropout drops.
///
/// # Errors
/// None that is known; what the shim reports. Where kernels cannot be compiled, the operation that needs one says why.
pub fn use_device_kernels(kernels: DeviceKernels) -> Result<()> {
    ffi::use_device_kernels(kernels as u8)
}

/// Compiles the kernels for an architecture such as 90, without a device, and returns the bytes of the result.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) where NVRTC is absent, or with what it says of the text.
pub fn compile_device_kernels(architecture: i32) -> Result<u64> {
    ffi::compile_device_kernels(architecture)
}
