//! Reads the scalars of event files back, by the rules of TensorBoard.

use super::proto::{Value, field, fields};
use super::records::read_records;
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// A value of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct ScalarEvent {
    /// The name of the curve.
    pub tag: String,
    /// The step.
    pub step: u64,
    /// The value.
    pub value: f32,
}

/// The scalars of a folder's event files in the order of their names. Where a session starts at a step, what came before it
/// of this step and of later ones is dropped.
///
/// # Errors
/// What [`read_records`] reports, and [`Error::Broken`] for a record that is no event.
pub fn read_scalars(dir: &Path) -> Result<Vec<ScalarEvent>> {
    let entries = std::fs::read_dir(dir).map_err(Error::io("read", dir))?;
    let is_event = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("events.out.tfevents."))
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_event).collect();
    files.sort();
    let mut all = Vec::new();
    for file in files {
        for record in read_records(&file)? {
            let broken = || Error::Broken { path: file.clone(), reason: "a record is no event".into() };
            take(&record.0, &mut all).ok_or_else(broken)?;
        }
    }
    Ok(all)
}

fn take(event: &[u8], all: &mut Vec<ScalarEvent>) -> Option<()> {
    let event = fields(event)?;
    let step = event.iter().find_map(|(n, value)| match value {
        Value::Integer(step) if *n == field::STEP => Some(*step),
        _ => None,
    });
    let step = step.unwrap_or(0);
    for (number, value) in &event {
        match (*number, value) {
            (field::SESSION_LOG, _) => all.retain(|event| event.step < step),
            (field::SUMMARY, Value::Bytes(summary)) => {
                for (_, value) in fields(summary)? {
                    let Value::Bytes(value) = value else { return None };
                    all.extend(scalar(value, step)?);
                }
            }
            _ => {}
        }
    }
    Some(())
}

/// The scalar in a value of a summary, where it holds one.
fn scalar(value: &[u8], step: u64) -> Option<Option<ScalarEvent>> {
    let (mut tag, mut number) = (None, None);
    for (field, value) in fields(value)? {
        match value {
            Value::Bytes(name) if field == field::TAG => tag = Some(String::from_utf8_lossy(name).into_owned()),
            Value::Float(x) if field == field::SIMPLE_VALUE => number = Some(x),
            _ => {}
        }
    }
    Some(tag.zip(number).map(|(tag, value)| ScalarEvent { tag, step, value }))
}
