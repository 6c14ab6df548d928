//! Protobuf's wire form, as much of it as events need: numbers of seven bits a byte, and fields of fixed or told length.

/// Wire types.
const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const BYTES: u64 = 2;
const FIXED32: u64 = 5;

/// Fields of `Event`, `SessionLog`, `Summary`, `Summary.Value`, `SummaryMetadata` and `TensorProto`, by their numbers.
pub(super) mod field {
    pub(in crate::tensorboard) const WALL_TIME: u64 = 1;
    pub(in crate::tensorboard) const STEP: u64 = 2;
    pub(in crate::tensorboard) const FILE_VERSION: u64 = 3;
    pub(in crate::tensorboard) const SUMMARY: u64 = 5;
    pub(in crate::tensorboard) const SESSION_LOG: u64 = 7;
    pub(in crate::tensorboard) const STATUS: u64 = 1;
    pub(in crate::tensorboard) const VALUE: u64 = 1;
    pub(in crate::tensorboard) const TAG: u64 = 1;
    pub(in crate::tensorboard) const SIMPLE_VALUE: u64 = 2;
    pub(in crate::tensorboard) const TENSOR: u64 = 8;
    pub(in crate::tensorboard) const METADATA: u64 = 9;
    pub(in crate::tensorboard) const PLUGIN_DATA: u64 = 1;
    pub(in crate::tensorboard) const PLUGIN_NAME: u64 = 1;
    pub(in crate::tensorboard) const DTYPE: u64 = 1;
    pub(in crate::tensorboard) const SHAPE: u64 = 2;
    pub(in crate::tensorboard) const STRING_VALUE: u64 = 8;
}

/// A message that is being written.
#[derive(Clone, Debug, Default)]
pub(super) struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut n: u64) {
        while n >= 128 {
            self.0.push(n as u8 & 127 | 128);
            n >>= 7;
        }
        self.0.push(n as u8);
    }

    pub(super) fn integer(mut self, field: u64, n: u64) -> Self {
        self.varint(field << 3 | VARINT);
        self.varint(n);
        self
    }

    pub(super) fn double(mut self, field: u64, x: f64) -> Self {
        self.varint(field << 3 | FIXED64);
        self.0.extend(x.to_le_bytes());
        self
    }

    pub(super) fn float(mut self, field: u64, x: f32) -> Self {
        self.varint(field << 3 | FIXED32);
        self.0.extend(x.to_le_bytes());
        self
    }

    pub(super) fn bytes(mut self, field: u64, bytes: &[u8]) -> Self {
        self.varint(field << 3 | BYTES);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
        self
    }

    pub(super) fn message(self, field: u64, message: &Message) -> Self {
        self.bytes(field, &message.0)
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// The value of a field that was read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Integer(u64),
    Double(f64),
    Float(f32),
    Bytes(&'a [u8]),
}

/// The fields of a message, in their order; none where the bytes are no message.
pub(super) fn fields(mut bytes: &[u8]) -> Option<Vec<(u64, Value<'_>)>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let key = read_varint(&mut bytes)?;
        let value = match key & 7 {
            VARINT => Value::Integer(read_varint(&mut bytes)?),
            FIXED64 => Value::Double(f64::from_le_bytes(take(&mut bytes, 8)?.try_into().ok()?)),
            FIXED32 => Value::Float(f32::from_le_bytes(take(&mut bytes, 4)?.try_into().ok()?)),
            BYTES => {
                let length = usize::try_from(read_varint(&mut bytes)?).ok()?;
                Value::Bytes(take(&mut bytes, length)?)
            }
            _ => return None,
        };
        all.push((key >> 3, value));
    }
    Some(all)
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(taken)
}

fn read_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut n = 0;
    for i in 0..10 {
        let byte = *take(bytes, 1)?.first()?;
        n |= u64::from(byte & 127).checked_shl(7 * i)?;
        if byte < 128 {
            return Some(n);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_examples_of_the_encoding_guide() {
        assert_eq!(Message::default().integer(1, 150).into_bytes(), [0x08, 0x96, 0x01]);
        assert_eq!(Message::default().bytes(2, b"testing").into_bytes(), b"\x12\x07testing");
        let inner = Message::default().integer(1, 150);
        assert_eq!(Message::default().message(3, &inner).into_bytes(), [0x1a, 0x03, 0x08, 0x96, 0x01]);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(n: u64, x: f64, y: f32, text in ".*") {
            prop_assume!(!x.is_nan() && !y.is_nan());
            let bytes = Message::default().integer(1, n).double(2, x).float(3, y).bytes(200, text.as_bytes()).into_bytes();
            let wanted = vec![(1, Value::Integer(n)), (2, Value::Double(x)), (3, Value::Float(y)), (200, Value::Bytes(text.as_bytes()))];
            prop_assert_eq!(fields(&bytes), Some(wanted));
        }

        #[test]
        fn any_bytes_are_a_message_or_none(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = fields(&bytes);
        }
    }
}
