//! Who computes the products of fp32 matrices on the CPU.

use crate::error::Result;
use crate::ffi;

/// Chooses for the whole process, as [`set_num_threads`](crate::set_num_threads) does: `true` for the products of this crate
/// where the CPU has AVX2, `false` for libtorch's. Without a choice they are this crate's on a CPU with AVX2 and without
/// AVX-512, which libtorch's own use better.
///
/// # Errors
/// None that is known; what the shim reports.
pub fn use_own_products(own: bool) -> Result<()> {
    ffi::own_products(own)
}

/// Whether this crate computes them.
///
/// # Errors
/// None that is known; what the shim reports.
pub fn uses_own_products() -> Result<bool> {
    ffi::computes_own_products()
}
