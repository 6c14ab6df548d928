//! Merge adapters into checkpoints on files, shard by shard, and verify the result.
