//! A base model and adapters made into one model folder.

use crate::change::{Change, all_finite, blocks, count_infinite};
use crate::companions;
use crate::error::{Error, Result};
use crate::plan::{Plan, is_float};
use crate::provenance;
use crate::tied::TIE_KEY;
use lora_format::{Checkpoint, TensorFile, TensorWriter, create_staging_dir, read_json_object, sync_dir, write_atomic};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use tch::{Kind, TchError, Tensor};

/// How to merge.
#[derive(Debug, Clone, Default)]
pub struct MergeOptions {
    /// The dtype of all floating-point weights of the result; each keeps its own if absent.
    pub dtype: Option<Kind>,
}

/// What a merge did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergeReport {
    /// The tensors of the result.
    pub tensors: usize,
    /// The names of those that an adapter changed, sorted.
    pub changed: Vec<String>,
    /// The weight files written.
    pub shards: usize,
    /// The bytes of all tensors written.
    pub bytes: u64,
    /// Whether embedding and head shared a weight in the base and do not in the result.
    pub untied: bool,
    /// How many weights were packed in the base; none is in the result.
    pub unpacked: usize,
    /// What each adapter names as its base; a name that is not this base's deserves a look.
    pub named_bases: Vec<Option<String>>,
}

/// Merges adapters into a base model and writes the result to the new folder `out`, laid out as the base.
///
/// Each changed weight is `W + sum(scale * B A)`, added up in float32 (float64 for a float64 base) and rounded once;
/// every other one is copied. Weights that bitsandbytes packed are unpacked first, all of them, and the result has the dtype that
/// they were packed from. Modules that an adapter saved in full replace the base's. A tied embedding that the
/// adapters change in one of its roles only is split in two, and `tie_word_embeddings` set to false. `progress` hears
/// the bytes written so far and in all. Memory holds the largest tensor, the adapters, and some blocks of rows, which
/// are made while those before them are written.
///
/// Everything is checked before anything is written, and `out` appears complete or not at all.
///
/// # Errors
/// [`Error::Format`] for files that are damaged or cannot be written; [`Error::NoSuchTensor`] and [`Error::Shape`] for
/// an adapter that does not fit; [`Error::OutputTaken`], [`Error::NoSpace`]; [`Error::Overflow`] and [`Error::Merge`]
/// for values that cannot be stored.
pub fn merge(
    base: &Path,
    adapters: &[PathBuf],
    out: &Path,
    options: &MergeOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<MergeReport> {
    check_output(out)?;
    let config = read_json_object(&base.join("config.json"))?;
    let base = Checkpoint::open_unpacked(base)?;
    let plan = Plan::make(&base, &config, adapters)?;
    let mut layout: Vec<Shard<'_>> =
        base.shards().iter().map(|file| Shard::plan(file, &base, &plan, options)).collect::<Result<_>>()?;
    if let Some(last) = layout.last_mut() {
        last.add_new(&base, &plan, options)?;
    }
    let bytes = layout.iter().flat_map(|shard| &shard.tensors).map(Planned::bytes).sum();
    let companions = companions::list(base.dir())?;

    let parent = make_parent(out)?;
    check_space(&parent, bytes, &companions, base.dir())?;
    let staging = create_staging_dir(out)?;
    let mut done = 0;
    progress(0, bytes);
    let dtype = options.dtype.map(lora_torch::kind_name);
    // Hashing the inputs takes as long as reading them, and needs nothing of what is written.
    let record = std::thread::scope(|scope| {
        let hashing = scope.spawn(|| provenance::record(&base, adapters, &plan.named_bases, json!({"dtype": dtype})));
        for shard in &layout {
            shard.write(staging.path(), &base, &plan, &mut |n| {
                done += n;
                progress(done, bytes);
            })?;
        }
        hashing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    companions::copy(&companions, base.dir(), staging.path())?;
    write_config(staging.path(), &base, config, &plan, options)?;
    write_index(staging.path(), &base, &layout)?;
    write_json(&staging.path().join(provenance::FILE), &record)?;
    sync_dir(staging.path())?;
    fs::rename(staging.path(), out).map_err(|e| Error::io("rename to", out, e))?;
    // The staged folder has its final name now; there is nothing left to remove.
    let _ = staging.keep();
    sync_dir(&parent)?;
    Ok(MergeReport {
        tensors: layout.iter().map(|shard| shard.tensors.len()).sum(),
        changed: plan.changes.keys().cloned().collect(),
        shards: layout.len(),
        bytes,
        untied: plan.untied.is_some(),
        unpacked: base.unpacked(),
        named_bases: plan.named_bases,
    })
}

/// One weight file of the result.
struct Shard<'a> {
    file: &'a TensorFile,
    tensors: Vec<Planned>,
}

/// One tensor of the result.
struct Planned {
    name: String,
    kind: Kind,
    shape: Vec<i64>,
}

impl Planned {
    fn bytes(&self) -> u64 {
        self.elements() * lora_torch::kind_bytes(self.kind) as u64
    }

    fn elements(&self) -> u64 {
        self.shape.iter().product::<i64>() as u64
    }

    /// Makes the tensor block by block, each rounded to its dtype; a finite value that would become infinite is refused.
    /// `take` says whether it wants more.
    fn make(&self, base: &Checkpoint, change: Option<&Change>, take: &mut dyn FnMut(Tensor) -> bool) -> Result<()> {
        let name = self.name.as_str();
        let fail = |e: TchError| Error::merge(name, e);
        let mut lost = 0;
        for (first, count) in blocks(&self.shape) {
            let exact = match change {
                Some(change) => change.unchecked_rows(name, base, first, count)?,
                None => base.read_rows(name, first, count)?,
            };
            let rounded = exact.f_to_kind(self.kind).map_err(fail)?;
            // What is finite after rounding was so before.
            if is_float(self.kind) && !all_finite(&rounded).map_err(fail)? {
                change.map_or(Ok(()), |change| change.refuse_infinite(name, &exact))?;
                lost += count_infinite(&rounded).map_err(fail)? - count_infinite(&exact).map_err(fail)?;
            }
            if !take(rounded) {
                return Ok(());
            }
        }
        if lost > 0 {
            return Err(Error::Overflow { tensor: name.into(), count: lost, dtype: lora_torch::kind_name(self.kind) });
        }
        Ok(())
    }
}

/// What is written next.
enum Piece<'a> {
    /// The base's tensor as it is.
    Copied(&'a Planned),
    /// A tensor without elements.
    Empty(&'a Planned),
    /// The next rows of a tensor.
    Rows(&'a Planned, Tensor),
}

/// Pieces that wait to be written.
const AHEAD: usize = 2;

impl<'a> Shard<'a> {
    /// The base's file, tensors in its order; an untied head joins the embedding.
    fn plan(file: &'a TensorFile, base: &Checkpoint, plan: &Plan, options: &MergeOptions) -> Result<Self> {
        let mut infos: Vec<_> = file.tensors().collect();
        infos.sort_by_key(|(_, info)| (info.bytes.start, info.bytes.end));
        let mut tensors = Vec::new();
        for (name, _) in infos {
            let name = base.name_of(name);
            // What unpacks a packed weight is of no use beside the unpacked one.
            if plan.drops(&name) || !base.contains(&name) {
                continue;
            }
            let info = base.info(&name)?;
            let kind = options.dtype.filter(|_| is_float(info.kind)).unwrap_or(info.kind);
            let shape = plan.changes.get(&name).map_or_else(|| Ok(info.shape.clone()), |change| change.shape(base))?;
            tensors.push(Planned { name: name.clone(), kind, shape });
            if let Some(pair) = plan.untied.filter(|pair| pair.embedding == name && !base.contains(pair.head)) {
                tensors.push(Planned { name: pair.head.into(), kind, shape: info.shape.clone() });
            }
        }
        Ok(Shard { file, tensors })
    }

    /// Adds the head that the base lacks, in the dtype of what the file has.
    fn add_new(&mut self, base: &Checkpoint, plan: &Plan, options: &MergeOptions) -> Result<()> {
        let own = self.tensors.iter().map(|t| t.kind).find(|kind| is_float(*kind)).unwrap_or(Kind::Float);
        for (name, change) in plan.new_tensors(base) {
            let kind = options.dtype.unwrap_or(own);
            self.tensors.push(Planned { name: name.into(), kind, shape: change.shape(base)? });
        }
        Ok(())
    }

    fn write(&self, dir: &Path, base: &Checkpoint, plan: &Plan, wrote: &mut dyn FnMut(u64)) -> Result<()> {
        let path = dir.join(self.file.path().file_name().unwrap_or_default());
        let header: Vec<_> = self.tensors.iter().map(|t| (t.name.clone(), t.kind, t.shape.clone())).collect();
        let mut writer = TensorWriter::create(&path, &header, self.file.metadata())?;
        // Blocks are made while those before them are written.
        std::thread::scope(|scope| {
            let (sender, pieces) = sync_channel(AHEAD);
            let writing = scope.spawn(move || -> Result<()> {
                for piece in pieces {
                    match piece {
                        Piece::Copied(tensor) => base.copy(&tensor.name, &mut writer)?,
                        Piece::Empty(tensor) => writer.put_bytes(&tensor.name, &[])?,
                        Piece::Rows(tensor, rows) => writer.put_rows(&tensor.name, &rows)?,
                    }
                }
                Ok(writer.finish()?)
            });
            let made = self.make(base, plan, sender, wrote);
            // A file that cannot be written is why no more was wanted.
            let written = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            if made.is_ok() { written } else { made }
        })
    }

    /// Makes the pieces in the order of the file, until nobody takes them. The file is whole only where all are made.
    fn make<'s>(
        &'s self,
        base: &Checkpoint,
        plan: &Plan,
        pieces: SyncSender<Piece<'s>>,
        made: &mut dyn FnMut(u64),
    ) -> Result<()> {
        for tensor in &self.tensors {
            let wanted = match plan.changes.get(&tensor.name) {
                // A head that was untied without a change of its own is in `changes`, too.
                None if base.info(&tensor.name)?.kind == tensor.kind && !base.unpacks(&tensor.name) => {
                    pieces.send(Piece::Copied(tensor)).is_ok()
                }
                _ if tensor.elements() == 0 => pieces.send(Piece::Empty(tensor)).is_ok(),
                change => {
                    tensor.make(base, change, &mut |rows| pieces.send(Piece::Rows(tensor, rows)).is_ok())?;
                    true
                }
            };
            if !wanted {
                break;
            }
            made(tensor.bytes());
        }
        Ok(())
    }
}

pub(crate) fn check_output(out: &Path) -> Result<()> {
    let taken = match fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_some(),
        // Neither a folder nor nothing: a file, or a link that leads nowhere.
        Err(_) => fs::symlink_metadata(out).is_ok(),
    };
    if taken { Err(Error::OutputTaken { path: out.into() }) } else { Ok(()) }
}

pub(crate) fn make_parent(out: &Path) -> Result<PathBuf> {
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
    Ok(parent.into())
}

fn check_space(parent: &Path, bytes: u64, companions: &[PathBuf], base: &Path) -> Result<()> {
    let small: u64 = companions.iter().filter_map(|file| fs::metadata(base.join(file)).ok()).map(|m| m.len()).sum();
    // Headers, config, index and record need some room, too.
    let needed = bytes + small + (4 << 20);
    let available = fs4::available_space(parent).map_err(|e| Error::io("ask for the free space of", parent, e))?;
    if available < needed { Err(Error::NoSpace { path: parent.into(), needed, available }) } else { Ok(()) }
}

/// What `config.json` says of packed weights.
const PACKED_KEY: &str = "quantization_config";

/// Copies `config.json` as it is unless tying, dtype or labels changed, or weights were unpacked.
fn write_config(
    dir: &Path,
    base: &Checkpoint,
    mut config: Map<String, Value>,
    plan: &Plan,
    options: &MergeOptions,
) -> Result<()> {
    let name = "config.json";
    let unpacked = base.unpacked() > 0 && config.remove(PACKED_KEY).is_some();
    if plan.untied.is_none() && options.dtype.is_none() && plan.labels.is_none() && !unpacked {
        return companions::copy(&[name.into()], base.dir(), dir);
    }
    if plan.untied.is_some() {
        config.insert(TIE_KEY.into(), json!(false));
    }
    if let Some(labels) = &plan.labels {
        labels.put_into_config(&mut config);
    }
    if let Some(kind) = options.dtype {
        let key =
            if config.contains_key("torch_dtype") && !config.contains_key("dtype") { "torch_dtype" } else { "dtype" };
        config.insert(key.into(), json!(lora_torch::kind_name(kind)));
    }
    write_json(&dir.join(name), &Value::Object(config))
}

/// Writes the index of a sharded model for what the shards now hold.
fn write_index(dir: &Path, base: &Checkpoint, layout: &[Shard<'_>]) -> Result<()> {
    let Some(path) = base.index_path() else { return Ok(()) };
    let mut index = read_json_object(path)?;
    let mut weight_map = BTreeMap::new();
    for shard in layout {
        let file = shard.file.path().file_name().unwrap_or_default().to_string_lossy();
        weight_map.extend(shard.tensors.iter().map(|t| (t.name.clone(), json!(file))));
    }
    let tensors = || layout.iter().flat_map(|shard| &shard.tensors);
    let metadata = index.entry("metadata").or_insert_with(|| json!({}));
    if let Some(metadata) = metadata.as_object_mut() {
        metadata.insert("total_size".into(), json!(tensors().map(Planned::bytes).sum::<u64>()));
        if metadata.contains_key("total_parameters") {
            metadata.insert("total_parameters".into(), json!(tensors().map(Planned::elements).sum::<u64>()));
        }
    }
    index.insert("weight_map".into(), json!(weight_map));
    write_json(&dir.join(path.file_name().unwrap_or_default()), &Value::Object(index))
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    Ok(write_atomic(path, format!("{value:#}\n").as_bytes())?)
}
