//! The record form of TensorFlow: the length of a record, its checksum, the record, its checksum.

use crate::error::{Error, Result};
use std::path::Path;

/// The polynomial of CRC-32C (Castagnoli), lowest bit first.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// What is added after turning a checksum, so that the checksum of data with checksums in it is no trivial one.
const MASK: u32 = 0xa282_ead8;

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut rest, mut bit) = (byte as u32, 0);
        while bit < 8 {
            rest = if rest & 1 == 1 { rest >> 1 ^ POLYNOMIAL } else { rest >> 1 };
            bit += 1;
        }
        table[byte] = rest;
        byte += 1;
    }
    table
}

const TABLE: [u32; 256] = table();

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |rest, byte| TABLE[((rest ^ u32::from(*byte)) & 255) as usize] ^ rest >> 8)
}

/// The checksum of a record: CRC-32C, turned by 15 bits, plus a constant.
pub fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(MASK)
}

/// A record as it stands in a file.
pub(super) fn framed(record: &[u8]) -> Vec<u8> {
    let length = (record.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(record.len() + 16);
    out.extend(length);
    out.extend(masked_crc32c(&length).to_le_bytes());
    out.extend(record);
    out.extend(masked_crc32c(record).to_le_bytes());
    out
}

/// A record of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record(
    /// Its bytes.
    pub Vec<u8>,
);

/// The records of a file, with their checksums looked at; a last one that is not whole is passed over.
///
/// # Errors
/// [`Error::Broken`] where a checksum is another than that of what it stands for, [`Error::Io`] for a file that cannot be
/// read.
pub fn read_records(path: &Path) -> Result<Vec<Record>> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let (mut rest, mut records) = (bytes.as_slice(), Vec::new());
    let wrong = |number: usize, what: &str| Error::Broken {
        path: path.to_path_buf(),
        reason: format!("the checksum of record {number} is not that of its {what}"),
    };
    while let Some((head, after)) = rest.split_at_checked(12) {
        let (length, sum) = head.split_at(8);
        if number(sum) != u64::from(masked_crc32c(length)) {
            return Err(wrong(records.len(), "length"));
        }
        let length = usize::try_from(number(length)).unwrap_or(usize::MAX);
        let Some((record, after)) = after.split_at_checked(length) else { break };
        let Some((sum, after)) = after.split_at_checked(4) else { break };
        if number(sum) != u64::from(masked_crc32c(record)) {
            return Err(wrong(records.len(), "content"));
        }
        records.push(Record(record.to_vec()));
        rest = after;
    }
    Ok(records)
}

/// Up to eight bytes, the lowest first.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vectors_of_rfc_3720() {
        let ascending: Vec<u8> = (0..32).collect();
        for (bytes, sum) in [
            (vec![0; 32], 0x8a91_36aa),
            (vec![255; 32], 0x62a8_ab43),
            (ascending, 0x46dd_794e),
            (b"123456789".to_vec(), 0xe306_9283),
        ] {
            assert_eq!(crc32c(&bytes), sum);
        }
    }

    #[test]
    fn a_torn_record_is_passed_over_and_a_changed_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let whole = [framed(b"first"), framed(b""), framed(b"third")].concat();
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let ends = [21, 37, 58];
            assert_eq!(read_records(&path).unwrap().len(), ends.iter().filter(|end| cut >= **end).count(), "{cut}");
        }
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            std::fs::write(&path, &changed).unwrap();
            assert!(read_records(&path).is_err(), "{at}");
        }
    }
}
