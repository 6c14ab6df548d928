//! The only crate with C++ and unsafe code: fused operations on libtorch, devices, memory, seeds.
