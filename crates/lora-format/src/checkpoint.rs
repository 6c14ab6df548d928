//! The weights of a Hugging Face model folder: one safetensors file, or shards with an index.

use crate::bnb::{PackedWeight, is_packed, is_part, packed_weight, view_packed};
use crate::error::{Error, Result, ShardFault, TensorFault};
use crate::fields::Fields;
use crate::header::TensorInfo;
use crate::json::read_json_object;
use crate::pickle::has_pickle_name;
use crate::tensor_file::TensorFile;
use crate::writer::TensorWriter;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The tensors of a checkpoint folder, wherever they lie.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    index: Option<PathBuf>,
    shards: Vec<TensorFile>,
    /// Tensor name to the number of its shard.
    places: BTreeMap<String, usize>,
    /// What stands before every name here and not in the files.
    prefix: &'static str,
    /// The files call weight and bias of a LayerNorm as TensorFlow did.
    old_norms: bool,
    /// What packed weights are when they are unpacked, where that is how they are to be seen.
    unpacked: BTreeMap<String, TensorInfo>,
}

/// Weight and bias of a LayerNorm, as the first BERT checkpoints call them and as everyone does since.
const NORM_NAMES: [(&str, &str); 2] = [("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")];

/// GPT-2's first checkpoints were saved from the model without its head, whose names lack this.
const GPT2_PREFIX: &str = "transformer.";

impl Checkpoint {
    /// Opens a folder with `model.safetensors`, or with `model.safetensors.index.json` and its shards.
    ///
    /// # Errors
    /// [`Error::Pickle`] when only pickled weights are there; [`Error::NoWeights`]; [`Error::Shard`] for a faulty index;
    /// and as [`TensorFile::open`].
    pub fn open(dir: &Path) -> Result<Self> {
        let single = dir.join(SINGLE);
        let index = dir.join(INDEX);
        let (index, shards) = if single.is_file() {
            (None, vec![TensorFile::open(&single)?])
        } else if index.is_file() {
            let shards = open_shards(dir, &index)?;
            (Some(index), shards)
        } else {
            return Err(explain_absence(dir));
        };
        let bare = shards.iter().any(|s| s.contains("wte.weight") && s.contains("h.0.ln_1.weight"));
        let prefix = if bare { GPT2_PREFIX } else { encoder_prefix(dir, &shards) };
        let old_norms = shards.iter().flat_map(TensorFile::names).any(|name| name.ends_with(NORM_NAMES[0].0));
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        for (number, shard) in shards.iter().enumerate() {
            for name in shard.names() {
                if let Some(other) = places.insert(known_as(prefix, old_norms, name), number) {
                    let fault = ShardFault::Twice { tensor: name.into(), other: file_name(&shards[other]) };
                    return Err(Error::Shard { path: dir.join(INDEX), shard: file_name(shard), fault });
                }
            }
        }
        Ok(Checkpoint { dir: dir.into(), index, shards, places, prefix, old_norms, unpacked: BTreeMap::new() })
    }

    /// Opens a folder as the model that it would be without packing: a weight that bitsandbytes packed is one of the dtype that
    /// it was packed from, and what belongs to its packed form is not there. Nothing is unpacked before it is read.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`packed_weight`].
    pub fn open_unpacked(dir: &Path) -> Result<Self> {
        let mut checkpoint = Self::open(dir)?;
        let packed: Vec<String> =
            checkpoint.places.keys().filter(|name| is_packed(&checkpoint, name)).cloned().collect();
        let float = |info: &&TensorInfo| [Kind::BFloat16, Kind::Half, Kind::Float].contains(&info.kind);
        let infos = checkpoint.places.keys().filter(|name| !is_part(name)).map(|name| checkpoint.stored_info(name));
        let others = infos.collect::<Result<Vec<_>>>()?.into_iter().find(float).map_or(Kind::Float, |info| info.kind);
        for name in packed {
            let PackedWeight { shape, packed_from, .. } = packed_weight(&checkpoint, &name)?;
            let bytes = checkpoint.stored_info(&name)?.bytes.clone();
            let info = TensorInfo { kind: packed_from.unwrap_or(others), shape: shape.to_vec(), bytes };
            checkpoint.unpacked.insert(name, info);
        }
        Ok(checkpoint)
    }

