//! GGUF files (version 3) written tensor by tensor, seen by others only when complete.

use crate::atomic::{create_temp, persist};
use crate::error::{Error, Result, TensorFault};
use std::io::Write;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Where data begins, and each tensor in it, in bytes.
const ALIGNMENT: u64 = 32;
/// Weights of a block of the small quantised types.
pub const GGUF_BLOCK: usize = 32;
/// Weights of a block of the K types.
pub const GGUF_SUPER_BLOCK: usize = 256;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    /// `uint32`
    U32(u32),
    /// `float32`
    F32(f32),
    /// `bool`
    Bool(bool),
    /// `string`
    Text(String),
    /// An array of `string`
    Texts(Vec<String>),
    /// An array of `float32`
    F32s(Vec<f32>),
    /// An array of `int32`
    I32s(Vec<i32>),
}

/// How the elements of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufType {
    /// 4 bytes each.
    F32,
    /// 2 bytes each.
    F16,
    /// 2 bytes each.
    BF16,
    /// Blocks of 32: a float16 scale and 32 signed bytes.
    Q8_0,
    /// Blocks of 32: a float16 scale and 32 half bytes.
    Q4_0,
    /// Blocks of 32: a float16 scale and 32 numbers of 5 bits.
    Q5_0,
    /// Blocks of 32: a float16 scale, a float16 minimum and 32 numbers of 5 bits.
    Q5_1,
    /// Blocks of 256: 8 parts, each with a scale and a minimum of 6 bits, and 256 half bytes (`Q4_K`).
    Q4K,
    /// Blocks of 256: 8 parts, each with a scale and a minimum of 6 bits, and 256 numbers of 5 bits (`Q5_K`).
    Q5K,
    /// Blocks of 256: 16 parts, each with a scale of 8 bits, and 256 numbers of 6 bits (`Q6_K`).
    Q6K,
}

impl GgufType {
    /// Its number in a file, its name, the elements of a block, and the bytes of one.
    fn facts(self) -> (u32, &'static str, u64, u64) {
        let (small, large) = (GGUF_BLOCK as u64, GGUF_SUPER_BLOCK as u64);
        match self {
            Self::F32 => (0, "f32", 1, 4),
            Self::F16 => (1, "f16", 1, 2),
            Self::Q4_0 => (2, "q4_0", small, 18),
            Self::Q5_0 => (6, "q5_0", small, 22),
            Self::Q5_1 => (7, "q5_1", small, 24),
            Self::Q8_0 => (8, "q8_0", small, 34),
            Self::Q4K => (12, "q4_k", large, 144),
            Self::Q5K => (13, "q5_k", large, 176),
            Self::Q6K => (14, "q6_k", large, 210),
            Self::BF16 => (30, "bf16", 1, 2),
        }
    }

    fn id(self) -> u32 {
        self.facts().0
    }

    /// Its name as llama.cpp prints it.
    pub fn name(self) -> &'static str {
        self.facts().1
    }

    /// The elements of a block, which a row holds a whole number of; 1 for types without blocks.
    pub fn block(self) -> u64 {
        self.facts().2
    }

    /// Whether rows must be a multiple of [`block`](Self::block).
    pub fn is_blocked(self) -> bool {
        self.block() > 1
    }

    /// Whether a row of so many elements can be stored so.
    pub fn fits(self, columns: i64) -> bool {
        columns.unsigned_abs().is_multiple_of(self.block())
    }

    /// The bytes of so many elements; of a blocked type a multiple of [`block`](Self::block).
    pub fn bytes(self, elements: u64) -> u64 {
        let (.., block, bytes) = self.facts();
        elements / block * bytes
    }
}

/// A tensor that a file will hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Its name in GGUF.
    pub name: String,
    /// Its shape, rows first; the file has it the other way round.
    pub shape: Vec<i64>,
    /// How it is stored.
    pub kind: GgufType,
}

impl GgufTensor {
    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.kind.bytes(self.shape.iter().product::<i64>().unsigned_abs())
    }
}

/// A GGUF file in the making. Dropped before [`finish`](Self::finish), it leaves nothing behind.
#[derive(Debug)]
pub struct GgufWriter {
    path: PathBuf,
    temp: NamedTempFile,
    plan: Vec<GgufTensor>,
    next: usize,
}

