//! Who computes the products of fp32 matrices on the CPU.

use crate::error::Result;
use crate::ffi;

/// Whose loops multiply matrices of fp32 on the CPU. Those of this crate give the same bits on every CPU and with any number of
/// threads; libtorch's differ from them in the last places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Products {
    /// libtorch's: all there is on a CPU without AVX2.
    Libtorch,
    /// This crate's in tiles of 6 x 16, for CPUs with AVX2.
    Avx2,
    /// This crate's in tiles of 12 x 32, for CPUs with AVX-512.
    Avx512,
}

impl Products {
    const ALL: [Self; 3] = [Self::Libtorch, Self::Avx2, Self::Avx512];

    /// The widest of this crate's that the CPU has, else libtorch's: what is computed with until [`use_products`] is called.
    ///
    /// # Errors
    /// None that is known; what the shim reports.
    pub fn widest() -> Result<Self> {
        Ok(Self::ALL[usize::from(ffi::widest_products()?)])
    }

    /// What is computed with now.
    ///
    /// # Errors
    /// None that is known; what the shim reports.
    pub fn current() -> Result<Self> {
        Ok(Self::ALL[usize::from(ffi::products()?)])
    }
}

/// Chooses for the whole process, as [`set_num_threads`](crate::set_num_threads) does. What the CPU lacks becomes
/// [`Products::widest`].
///
/// # Errors
/// None that is known; what the shim reports.
pub fn use_products(products: Products) -> Result<()> {
    ffi::use_products(products as u8)
}
