//! Helpers of the end-to-end tests.

mod lora;

pub use lora::{Done, fixtures, has_program, run, small_dataset};

use std::path::{Path, PathBuf};

/// A folder of real material (models, datasets, tokenizers, chat templates) that is too large to be committed.
///
/// It is looked for under the environment variable `LORA_MATERIAL`, else in `../shared/data` beside the workspace. A
/// test that needs it and does not find it says so on stderr and proves nothing.
pub fn material(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("LORA_MATERIAL")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    let folder = root.join(name);
    if folder.is_dir() {
        return Some(folder);
    }
    #[allow(clippy::print_stderr)]
    {
        eprintln!(
            "\n=== NOT TESTED: no folder {} (set LORA_MATERIAL to the folder that holds it) ===\n",
            folder.display()
        );
    }
    None
}

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
