//! `manifest.json`: what a checkpoint consists of, and of which run and moment it is.

use super::damage::Damage;
use crate::digest::hex;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The name of the manifest in a checkpoint's folder.
pub const MANIFEST_FILE: &str = "manifest.json";

/// The version of the format of checkpoints that is written, and the newest that is read.
pub const FORMAT_VERSION: u64 = 1;

/// A manifest has some kilobytes; anything longer is another file.
const MAX_BYTES: u64 = 64 << 20;

/// What stands between the manifest and the digest of it.
const SEAL: &str = ",\n  \"sha256\": \"";
const SEAL_END: &str = "\"\n}\n";

/// A checkpoint's contents and origin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format.
    pub format_version: u64,
    /// Optimizer steps done.
    pub step: u64,
    /// The run that it belongs to.
    pub run: RunIdentity,
    /// Where the run stands.
    pub state: TrainState,
    /// Every other file of the checkpoint by name.
    pub files: BTreeMap<String, FileEntry>,
}

/// A file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its length in bytes.
    pub bytes: u64,
    /// The sha256 of its contents, in lower-case hexadecimal digits.
    pub sha256: String,
}

/// Everything that a resumed run must share with the one it continues, to come to the same result.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunIdentity {
    /// Every key of the configuration with its value, from [`RunConfig::flat`](crate::RunConfig::flat).
    pub config: BTreeMap<String, String>,
    /// The sha256 of what the configuration only names: `base`, `data`, `tokenizer`.
    pub digests: BTreeMap<String, String>,
    /// The version of libtorch.
    pub libtorch: String,
    /// The device, as `cpu` or `cuda:0`.
    pub device: String,
    /// Processes that train together.
    pub world_size: u32,
    /// Threads of one operation on the CPU.
    pub threads: u32,
}

/// Where a run stands, besides its tensors. There is no state of a random generator: everything random follows from the
/// seed and the step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Optimizer steps done.
    pub step: u64,
    /// The pass over the data that the next row is taken from, from 0.
    pub cursor_epoch: u64,
    /// The next row in the order of that pass.
    pub cursor_row: u64,
    /// Tokens with a loss so far.
    pub trained_tokens: u64,
    /// Tokens computed so far.
    pub tokens: u64,
    /// Seconds spent so far.
    pub seconds: f64,
    /// The best evaluation so far, by `train.metric_for_best_model`, turned so that more is better.
    pub best_eval: Option<f64>,
    /// Evaluations since then.
    #[serde(default)]
    pub evals_since_best: u32,
    /// Steps without an update, because the loss or a gradient was not finite.
    pub skipped_steps: u64,
    /// Those of them that were the last ones: as many in a row end the run, wherever it is interrupted.
    #[serde(default)]
    pub skipped_in_a_row: u32,
}

impl Manifest {
    /// The text of the file: JSON whose last field is the sha256 of all that stands before it, so that no bit of the
    /// manifest itself can change unseen.
    pub(crate) fn to_text(&self) -> Result<String> {
        let json = serde_json::to_string_pretty(self).map_err(|source| Error::Json { what: "a manifest", source })?;
        let body = json.strip_suffix("\n}").unwrap_or(&json);
        let seal = hex(&Sha256::digest(body));
        Ok(format!("{body}{SEAL}{seal}{SEAL_END}"))
    }

    /// Reads the manifest of a checkpoint's folder. A newer format is refused before anything else is asked of it.
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST_FILE);
        let damaged = |damage| Error::CheckpointDamaged { path: dir.to_path_buf(), damage };
        let broken = |reason| damaged(Damage::Manifest { reason });
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(damaged(Damage::NoManifest)),
            Err(source) => return Err(Error::Io { action: "open", path, source }),
        };
        let mut bytes = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(Error::io("read", &path))?;
        let version = serde_json::from_slice::<Version>(&bytes).ok().map(|v| v.format_version);
        if let Some(found) = version.filter(|v| *v > FORMAT_VERSION) {
            return Err(Error::CheckpointTooNew { path: dir.to_path_buf(), found, supported: FORMAT_VERSION });
        }
        let text = std::str::from_utf8(&bytes).map_err(|_| broken("it is not text"))?;
        let (body, seal) = text.rsplit_once(SEAL).ok_or_else(|| broken("its end is missing"))?;
        if seal.strip_suffix(SEAL_END) != Some(hex(&Sha256::digest(body)).as_str()) {
            return Err(broken("its sha256 differs"));
        }
        serde_json::from_str(&format!("{body}\n}}")).map_err(|_| broken("fields are missing or of another type"))
    }
}

#[derive(Deserialize)]
struct Version {
    format_version: u64,
}

/// The length and sha256 of a file, read to its end.
pub(crate) fn digest_file(file: &mut File) -> std::io::Result<FileEntry> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    let mut bytes = 0;
    loop {
        let n = match file.read(&mut buffer) {
            Ok(0) => return Ok(FileEntry { bytes, sha256: hex(&hasher.finalize()) }),
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        hasher.update(buffer.get(..n).unwrap_or_default());
        bytes += n as u64;
    }
}
