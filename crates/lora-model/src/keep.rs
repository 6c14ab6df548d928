//! How the frozen base is kept in memory: in the dtype that it computes in, as the checkpoint has it, mapped from the file,
//! or packed into 4 or 8 bits.

use crate::config::ModelConfig;
use crate::decoder::{Decoder, ModuleMut};
use crate::error::{Error, Result};
use crate::names::modules;
use crate::weights::Progress;
use lora_format::{Checkpoint, is_packed, packed_weight};
use lora_torch::{Int8, Nf4, Weight};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Where the matrices of a base lie. Vectors (norms, biases) are always in the dtype that is computed in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Storage {
    /// In memory, in the dtype that is computed in: the fastest.
    #[default]
    Converted,
    /// In memory, in the dtype of the checkpoint; each product converts what it needs, tile by tile.
    Stored,
    /// In the checkpoint's file, of which the system reads what is used and drops what is not. CPU only.
    Mapped,
    /// Those of the blocks in the memory of the host, in the dtype of the checkpoint; each block comes to the device when it is
    /// computed. For a device that is smaller than the base.
    Host,
}

/// How a base is loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Keeping {
    /// What the model computes in.
    pub kind: Kind,
    /// Where it computes.
    pub device: Device,
    /// Where its matrices lie.
    pub storage: Storage,
}

/// Into what the linear layers of the blocks are packed. Embeddings, norms, routers and the output head never are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// 4-bit NormalFloat; with `double` its scales are packed, too (Dettmers et al., "QLoRA", 2023).
    Nf4 {
        /// Whether the scales are packed.
        double: bool,
    },
    /// 8-bit integers with a scale for each row (Dettmers et al., "LLM.int8()", 2022).
    Int8,
}

impl Storage {
    /// The names that [`named`](Self::named) knows.
    pub const NAMES: [&str; 4] = ["converted", "stored", "mapped", "host"];

    /// From its name in a configuration.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "converted" => Some(Self::Converted),
            "stored" => Some(Self::Stored),
            "mapped" => Some(Self::Mapped),
            "host" => Some(Self::Host),
            _ => None,
        }
    }
}

impl Packing {
    /// The names that [`named`](Self::named) knows.
    pub const NAMES: [&str; 3] = ["nf4", "nf4-double", "int8"];

    /// From its name in a configuration.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "nf4" => Some(Self::Nf4 { double: false }),
            "nf4-double" => Some(Self::Nf4 { double: true }),
            "int8" => Some(Self::Int8),
            _ => None,
        }
    }

    /// Packs a weight on `device`.
    ///
    /// # Errors
    /// [`Error::Torch`] for a weight that is not finite.
    pub fn pack(self, weight: &Tensor, device: Device) -> Result<Weight> {
        let packed = match self {
            Self::Nf4 { double } => Weight::Nf4(Nf4::pack(weight, double)?),
            Self::Int8 => Weight::Int8(Int8::pack(weight)?),
        };
        Ok(packed.to_device(device)?)
    }

    /// Bytes of a packed matrix `[rows, cols]`.
    pub fn bytes(self, [rows, cols]: [i64; 2]) -> i64 {
        let blocks = (rows * cols + lora_torch::NF4_BLOCK - 1) / lora_torch::NF4_BLOCK;
        match self {
            Self::Nf4 { double: false } => (rows * cols + 1) / 2 + 4 * blocks,
            Self::Nf4 { double: true } => {
                let nested = (blocks + lora_torch::NESTED_BLOCK - 1) / lora_torch::NESTED_BLOCK;
                (rows * cols + 1) / 2 + blocks + 4 * nested + 4 * 256
            }
            Self::Int8 => rows * cols + 4 * rows,
        }
    }
}

/// The file behind a mapped base, and what of it each block reads.
#[derive(Debug)]
pub(crate) struct MappedBase {
    checkpoint: Arc<Checkpoint>,
    blocks: Vec<Vec<String>>,
    rest: Vec<String>,
}

impl MappedBase {
    pub(crate) fn new(checkpoint: Arc<Checkpoint>, config: &ModelConfig) -> Self {
        let mut blocks = vec![Vec::new(); config.windows.len()];
        let mut rest = Vec::new();
        for module in modules(config) {
            let name = format!("{}.weight", module.path);
            let block = (0..blocks.len()).find(|&i| module.path.starts_with(&config.in_block(i, "")));
            let list = block.and_then(|i| blocks.get_mut(i)).unwrap_or(&mut rest);
            if checkpoint.contains(&name) && !is_packed(&checkpoint, &name) {
                list.push(name);
            }
        }
        Self { checkpoint, blocks, rest }
    }

    fn release<'a>(&self, names: impl IntoIterator<Item = &'a String>) -> Result<()> {
        names.into_iter().try_for_each(|name| Ok(self.checkpoint.release(name)?))
    }
}

