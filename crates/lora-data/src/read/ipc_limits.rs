//! Sizes of Arrow messages, checked before any of them is unpacked.
//!
//! A compressed buffer says in its first eight bytes how much it unpacks to, and the reader takes that much memory. The
//! messages are therefore walked first: each is a length, a flatbuffer of that length and a body (Apache Arrow's
//! "encapsulated message format").

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};

use arrow_ipc::{RecordBatch, root_as_message};

/// What one batch may unpack to.
const MAX_BATCH_BYTES: u64 = 1 << 30;
/// A message's description, without its body.
const MAX_METADATA_BYTES: u64 = 16 << 20;
const CONTINUATION: u32 = u32::MAX;

/// Walks the messages from `start` to the end of the stream.
pub(super) fn check_messages(file: &File, start: u64) -> Result<(), String> {
    let io = |error: std::io::Error| error.to_string();
    let length = file.metadata().map_err(io)?.len();
    let mut reader = BufReader::with_capacity(1 << 16, file);
    reader.seek(SeekFrom::Start(start)).map_err(io)?;
    let mut at = start;
    while at < length {
        let mut size = word(&mut reader)?;
        at += 4;
        if size == CONTINUATION {
            size = word(&mut reader)?;
            at += 4;
        }
        let size = u64::from(size);
        if size == 0 {
            return Ok(());
        }
        if size > MAX_METADATA_BYTES || at + size > length {
            return Err(format!(
                "a message says that its description takes {size} bytes; the file was cut off or is damaged"
            ));
        }
        let mut metadata = vec![0; size as usize];
        reader.read_exact(&mut metadata).map_err(io)?;
        at += size;
        let message = root_as_message(&metadata).map_err(|error| error.to_string())?;
        let body = u64::try_from(message.bodyLength()).map_err(|_| "a message has a negative length".to_owned())?;
        let end = at.checked_add(body).filter(|&end| end <= length);
        let end = end.ok_or("the last message is not whole; the file was cut off")?;
        let batch = message.header_as_record_batch();
        let batch = batch.or_else(|| message.header_as_dictionary_batch().and_then(|dictionary| dictionary.data()));
        if let Some(batch) = batch {
            check_batch(&mut reader, batch, at, body)?;
        }
        reader.seek(SeekFrom::Start(end)).map_err(io)?;
        at = end;
    }
    Ok(())
}

fn word(reader: &mut impl Read) -> Result<u32, String> {
    let mut bytes = [0; 4];
    reader.read_exact(&mut bytes).map_err(|_| "the file was cut off".to_owned())?;
    Ok(u32::from_le_bytes(bytes))
}

fn check_batch(reader: &mut BufReader<&File>, batch: RecordBatch<'_>, start: u64, body: u64) -> Result<(), String> {
    if batch.compression().is_none() {
        return Ok(());
    }
    let mut total = 0_u64;
    for buffer in batch.buffers().into_iter().flatten() {
        let (Ok(offset), Ok(length)) = (u64::try_from(buffer.offset()), u64::try_from(buffer.length())) else {
            return Err("a buffer lies at a negative place".to_owned());
        };
        if length < 8 {
            continue;
        }
        if offset.checked_add(length).is_none_or(|end| end > body) {
            return Err("a buffer goes beyond its message".to_owned());
        }
        let mut bytes = [0; 8];
        reader.seek(SeekFrom::Start(start + offset)).map_err(|error| error.to_string())?;
        reader.read_exact(&mut bytes).map_err(|error| error.to_string())?;
        // -1 stands for a buffer that is not compressed.
        let unpacked = u64::try_from(i64::from_le_bytes(bytes)).unwrap_or(length);
        total = total.saturating_add(unpacked);
        if total > MAX_BATCH_BYTES {
            return Err(format!(
                "a batch unpacks to {total} bytes or more, and {MAX_BATCH_BYTES} are accepted; write the file with smaller batches"
            ));
        }
    }
    Ok(())
}