    /// Whether a weight is seen unpacked.
    pub fn unpacks(&self, name: &str) -> bool {
        self.unpacked.contains_key(name)
    }

    /// How many weights are seen unpacked.
    pub fn unpacked(&self) -> usize {
        self.unpacked.len()
    }

    /// Whether the files hold a tensor, however they are seen.
    pub(crate) fn holds(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// What the file says of a tensor, however it is seen.
    pub(crate) fn stored_info(&self, name: &str) -> Result<&TensorInfo> {
        self.shard_of(name)?.info(&self.stored_name(name))
    }

    /// A copy of a tensor as the file has it, however it is seen.
    pub(crate) fn stored(&self, name: &str) -> Result<Tensor> {
        self.shard_of(name)?.read(&self.stored_name(name))
    }

    /// Whether a tensor is hidden behind the weight that it helps to unpack.
    fn hides(&self, name: &str) -> bool {
        !self.unpacked.is_empty() && is_part(name)
    }

    /// The name of a tensor that a file calls `stored`.
    pub fn name_of(&self, stored: &str) -> String {
        known_as(self.prefix, self.old_norms, stored)
    }

    /// What the files call a tensor.
    fn stored_name<'a>(&self, name: &'a str) -> Cow<'a, str> {
        let name = name.strip_prefix(self.prefix).unwrap_or(name);
        let as_before = |(old, new): &(&str, &str)| Some(format!("{}{old}", name.strip_suffix(new)?));
        match self.old_norms.then(|| NORM_NAMES.iter().find_map(as_before)).flatten() {
            Some(old) => Cow::Owned(old),
            None => Cow::Borrowed(name),
        }
    }

    /// The bytes of a tensor as they lie in its file; of a packed one, its codes.
    ///
    /// # Errors
    /// [`TensorFault::Missing`].
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        self.shard_of(name)?.bytes(&self.stored_name(name))
    }

    /// Hands a tensor over to a file in the making, as it lies in its own.
    ///
    /// # Errors
    /// [`TensorFault::Missing`]; as [`TensorWriter::copy_from`].
    pub fn copy(&self, name: &str, writer: &mut TensorWriter) -> Result<()> {
        writer.copy_from(name, self.shard_of(name)?, &self.stored_name(name))
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str).filter(|name| !self.hides(name))
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.holds(name) && !self.hides(name)
    }

    /// The file that holds a tensor.
    ///
    /// # Errors
    /// [`TensorFault::Missing`].
    pub fn shard_of(&self, name: &str) -> Result<&TensorFile> {
        match self.places.get(name) {
            Some(&number) => Ok(&self.shards[number]),
            None => Err(Error::tensor(&self.dir, name, TensorFault::Missing)),
        }
    }

    /// What the file says of a tensor; of one that is seen unpacked, what it is then.
    ///
    /// # Errors
    /// [`TensorFault::Missing`].
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.unpacked.get(name).map_or_else(|| self.stored_info(name), Ok)
    }

    /// A copy of a tensor on the CPU in its own dtype; one that is unpacked for it is not rounded to that, but float32.
    ///
    /// # Errors
    /// As [`TensorFile::read`] and [`crate::read_packed`].
    pub fn read(&self, name: &str) -> Result<Tensor> {
        match self.unpacked.get(name) {
            Some(info) => self.read_rows(name, 0, info.shape.first().copied().unwrap_or(0)),
            None => self.stored(name),
        }
    }

    /// A tensor over its mapped file, as [`TensorFile::view`].
    ///
    /// # Errors
    /// As [`TensorFile::view`].
    pub fn view(&self, name: &str) -> Result<Tensor> {
        self.shard_of(name)?.view(&self.stored_name(name))
    }

    /// Lets go of the pages of a tensor, as [`TensorFile::release`].
    ///
    /// # Errors
    /// [`TensorFault::Missing`].
    pub fn release(&self, name: &str) -> Result<()> {
        self.shard_of(name)?.release(&self.stored_name(name))
    }

    /// A copy of some rows of a tensor on the CPU in its own dtype, or float32 as [`read`](Self::read).
    ///
    /// # Errors
    /// As [`TensorFile::read_rows`] and [`crate::read_packed`].
    pub fn read_rows(&self, name: &str, first: i64, count: i64) -> Result<Tensor> {
        if let Some(info) = self.unpacked.get(name) {
            let rows = info.shape.first().copied().unwrap_or(0);
            if first < 0 || count < 0 || first.checked_add(count).is_none_or(|end| end > rows) {
                let shape = info.shape.clone();
                return Err(Error::tensor(&self.dir, name, TensorFault::Rows { first, count, shape }));
            }
            let torch = |source| Error::Torch { path: self.dir.clone(), source };
            return view_packed(self, name)?.dense_rows(first, count).map_err(torch);
        }
        self.shard_of(name)?.read_rows(&self.stored_name(name), first, count)
    }

    /// The files, in the order of their names.
    pub fn shards(&self) -> &[TensorFile] {
        &self.shards
    }

    /// The index file, if the checkpoint is sharded.
    pub fn index_path(&self) -> Option<&Path> {
        self.index.as_deref()
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.shards.iter().map(TensorFile::data_bytes).sum()
    }

    /// The number of elements of all tensors together.
    pub fn total_elements(&self) -> u64 {
        let infos = self.shards.iter().flat_map(TensorFile::tensors).map(|(_, info)| info);
        infos.map(|info| info.shape.iter().product::<i64>() as u64).sum()
    }
}