impl Decoder {
    /// Packs the frozen linear layers of the blocks, one at a time, and lets go of what they were made from. Layers that are
    /// trained in full, or packed already, stay.
    ///
    /// Call it after [`inject`](Self::inject): what an adapter begins as a part of is taken out of the whole weight.
    ///
    /// # Errors
    /// [`Error::Module`] naming a layer whose weight is not finite.
    pub fn pack(&mut self, packing: Packing, progress: Progress<'_>) -> Result<()> {
        let device = self.device();
        let packed: BTreeMap<String, _> = packed_modules(&self.config).collect();
        let here = packed.iter().filter(|(path, _)| self.stage.holds(&self.config, path));
        let all: i64 = here.map(|(_, [rows, cols])| rows * cols).sum();
        let mapped = self.mapped.clone();
        let mut done = 0;
        for (path, module) in self.modules_mut() {
            let (ModuleMut::Linear(layer), Some([rows, cols])) = (module, packed.get(&path)) else { continue };
            done += rows * cols;
            let Some(weight) = layer.weight.plain().filter(|w| !w.requires_grad()) else { continue };
            layer.weight = packing.pack(weight, device).map_err(|e| Error::Module {
                module: path.clone(),
                reason: format!("its weight cannot be packed: {e}"),
            })?;
            if let Some(mapped) = &mapped {
                mapped.release([&format!("{path}.weight")])?;
            }
            progress(done.unsigned_abs(), all.unsigned_abs());
        }
        Ok(())
    }

    /// Lets go of the pages of a mapped block.
    pub(crate) fn release_block(&self, i: usize) -> Result<()> {
        match &self.mapped {
            Some(mapped) => mapped.release(mapped.blocks.get(i).into_iter().flatten()),
            None => Ok(()),
        }
    }

    /// Lets go of the pages of a mapped head and table.
    pub(crate) fn release_head(&self) -> Result<()> {
        match &self.mapped {
            Some(mapped) => mapped.release(&mapped.rest),
            None => Ok(()),
        }
    }

    /// Bytes of the frozen base in memory; a mapped one counts none of its matrices.
    pub fn base_bytes(&self) -> usize {
        let of = |t: &Tensor| t.numel() * lora_torch::kind_bytes(t.kind());
        let matrix = |t: &Tensor| if self.mapped.is_some() { 0 } else { of(t) };
        // Where the table is here, too, a tied head takes nothing.
        let tied = self.config.tie_word_embeddings && self.stage.is_first();
        self.modules()
            .iter()
            .map(|(path, module)| match module {
                crate::decoder::ModuleRef::Linear(_) if tied && *path == self.config.layout.lm_head => 0,
                crate::decoder::ModuleRef::Linear(l) => l.weight.plain().map_or_else(|| l.weight.bytes(), matrix),
                crate::decoder::ModuleRef::Embedding(e) => matrix(&e.weight),
                crate::decoder::ModuleRef::Norm(n) => of(&n.weight),
            })
            .sum()
    }
}

/// The matrices that are packed where packing is asked for: `[out, in]` by path.
pub fn packed_modules(config: &ModelConfig) -> impl Iterator<Item = (String, [i64; 2])> {
    let prefix = format!("{}.", config.layout.layers);
    modules(config)
        .into_iter()
        .filter(move |m| m.kind == crate::names::ModuleKind::Linear && m.path.starts_with(&prefix))
        .map(|m| (m.path, [m.out_features, m.in_features]))
}

/// Bytes of the matrices that a checkpoint has packed already, by their path. They are kept as they are, whatever is asked for.
///
/// # Errors
/// What is wrong with their parts.
pub fn packed_already(dir: &Path, config: &ModelConfig) -> Result<BTreeMap<String, i64>> {
    let checkpoint = Checkpoint::open(dir)?;
    let mut found = BTreeMap::new();
    for module in modules(config) {
        let name = format!("{}.weight", module.path);
        if checkpoint.contains(&name) && is_packed(&checkpoint, &name) {
            found.insert(module.path, packed_weight(&checkpoint, &name)?.bytes);
        }
    }
    Ok(found)
}

/// Bytes of the matrices and vectors of a base that is kept so, where it is computed with; `already` are those of matrices that the checkpoint has packed.
pub fn base_bytes(
    config: &ModelConfig,
    storage: Storage,
    packing: Option<Packing>,
    compute: Kind,
    stored: Kind,
    already: &BTreeMap<String, i64>,
) -> i64 {
    let width = |kind: Kind| lora_torch::kind_bytes(kind) as i64;
    let packed: BTreeMap<String, [i64; 2]> = packing.map(|_| packed_modules(config).collect()).unwrap_or_default();
    let (mut sum, mut on_host) = (0, BTreeMap::new());
    let block_of = |path: &str| (0..config.windows.len()).find(|&i| path.starts_with(&config.in_block(i, "")));
    for m in modules(config) {
        if config.tie_word_embeddings && m.path == config.layout.lm_head {
            continue;
        }
        for (name, shape) in m.tensors() {
            let n: i64 = shape.iter().product();
            let matrix = shape.len() == 2 && name.ends_with(".weight");
            if let Some(bytes) = already.get(&m.path).filter(|_| matrix) {
                sum += bytes;
                continue;
            }
            sum += match (packed.get(&m.path), packing, storage) {
                (Some(size), Some(packing), _) if matrix => packing.bytes(*size),
                (_, _, Storage::Mapped) if matrix => 0,
                (_, _, Storage::Host) if matrix && block_of(&m.path).is_some() => {
                    *on_host.entry(block_of(&m.path)).or_insert(0) += n * width(stored);
                    0
                }
                (_, _, Storage::Stored) if matrix => n * width(stored),
                _ => n * width(compute),
            };
        }
    }
    // One block that is computed, and one that comes.
    sum + 2 * on_host.into_values().max().unwrap_or(0)
}
