//! LoRA mathematics: adapters, scaling, initialisation, forward, merge.