/// The name that a stored one stands for.
fn known_as(prefix: &str, old_norms: bool, stored: &str) -> String {
    let as_now = |(old, new): &(&str, &str)| Some(format!("{prefix}{}{new}", stored.strip_suffix(old)?));
    old_norms.then(|| NORM_NAMES.iter().find_map(as_now)).flatten().unwrap_or_else(|| format!("{prefix}{stored}"))
}

/// An encoder that was saved without a head lacks the name of its family before every tensor.
fn encoder_prefix(dir: &Path, shards: &[TensorFile]) -> &'static str {
    if !shards.iter().any(|s| s.contains("embeddings.word_embeddings.weight")) {
        return "";
    }
    let config = read_json_object(&dir.join("config.json")).unwrap_or_default();
    match config.get("model_type").and_then(|name| name.as_str()) {
        Some("bert") => "bert.",
        Some("roberta") => "roberta.",
        _ => "",
    }
}

fn open_shards(dir: &Path, index: &Path) -> Result<Vec<TensorFile>> {
    let map = read_json_object(index)?;
    let weight_map = Fields::new(index, "", &map).object("weight_map")?;
    let fail = |shard: &str, fault| Error::Shard { path: index.into(), shard: shard.into(), fault };
    let mut holds: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in weight_map {
        let Some(shard) = shard.as_str() else {
            return Err(fail(&shard.to_string(), ShardFault::Name));
        };
        holds.entry(shard).or_default().push(tensor);
    }
    if holds.is_empty() {
        return Err(Error::NoWeights { path: dir.into() });
    }
    for shard in holds.keys() {
        if has_pickle_name(Path::new(shard)) {
            return Err(Error::Pickle { path: dir.join(shard) });
        }
        let plain =
            shard.ends_with(".safetensors") && !shard.contains(['/', '\\', '\0', ':']) && !shard.starts_with('.');
        if !plain {
            return Err(fail(shard, ShardFault::Name));
        }
        if !dir.join(shard).is_file() {
            return Err(fail(shard, ShardFault::Missing));
        }
    }
    let mut shards = Vec::with_capacity(holds.len());
    for (shard, tensors) in holds {
        let file = TensorFile::open(&dir.join(shard))?;
        if let Some(tensor) = tensors.into_iter().find(|t| !file.contains(t)) {
            return Err(fail(shard, ShardFault::NoSuchTensor { tensor: tensor.into() }));
        }
        shards.push(file);
    }
    Ok(shards)
}

fn explain_absence(dir: &Path) -> Error {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) => return Error::io("read", dir, e),
    };
    let files: BTreeSet<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    match files.into_iter().find(|p| has_pickle_name(p)) {
        Some(path) => Error::Pickle { path },
        None => Error::NoWeights { path: dir.into() },
    }
}

fn file_name(file: &TensorFile) -> String {
    file.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
}