impl GgufWriter {
    /// Begins a file with this metadata that will hold these tensors in this order.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Tensor`] for a row that its blocked type cannot hold.
    pub fn create(path: &Path, metadata: &[(String, GgufValue)], tensors: &[GgufTensor]) -> Result<Self> {
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata {
            text(&mut header, key);
            encode(&mut header, value);
        }
        let mut offset = 0u64;
        for tensor in tensors {
            let columns = tensor.shape.last().copied().unwrap_or(1);
            if !tensor.kind.fits(columns) {
                let wanted = format!("rows of a multiple of {}", tensor.kind.block());
                let fault = TensorFault::Shape { got: tensor.shape.clone(), wanted };
                return Err(Error::tensor(path, tensor.name.clone(), fault));
            }
            text(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|d| header.extend(d.to_le_bytes()));
            header.extend(tensor.kind.id().to_le_bytes());
            header.extend(offset.to_le_bytes());
            offset += tensor.bytes().next_multiple_of(ALIGNMENT);
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        let mut temp = create_temp(path)?;
        temp.write_all(&header).map_err(|e| Error::io("write", path, e))?;
        Ok(Self { path: path.into(), temp, plan: tensors.to_vec(), next: 0 })
    }

    /// Writes the next tensor.
    ///
    /// # Errors
    /// [`TensorFault::Order`], [`TensorFault::Size`] when it is not the announced one; [`Error::Io`].
    pub fn put(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let due = self.plan.get(self.next).filter(|due| due.name == name);
        let Some(due) = due else {
            let wanted = self.plan.get(self.next).map_or("the end", |due| due.name.as_str()).to_string();
            return Err(Error::tensor(&self.path, name, TensorFault::Order { wanted }));
        };
        let wanted = due.bytes() as usize;
        if bytes.len() != wanted {
            return Err(Error::tensor(&self.path, name, TensorFault::Size { got: bytes.len(), wanted }));
        }
        let padding = vec![0; wanted.next_multiple_of(ALIGNMENT as usize) - wanted];
        let written = self.temp.write_all(bytes).and_then(|()| self.temp.write_all(&padding));
        written.map_err(|e| Error::io("write", &self.path, e))?;
        self.next += 1;
        Ok(())
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// [`TensorFault::Missing`] when announced tensors were not written; [`Error::Io`].
    pub fn finish(self) -> Result<()> {
        match self.plan.get(self.next) {
            Some(due) => Err(Error::tensor(&self.path, due.name.clone(), TensorFault::Missing)),
            None => persist(self.temp, &self.path),
        }
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The ids of the types of values in a file.
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

fn encode(out: &mut Vec<u8>, value: &GgufValue) {
    let array = |out: &mut Vec<u8>, of: u32, n: usize| {
        out.extend(ARRAY.to_le_bytes());
        out.extend(of.to_le_bytes());
        out.extend((n as u64).to_le_bytes());
    };
    match value {
        GgufValue::U32(x) => {
            out.extend(U32.to_le_bytes());
            out.extend(x.to_le_bytes());
        }
        GgufValue::F32(x) => {
            out.extend(F32.to_le_bytes());
            out.extend(x.to_le_bytes());
        }
        GgufValue::Bool(x) => {
            out.extend(BOOL.to_le_bytes());
            out.push(u8::from(*x));
        }
        GgufValue::Text(x) => {
            out.extend(TEXT.to_le_bytes());
            text(out, x);
        }
        GgufValue::Texts(list) => {
            array(out, TEXT, list.len());
            list.iter().for_each(|x| text(out, x));
        }
        GgufValue::F32s(list) => {
            array(out, F32, list.len());
            list.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }
        GgufValue::I32s(list) => {
            array(out, I32, list.len());
            list.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[i64], kind: GgufType) -> GgufTensor {
        GgufTensor { name: name.into(), shape: shape.to_vec(), kind }
    }

    #[test]
    fn a_file_is_laid_out_as_the_format_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        let metadata = [("a".to_string(), GgufValue::U32(7)), ("b".to_string(), GgufValue::Texts(vec!["xy".into()]))];
        let tensors = [tensor("t", &[2, 3], GgufType::F16), tensor("u", &[1], GgufType::F32)];
        let mut writer = GgufWriter::create(&path, &metadata, &tensors).unwrap();
        writer.put("t", &[1; 12]).unwrap();
        writer.put("u", &[2; 4]).unwrap();
        writer.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let mut wanted = b"GGUF".to_vec();
        wanted.extend(3u32.to_le_bytes());
        [2u64, 2, 1].iter().for_each(|n| wanted.extend(n.to_le_bytes()));
        wanted.extend(b"a");
        [4u32, 7].iter().for_each(|n| wanted.extend(n.to_le_bytes()));
        wanted.extend(1u64.to_le_bytes());
        wanted.extend(b"b");
        [9u32, 8].iter().for_each(|n| wanted.extend(n.to_le_bytes()));
        [1u64, 2].iter().for_each(|n| wanted.extend(n.to_le_bytes()));
        wanted.extend(b"xy");
        wanted.extend(1u64.to_le_bytes());
        wanted.extend(b"t");
        wanted.extend(2u32.to_le_bytes());
        [3u64, 2].iter().for_each(|n| wanted.extend(n.to_le_bytes()));
        wanted.extend(1u32.to_le_bytes());
        [0u64, 1].iter().for_each(|n| wanted.extend(n.to_le_bytes()));
        wanted.extend(b"u");
        wanted.extend(1u32.to_le_bytes());
        wanted.extend(1u64.to_le_bytes());
        wanted.extend(0u32.to_le_bytes());
        wanted.extend(32u64.to_le_bytes());
        wanted.resize(wanted.len().next_multiple_of(32), 0);
        wanted.extend([1; 12]);
        wanted.extend([0; 20]);
        wanted.extend([2; 4]);
        wanted.extend([0; 28]);
        assert_eq!(bytes, wanted);
    }

    #[test]
    fn what_was_not_announced_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        let one = [tensor("t", &[2, 32], GgufType::Q8_0)];
        let mut writer = GgufWriter::create(&path, &[], &one).unwrap();
        assert!(writer.put("other", &[0; 68]).is_err());
        assert!(writer.put("t", &[0; 64]).is_err());
        assert!(writer.finish().is_err());
        assert!(GgufWriter::create(&path, &[], &[tensor("t", &[2, 31], GgufType::Q4_0)]).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
