//! JSON texts with duplicate keys refused, since readers disagree on which of them counts.

use crate::error::{Error, Result};
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The largest config or index that is read. Indexes of the largest mixture models have some 10 MB.
const MAX_BYTES: u64 = 64 << 20;
const EXCERPT: usize = 80;

/// Reads a file that holds one JSON object.
///
/// # Errors
/// [`Error::Io`]; [`Error::TooLarge`] above 64 MiB; [`Error::Json`] with the faulty line.
pub fn read_json_object(path: &Path) -> Result<Map<String, Value>> {
    let fail = |e| Error::io("read", path, e);
    let file = File::open(path).map_err(fail)?;
    let size = file.metadata().map_err(fail)?.len();
    if size > MAX_BYTES {
        return Err(Error::TooLarge { path: path.into(), size, limit: MAX_BYTES });
    }
    let mut bytes = Vec::new();
    // The limit holds for files that have no size, too: pipes, devices.
    file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(fail)?;
    parse(&bytes, path)
}

fn parse(bytes: &[u8], path: &Path) -> Result<Map<String, Value>> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = Strict.deserialize(&mut reader).and_then(|value| reader.end().map(|()| value));
    match value {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(Error::Field {
            path: path.into(),
            field: "(the whole file)".into(),
            value: shorten(&other.to_string()),
            wanted: "a JSON object".into(),
        }),
        Err(source) => {
            let line = bytes.split(|b| *b == b'\n').nth(source.line().saturating_sub(1)).unwrap_or_default();
            let excerpt = shorten(String::from_utf8_lossy(line).trim());
            Err(Error::Json { path: path.into(), excerpt, source })
        }
    }
}

/// A text cut to what fits an error message.
pub(crate) fn shorten(text: &str) -> String {
    match text.char_indices().nth(EXCERPT) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.to_string(),
    }
}

/// Builds a [`Value`] and fails at the second of two equal keys.
struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> std::result::Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> std::result::Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_u64<E>(self, v: u64) -> std::result::Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_f64<E: serde::de::Error>(self, v: f64) -> std::result::Result<Value, E> {
        Number::from_f64(v).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, v: &str) -> std::result::Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }

    fn visit_string<E>(self, v: String) -> std::result::Result<Value, E> {
        Ok(Value::String(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(Strict)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(serde::de::Error::custom(format!("duplicate key `{key}`")));
            }
            let value = map.next_value_seed(Strict)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_error(text: &str) -> String {
        parse(text.as_bytes(), Path::new("x.json")).unwrap_err().to_string()
    }

    #[test]
    fn values_are_those_of_serde_json() {
        let text = r#"{"b": [1, -2, 2.5, "é", null, true, {}], "a": {"x": 18446744073709551615}}"#;
        let plain: Map<String, Value> = serde_json::from_str(text).unwrap();
        assert_eq!(parse(text.as_bytes(), Path::new("x")).unwrap(), plain);
    }

    #[test]
    fn faults_name_the_file_and_show_the_line() {
        assert!(text_error("{\n  \"r\": 8,\n  \"lora_alpha\": NaN\n}").contains("\"lora_alpha\": NaN"));
        assert!(text_error("{\"lora_alpha\": 1e999}").contains("out of range"));
        assert!(text_error("{\"a\": {\"b\": 1, \"b\": 2}}").contains("duplicate key `b`"));
        assert!(text_error("[1]").contains("a JSON object"));
        assert!(text_error("{} x").starts_with("x.json: not valid JSON"));
        assert!(text_error(&"[".repeat(100_000)).contains("recursion limit"));
        assert!(text_error("").contains("EOF"));
    }
}
