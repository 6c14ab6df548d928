//! A memory-mapped safetensors file.

use crate::error::{Error, Result, TensorFault};
use crate::header::{self, Header, TensorInfo};
use crate::pickle::{has_pickle_magic, has_pickle_name};
use memmap2::Mmap;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tch::Tensor;

/// A safetensors file, mapped and checked; tensors are read on demand.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    /// Its position belongs to whoever copies from it.
    file: Mutex<File>,
    map: Arc<Mmap>,
    header: Header,
}

impl TensorFile {
    /// Maps a file and checks its whole header: names are unique, and the tensors tile the data.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Pickle`] for a pickle, by name or by content; [`Error::Header`] and [`Error::Tensor`] for
    /// a damaged file.
    pub fn open(path: &Path) -> Result<Self> {
        if has_pickle_name(path) {
            return Err(Error::Pickle { path: path.into() });
        }
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let map = map_file(&file).map_err(|e| Error::io("map", path, e))?;
        match header::parse(&map, path) {
            Ok(header) => Ok(TensorFile { path: path.into(), file: Mutex::new(file), map: Arc::new(map), header }),
            Err(Error::Header { .. }) if has_pickle_magic(&map) => Err(Error::Pickle { path: path.into() }),
            Err(error) => Err(error),
        }
    }

    /// The names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// The tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.header.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// Whether the file holds a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.header.tensors.contains_key(name)
    }

    /// What the header says of a tensor.
    ///
    /// # Errors
    /// [`TensorFault::Missing`] when there is none of this name.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.header.tensors.get(name).ok_or_else(|| Error::tensor(&self.path, name, TensorFault::Missing))
    }

    /// The mapped elements of a tensor, row-major, little-endian.
    ///
    /// # Errors
    /// [`TensorFault::Missing`].
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let range = &self.info(name)?.bytes;
        Ok(&self.map[self.header.data_start..][range.clone()])
    }

    /// Copies the elements of a tensor to another file, at its position; the system does it without this program where it
    /// can. Returns the bytes copied.
    ///
    /// # Errors
    /// [`TensorFault::Missing`]; [`Error::Io`].
    pub(crate) fn copy_to(&self, name: &str, out: &mut File) -> Result<u64> {
        let range = &self.info(name)?.bytes;
        let (start, length) = ((self.header.data_start + range.start) as u64, range.len() as u64);
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let copied = file.seek(SeekFrom::Start(start)).and_then(|_| std::io::copy(&mut (&mut *file).take(length), out));
        match copied.map_err(|e| Error::io("copy", &self.path, e))? {
            copied if copied == length => Ok(copied),
            copied => {
                let fault = TensorFault::Size { got: copied as usize, wanted: range.len() };
                Err(Error::tensor(&self.path, name, fault))
            }
        }
    }

    /// A copy of a tensor on the CPU in its own dtype.
    ///
    /// # Errors
    /// [`TensorFault::Missing`]; [`Error::Torch`] when memory runs out.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let info = self.info(name)?;
        lora_torch::tensor_from_bytes(self.bytes(name)?, &info.shape, info.kind)
            .map_err(|source| Error::Torch { path: self.path.clone(), source })
    }

    /// A tensor over the mapped file itself: nothing is read until it is used, and the system may drop its pages and read
    /// them again. It must not be written to. Numbers that lie where their dtype cannot be read are copied.
    ///
    /// # Errors
    /// [`TensorFault::Missing`]; [`Error::Torch`].
    pub fn view(&self, name: &str) -> Result<Tensor> {
        let info = self.info(name)?;
        let start = self.header.data_start + info.bytes.start;
        if !start.is_multiple_of(lora_torch::kind_bytes(info.kind).max(1)) {
            return self.read(name);
        }
        lora_torch::tensor_over(self.map.clone(), start, &info.shape, info.kind)
            .map_err(|source| Error::Torch { path: self.path.clone(), source })
    }

    /// Lets go of the pages of a tensor that this process has touched; they are read again when they are used again.
    ///
    /// # Errors
    /// [`TensorFault::Missing`].
    pub fn release(&self, name: &str) -> Result<()> {
        let bytes = &self.info(name)?.bytes;
        release_pages(&self.map, self.header.data_start + bytes.start, bytes.len());
        Ok(())
    }

    /// A copy of `count` rows from row `first` on, on the CPU in the tensor's own dtype.
    ///
    /// # Shapes
    /// `[count, ..]` of a tensor `[rows, ..]`; a tensor without dimensions is one row, `[1]`.
    ///
    /// # Errors
    /// [`TensorFault::Missing`]; [`TensorFault::Rows`] when the tensor does not have these rows; [`Error::Torch`].
    pub fn read_rows(&self, name: &str, first: i64, count: i64) -> Result<Tensor> {
        let info = self.info(name)?;
        let mut shape = if info.shape.is_empty() { vec![1] } else { info.shape.clone() };
        let rows = shape[0];
        if first < 0 || count < 0 || first.checked_add(count).is_none_or(|end| end > rows) {
            return Err(Error::tensor(&self.path, name, TensorFault::Rows { first, count, shape }));
        }
        let bytes = self.bytes(name)?;
        let width = bytes.len() / rows.max(1) as usize;
        let (from, len) = (first as usize * width, count as usize * width);
        shape[0] = count;
        lora_torch::tensor_from_bytes(&bytes[from..from + len], &shape, info.kind)
            .map_err(|source| Error::Torch { path: self.path.clone(), source })
    }

    /// The text entries of the header's `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// The file's path as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of all tensors together.
    pub fn data_bytes(&self) -> u64 {
        (self.map.len() - self.header.data_start) as u64
    }
}

/// The largest page that a system may map a file by.
const LARGE_PAGE: usize = 2 << 20;

/// A hint to the system: one that it does not take changes nothing but the memory that is counted for this process.
#[allow(unsafe_code)]
fn release_pages(map: &Mmap, start: usize, len: usize) {
    // Where the system keeps a file in large pages, touching the next tensor has brought the end of the one before back.
    let end = (start + len).next_multiple_of(LARGE_PAGE).min(map.len());
    let start = start / LARGE_PAGE * LARGE_PAGE;
    let len = end.saturating_sub(start);
    #[cfg(unix)]
    // SAFETY: the mapping is of a file and never written to, so its pages come back as they were.
    let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len) };
}

#[allow(unsafe_code)]
fn map_file(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the mapping is read-only and private to this process. A file that another process shortens while it is
    // mapped ends this process with SIGBUS; nothing here ever rewrites a file in place (see `atomic`), so results of
    // this system cannot do that to each other.
    unsafe { Mmap::map(file) }
}
