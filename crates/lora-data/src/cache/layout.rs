//! The form of a file of tokens.
//!
//! ```text
//! head      8 bytes of magic, the version of this layout (u32), 4 bytes of nothing
//! tokens    for each token of each row 2 * id + trained (u32); filled up to 8 bytes
//! index     an [`Entry`] for each row
//! meta      JSON: the names of the files, where sources end, the report
//! trailer   counts, the key, and a BLAKE3 of head, index, meta and itself
//! ```
//!
//! All numbers have their lowest byte first. The trailer is written last and says how long everything before it is, so that
//! a file which was cut off anywhere is none. Tokens are not read when a file is opened; each row has its own
//! fingerprint, which is checked when the row is.

use crate::fingerprint::Fingerprint;

pub(super) const MAGIC: [u8; 8] = *b"loratok\n";

/// To be raised when the same input would give other rows, another report or another file.
pub(super) const LAYOUT: u32 = 2;

pub(super) const HEAD: usize = 16;
pub(super) const ENTRY: usize = 48;
pub(super) const TRAILER: usize = 96;
/// The checksum ends the trailer.
const SUMMED: usize = TRAILER - blake3::OUT_LEN;

/// What an entry's key is made into.
pub(crate) type Key = [u8; 32];

/// The head of every file.
pub(super) fn head() -> [u8; HEAD] {
    let mut bytes = [0; HEAD];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&LAYOUT.to_le_bytes());
    bytes
}

/// One row in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// Tokens of this row and of all before it.
    pub(super) end: u64,
    /// Where it comes from.
    pub(super) record: u64,
    pub(super) line: u64,
    /// A number in the list of files.
    pub(super) file: u32,
    /// Tokens that are trained.
    pub(super) trained: u32,
    pub(super) fingerprint: Fingerprint,
}

impl Entry {
    pub(super) fn to_bytes(self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..8].copy_from_slice(&self.end.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.record.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.line.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.file.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.trained.to_le_bytes());
        bytes[32..].copy_from_slice(&self.fingerprint);
        bytes
    }

    /// None when there are too few bytes.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            end: u64_at(bytes, 0)?,
            record: u64_at(bytes, 8)?,
            line: u64_at(bytes, 16)?,
            file: u32_at(bytes, 24)?,
            trained: u32_at(bytes, 28)?,
            fingerprint: bytes.get(32..ENTRY)?.try_into().ok()?,
        })
    }
}

/// The end of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trailer {
    pub(super) tokens: u64,
    pub(super) rows: u64,
    /// Bytes of the meta part.
    pub(super) meta: u64,
    /// The highest token of all; none where there is no token.
    pub(super) highest: Option<u32>,
    pub(super) key: Key,
}

impl Trailer {
    /// The trailer without its checksum.
    fn summed(&self) -> [u8; SUMMED] {
        let mut bytes = [0; SUMMED];
        bytes[..8].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.rows.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.meta.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.highest.unwrap_or(u32::MAX).to_le_bytes());
        bytes[32..].copy_from_slice(&self.key);
        bytes
    }

    /// The trailer's bytes; `hash` has taken head, index and meta.
    pub(super) fn to_bytes(self, mut hash: blake3::Hasher) -> [u8; TRAILER] {
        let summed = self.summed();
        hash.update(&summed);
        let mut bytes = [0; TRAILER];
        bytes[..SUMMED].copy_from_slice(&summed);
        bytes[SUMMED..].copy_from_slice(hash.finalize().as_bytes());
        bytes
    }

    /// The trailer of a file, when the file is as long as it says; the checksum is not looked at.
    pub(super) fn of(file: &[u8]) -> Option<Self> {
        let bytes = file.get(file.len().checked_sub(TRAILER)?..)?;
        let trailer = Self {
            tokens: u64_at(bytes, 0)?,
            rows: u64_at(bytes, 8)?,
            meta: u64_at(bytes, 16)?,
            highest: u32_at(bytes, 24).map(|id| Some(id).filter(|id| *id != u32::MAX))?,
            key: bytes.get(32..SUMMED)?.try_into().ok()?,
        };
        (trailer.meta_at()?.checked_add(usize::try_from(trailer.meta).ok()?)?.checked_add(TRAILER)? == file.len())
            .then_some(trailer)
    }

    /// Where the index begins.
    pub(super) fn index_at(&self) -> Option<usize> {
        let tokens = usize::try_from(self.tokens).ok()?.checked_mul(4)?;
        HEAD.checked_add(tokens)?.checked_next_multiple_of(8)
    }

    /// Where the meta part begins.
    pub(super) fn meta_at(&self) -> Option<usize> {
        self.index_at()?.checked_add(usize::try_from(self.rows).ok()?.checked_mul(ENTRY)?)
    }
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
