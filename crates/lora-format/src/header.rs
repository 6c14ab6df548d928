//! The header of a safetensors file: 8 bytes of length, a JSON object, then the data.
//!
//! It is parsed here and not by the `safetensors` crate, which lets the last of two equal names win and whose errors
//! seldom name the tensor. A property test holds the two against each other.

use crate::dtype::{SUPPORTED, kind_of};
use crate::error::{Error, HeaderFault, Result, TensorFault};
use lora_torch::kind_bytes;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use tch::Kind;

/// The longest header that the format allows, bytes.
const MAX_HEADER: u64 = 100_000_000;
/// More dimensions than any tensor of a model has.
const MAX_DIMS: usize = 16;
const METADATA: &str = "__metadata__";

/// What the header says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The dtype of its elements.
    pub kind: Kind,
    /// Its sizes.
    pub shape: Vec<i64>,
    /// Where its elements lie, counted from the end of the header.
    pub bytes: Range<usize>,
}

/// A header whose tensors have been checked to tile the data exactly.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) tensors: BTreeMap<String, TensorInfo>,
    pub(crate) metadata: BTreeMap<String, String>,
    /// Where the data begins in the file.
    pub(crate) data_start: usize,
}

/// Reads and checks the header at the start of `file`, the whole content of a safetensors file.
pub(crate) fn parse(file: &[u8], path: &Path) -> Result<Header> {
    let fail = |fault| Error::header(path, fault);
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(fail(HeaderFault::TooShort { bytes: file.len() }));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(fail(HeaderFault::TooLong { bytes: length, limit: MAX_HEADER }));
    }
    let Some(text) = usize::try_from(length).ok().and_then(|n| rest.get(..n)) else {
        return Err(fail(HeaderFault::PastEnd { bytes: length, file: file.len() }));
    };
    if text.first() != Some(&b'{') {
        return Err(fail(HeaderFault::NotAnObject));
    }
    let raw: RawHeader = serde_json::from_slice(text).map_err(|source| fail(HeaderFault::Json { source }))?;
    let data = rest.len() - text.len();
    let mut tensors = BTreeMap::new();
    for (name, entry) in raw.tensors {
        let info = entry.check(data).map_err(|fault| Error::tensor(path, &name, fault))?;
        tensors.insert(name, info);
    }
    check_tiling(&tensors, data, path)?;
    Ok(Header { tensors, metadata: raw.metadata, data_start: 8 + text.len() })
}

/// Every byte of the data belongs to exactly one tensor.
fn check_tiling(tensors: &BTreeMap<String, TensorInfo>, data: usize, path: &Path) -> Result<()> {
    let mut by_place: Vec<(&String, &Range<usize>)> = tensors.iter().map(|(name, t)| (name, &t.bytes)).collect();
    by_place.sort_by_key(|(_, range)| (range.start, range.end));
    let mut end = 0;
    let mut before = "";
    for (name, range) in by_place {
        if range.start < end {
            return Err(Error::tensor(path, name, TensorFault::Overlap { other: before.to_string() }));
        }
        if range.start > end {
            return Err(Error::header(path, HeaderFault::Hole { start: end, end: range.start }));
        }
        (end, before) = (range.end, name);
    }
    if end < data {
        return Err(Error::header(path, HeaderFault::Hole { start: end, end: data }));
    }
    Ok(())
}

struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, RawTensor>,
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Dims,
    data_offsets: (u64, u64),
}

impl RawTensor {
    fn check(self, data: usize) -> std::result::Result<TensorInfo, TensorFault> {
        let Some(kind) = kind_of(&self.dtype) else {
            return Err(TensorFault::Dtype { got: self.dtype, wanted: SUPPORTED });
        };
        let (start, end) = self.data_offsets;
        let outside = TensorFault::Range { start, end, data };
        let (Ok(from), Ok(to)) = (usize::try_from(start), usize::try_from(end)) else { return Err(outside) };
        if from > to || to > data {
            return Err(outside);
        }
        let Dims(dims) = self.shape;
        let sizes: Option<Vec<i64>> = dims.iter().map(|&d| i64::try_from(d).ok()).collect();
        let wanted = dims.iter().try_fold(kind_bytes(kind) as u64, |n, &d| n.checked_mul(d));
        let (Some(shape), Some(wanted)) = (sizes, wanted.and_then(|n| usize::try_from(n).ok())) else {
            return Err(TensorFault::Overflow { shape: dims });
        };
        if to - from != wanted {
            return Err(TensorFault::Size { got: to - from, wanted });
        }
        Ok(TensorInfo { kind, shape, bytes: from..to })
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
        let twice = |name: &str| serde::de::Error::custom(format!("`{name}` is there twice"));
        let mut metadata: Option<BTreeMap<String, String>> = None;
        let mut tensors = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                if metadata.is_some() {
                    return Err(twice(METADATA));
                }
                metadata = Some(map.next_value()?);
                continue;
            }
            match tensors.entry(name) {
                Entry::Occupied(entry) => return Err(twice(entry.key())),
                Entry::Vacant(entry) => entry.insert(map.next_value()?),
            };
        }
        Ok(RawHeader { metadata: metadata.unwrap_or_default(), tensors })
    }
}

/// A shape, refused as soon as it has too many sizes: a header of 100 MB could list 50 million.
struct Dims(Vec<u64>);

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct DimsVisitor;
        impl<'de> Visitor<'de> for DimsVisitor {
            type Value = Dims;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a shape of at most {MAX_DIMS} sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Dims, A::Error> {
                let mut dims = Vec::new();
                while let Some(d) = seq.next_element()? {
                    if dims.len() == MAX_DIMS {
                        return Err(serde::de::Error::invalid_length(MAX_DIMS + 1, &self));
                    }
                    dims.push(d);
                }
                Ok(Dims(dims))
            }
        }
        deserializer.deserialize_seq(DimsVisitor)
    }
}
