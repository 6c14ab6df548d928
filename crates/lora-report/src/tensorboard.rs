//! What TensorBoard reads: files of records, each an event in protobuf's form.

mod events;
mod proto;
mod read;
mod records;

pub use events::EventWriter;
pub use read::{ScalarEvent, read_scalars};
pub use records::{Record, masked_crc32c, read_records};
