//! The bytes of a file, decompressed as they are read.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};

use crate::error::{DataError, Result};
use crate::read::files::{Compression, DataFile};

const BUFFER: usize = 1 << 20;
/// A compressed table is unpacked to a file that no other program sees; one that grows past this is refused.
const MAX_UNPACKED: u64 = 64 << 30;

/// The file's bytes from the start.
pub(crate) fn open(file: &DataFile) -> Result<Box<dyn BufRead>> {
    let io = |source| DataError::Io { path: file.path.clone(), source };
    let raw = BufReader::with_capacity(BUFFER, File::open(&file.path).map_err(io)?);
    Ok(match file.compression {
        Compression::None => Box::new(raw),
        Compression::Gzip => Box::new(BufReader::with_capacity(BUFFER, flate2::bufread::MultiGzDecoder::new(raw))),
        Compression::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(raw).map_err(io)?;
            Box::new(BufReader::with_capacity(BUFFER, decoder))
        }
    })
}

/// The file, or what it unpacks to, for kinds whose table of contents is at the end.
pub(crate) fn open_seekable(file: &DataFile) -> Result<File> {
    let io = |source| DataError::Io { path: file.path.clone(), source };
    if file.compression == Compression::None {
        return File::open(&file.path).map_err(io);
    }
    let mut unpacked = tempfile::tempfile().map_err(io)?;
    let length = std::io::copy(&mut open(file)?.take(MAX_UNPACKED + 1), &mut unpacked).map_err(io)?;
    if length > MAX_UNPACKED {
        return Err(DataError::Unpacked { path: file.path.clone(), limit: MAX_UNPACKED });
    }
    unpacked.seek(SeekFrom::Start(0)).map_err(io)?;
    Ok(unpacked)
}
