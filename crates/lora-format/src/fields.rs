//! Typed access to the fields of a JSON object, with errors that name file, field and value.

use crate::error::{Error, Result};
use crate::json::shorten;
use serde_json::{Map, Value};
use std::path::Path;

/// The longest list that a config may hold; a model has some thousand modules.
const MAX_LIST: usize = 65_536;

/// The fields of one object; a missing field and `null` are the same.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    path: &'a Path,
    /// What stands before the field in messages: empty, or the name of the object and a dot.
    prefix: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(path: &'a Path, prefix: &'a str, map: &'a Map<String, Value>) -> Self {
        Fields { path, prefix, map }
    }

    pub(crate) fn path(&self) -> &'a Path {
        self.path
    }

    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub(crate) fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// The error that the value of `key` is not what it must be.
    pub(crate) fn wrong(&self, key: &str, wanted: impl Into<String>) -> Error {
        let value = self.map.get(key).map_or_else(|| "missing".to_string(), |v| shorten(&v.to_string()));
        Error::Field { path: self.path.into(), field: format!("{}{key}", self.prefix), value, wanted: wanted.into() }
    }

    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(crate) fn string(&self, key: &str) -> Result<Option<String>> {
        self.typed(key, "a string", |v| v.as_str().map(str::to_string))
    }

    /// A whole number within `[low, high]`; `8.0` and `"8"` are none.
    pub(crate) fn int(&self, key: &str, low: i64, high: i64) -> Result<Option<i64>> {
        self.typed(key, format!("a whole number from {low} to {high}"), |v| int_within(v, low, high))
    }

    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite number", finite)
    }

    /// A string or a list of strings.
    pub(crate) fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
        let wanted = format!("a string or a list of at most {MAX_LIST} strings");
        self.typed(key, wanted, |v| match v {
            Value::String(s) => Some(vec![s.clone()]),
            v => list(v, |item| item.as_str().map(str::to_string)),
        })
    }

    /// A whole number or a list of them, each within `[low, high]`.
    pub(crate) fn ints(&self, key: &str, low: i64, high: i64) -> Result<Option<Vec<i64>>> {
        let wanted = format!("a whole number or a list of at most {MAX_LIST}, each from {low} to {high}");
        self.typed(key, wanted, |v| match v {
            Value::Array(_) => list(v, |item| int_within(item, low, high)),
            v => int_within(v, low, high).map(|i| vec![i]),
        })
    }

    pub(crate) fn floats(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.typed(key, format!("a list of at most {MAX_LIST} finite numbers"), |v| list(v, finite))
    }

    pub(crate) fn object(&self, key: &str) -> Result<&'a Map<String, Value>> {
        self.get(key).and_then(Value::as_object).ok_or_else(|| self.wrong(key, "an object"))
    }

    /// An object whose values are all of one kind, in the order of the file; empty when missing.
    pub(crate) fn table<T>(
        &self,
        key: &str,
        wanted: &str,
        get: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<(String, T)>> {
        if self.get(key).is_none() {
            return Ok(Vec::new());
        }
        let table = self.object(key)?;
        if table.len() > MAX_LIST {
            return Err(self.wrong(key, format!("an object of at most {MAX_LIST} entries")));
        }
        let entry = |(name, v): (&String, &Value)| match get(v) {
            Some(value) => Ok((name.clone(), value)),
            None => Err(Error::Field {
                path: self.path.into(),
                field: format!("{}{key}[\"{name}\"]", self.prefix),
                value: shorten(&v.to_string()),
                wanted: wanted.into(),
            }),
        };
        table.iter().map(entry).collect()
    }

    fn typed<T>(&self, key: &str, wanted: impl Into<String>, get: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => get(value).map(Some).ok_or_else(|| self.wrong(key, wanted)),
        }
    }
}

pub(crate) fn finite(value: &Value) -> Option<f64> {
    value.as_f64().filter(|x| x.is_finite())
}

pub(crate) fn int_within(value: &Value, low: i64, high: i64) -> Option<i64> {
    value.as_i64().filter(|i| (low..=high).contains(i))
}

fn list<T>(value: &Value, get: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    let items = value.as_array().filter(|items| items.len() <= MAX_LIST)?;
    items.iter().map(get).collect()
}
