//! Decoder models on libtorch: weights, target matching, adapter injection, generation.
