//! Fingerprints of what a run is made from.

use crate::error::{Error, Result};
use lora_format::Checkpoint;
use sha2::{Digest, Sha256};
use std::path::Path;

/// One block of this many bytes is read at every `STRIDE` of a weight file: any other checkpoint differs in them, and a
/// large one is fingerprinted in a moment.
const BLOCK: usize = 4096;
const STRIDE: usize = 1 << 20;

/// A fingerprint of a base checkpoint: its config, and of each tensor the name, shape, dtype and sampled bytes.
pub(crate) fn of_checkpoint(dir: &Path) -> Result<String> {
    let config = dir.join("config.json");
    let mut hash = Sha256::new();
    hash.update(std::fs::read(&config).map_err(Error::io("read", &config))?);
    let checkpoint = Checkpoint::open(dir)?;
    for name in checkpoint.names() {
        let info = checkpoint.info(name)?;
        hash.update(format!("{name} {:?} {:?}\n", info.shape, info.kind));
        let bytes = checkpoint.shard_of(name)?.bytes(name)?;
        for start in (0..bytes.len()).step_by(STRIDE) {
            hash.update(&bytes[start..bytes.len().min(start + BLOCK)]);
        }
    }
    Ok(hex(&hash.finalize()))
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
