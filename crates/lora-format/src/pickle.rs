//! Pickle files are recognised, by name and by their first bytes, to be refused with advice.

use std::path::Path;

const EXTENSIONS: [&str; 6] = ["bin", "pt", "pth", "ckpt", "pkl", "pickle"];

/// Whether a file's name is one that torch pickles under.
pub(crate) fn has_pickle_name(path: &Path) -> bool {
    path.extension().and_then(|e| e.to_str()).is_some_and(|e| EXTENSIONS.contains(&e.to_ascii_lowercase().as_str()))
}

/// Whether a file that failed as safetensors begins as a zip archive (torch.save) or a pickle of protocol 2 to 5.
pub(crate) fn has_pickle_magic(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || matches!(bytes, [0x80, 2..=5, ..])
}
