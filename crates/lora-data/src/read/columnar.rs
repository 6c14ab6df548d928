//! From a row of an Arrow batch to a JSON record.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type,
    UInt32Type, UInt64Type,
};
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;
use serde_json::{Map, Value};

/// Whether values of the type have a JSON form.
pub(super) fn is_readable(of: &DataType) -> bool {
    match of {
        DataType::Null
        | DataType::Boolean
        | DataType::Int8
        | DataType::Int16
        | DataType::Int32
        | DataType::Int64
        | DataType::UInt8
        | DataType::UInt16
        | DataType::UInt32
        | DataType::UInt64
        | DataType::Float16
        | DataType::Float32
        | DataType::Float64
        | DataType::Utf8
        | DataType::LargeUtf8
        | DataType::Utf8View => true,
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            is_readable(item.data_type())
        }
        DataType::Struct(fields) => fields.iter().all(|field| is_readable(field.data_type())),
        DataType::Dictionary(_, values) => is_readable(values),
        _ => false,
    }
}

/// One row; columns that are not readable are left out.
pub(super) fn row(batch: &RecordBatch, index: usize, readable: &[bool]) -> Result<Map<String, Value>, String> {
    let schema = batch.schema();
    let mut record = Map::new();
    for ((field, column), _) in
        schema.fields().iter().zip(batch.columns()).zip(readable).filter(|(_, readable)| **readable)
    {
        let value = value(column.as_ref(), index).map_err(|problem| format!("field `{}`: {problem}", field.name()))?;
        record.insert(field.name().clone(), value);
    }
    Ok(record)
}

fn value(array: &dyn Array, index: usize) -> Result<Value, String> {
    if array.is_null(index) {
        return Ok(Value::Null);
    }
    macro_rules! number {
        ($of:ty) => {
            Value::from(array.as_primitive::<$of>().value(index))
        };
    }
    Ok(match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => Value::from(array.as_boolean().value(index)),
        DataType::Int8 => number!(Int8Type),
        DataType::Int16 => number!(Int16Type),
        DataType::Int32 => number!(Int32Type),
        DataType::Int64 => number!(Int64Type),
        DataType::UInt8 => number!(UInt8Type),
        DataType::UInt16 => number!(UInt16Type),
        DataType::UInt32 => number!(UInt32Type),
        DataType::UInt64 => number!(UInt64Type),
        DataType::Float16 => Value::from(array.as_primitive::<Float16Type>().value(index).to_f32()),
        DataType::Float32 => number!(Float32Type),
        DataType::Float64 => number!(Float64Type),
        DataType::Utf8 => Value::from(array.as_string::<i32>().value(index)),
        DataType::LargeUtf8 => Value::from(array.as_string::<i64>().value(index)),
        DataType::Utf8View => Value::from(array.as_string_view().value(index)),
        DataType::List(_) => list(array.as_list::<i32>().value(index).as_ref())?,
        DataType::LargeList(_) => list(array.as_list::<i64>().value(index).as_ref())?,
        DataType::FixedSizeList(..) => list(array.as_fixed_size_list().value(index).as_ref())?,
        DataType::Struct(fields) => {
            let of = array.as_struct();
            let mut map = Map::new();
            for (field, column) in fields.iter().zip(of.columns()) {
                // A table gives every object all fields; those without a value were absent in the source.
                let value = value(column.as_ref(), index)?;
                if !value.is_null() {
                    map.insert(field.name().clone(), value);
                }
            }
            Value::Object(map)
        }
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            let keys = dictionary.normalized_keys();
            let key = keys.get(index).copied().filter(|&key| key < dictionary.values().len());
            value(dictionary.values().as_ref(), key.ok_or("an index outside of its dictionary")?)?
        }
        other => return Err(format!("values of type {other} are not read")),
    })
}

fn list(items: &dyn Array) -> Result<Value, String> {
    (0..items.len()).map(|index| value(items, index)).collect::<Result<_, _>>().map(Value::Array)
}
