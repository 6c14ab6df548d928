//! The key of a set of rows: a digest of everything that has a part in them.
//!
//! Files count by their bytes and not by their times, so that a copied or restored file is found and a changed one never
//! is; a large file that is the very one of before is not read again, see [`super::known`]. Settings count as their `Debug`
//! form, in which no field can be forgotten.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::known::Known;
use super::layout::{Key, LAYOUT};
use crate::clock::Clock;
use crate::dataset::{DataOptions, Prepared};
use crate::error::{DataError, Result};
use crate::read::DataFile;
use crate::source::Source;
use crate::template::ChatTemplate;

const BUFFER: usize = 4 << 20;

/// The key, or in words why the rows cannot be kept.
pub(super) fn of(prepared: &Prepared<'_>, known: &Known<'_>) -> Result<std::result::Result<Key, String>> {
    let mut key = Parts::default();
    key.add("layout", &LAYOUT.to_le_bytes());
    key.add("version", env!("CARGO_PKG_VERSION").as_bytes());
    key.add("tokenizer", prepared.tokenizer.digest().as_bytes());
    // What is refused for its share is decided anew each time.
    let options = DataOptions { max_affected_share: 0.0, ..prepared.options.clone() };
    key.add("options", format!("{options:?}").as_bytes());
    key.add("answers", format!("{:?}", prepared.answers).as_bytes());
    for template in templates(prepared) {
        key.add("template", template.digest().as_bytes());
        match clock(template) {
            Some(clock) => key.add("clock", clock.as_bytes()),
            None => {
                let name = template.name();
                return Ok(Err(format!("the template {name} writes the time of day; set data.template_date")));
            }
        }
    }
    for stream in &prepared.streams {
        // How often a set counts in a mix is not a matter of its rows.
        let source = Source { weight: None, ..stream.source().clone() };
        key.add("source", format!("{source:?}").as_bytes());
        for file in stream.files() {
            let Some(name) = file.path.to_str() else {
                return Ok(Err(format!("the name of {} is not UTF-8", file.path.display())));
            };
            key.add("name", name.as_bytes());
            key.add("kind", format!("{:?} {:?}", file.kind, file.compression).as_bytes());
            key.add("content", content(file, known)?.as_bytes());
        }
    }
    Ok(Ok(*key.hash.finalize().as_bytes()))
}

/// The templates that conversations may be written with.
fn templates<'a>(prepared: &'a Prepared<'_>) -> Vec<&'a ChatTemplate> {
    let own = prepared.own_template.as_ref();
    let tokenizer = prepared.tokenizer;
    [own.or(tokenizer.template()), own.or(tokenizer.tool_template())].into_iter().flatten().collect()
}

/// What a template may see of the time; none when that is more than the day.
fn clock(template: &ChatTemplate) -> Option<String> {
    match (template.writes_date(), template.clock()) {
        (false, _) => Some("not read".to_owned()),
        (true, Clock::Fixed(seconds)) => Some(format!("fixed {seconds}")),
        (true, Clock::System) if template.writes_time_of_day() => None,
        (true, clock) => Some(clock.strftime("%F")),
    }
}

#[derive(Default)]
struct Parts {
    hash: blake3::Hasher,
}

impl Parts {
    /// Each part with its name and length, so that no two lists of parts are the same bytes.
    fn add(&mut self, name: &str, bytes: &[u8]) {
        self.hash.update(name.as_bytes()).update(&[0]).update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    }
}

fn content(file: &DataFile, known: &Known<'_>) -> Result<blake3::Hash> {
    known.digest(&file.path, hash_file).map_err(|source| DataError::Io { path: file.path.clone(), source })
}

/// A digest of a file's bytes, made on all cores; the file is read and not mapped, as others may shorten it.
fn hash_file(path: &Path) -> std::io::Result<blake3::Hash> {
    let mut file = File::open(path)?;
    let mut hash = blake3::Hasher::new();
    let mut part = vec![0; BUFFER];
    loop {
        let mut filled = 0;
        while filled < part.len() {
            match file.read(&mut part[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        if filled == 0 {
            return Ok(hash.finalize());
        }
        hash.update_rayon(&part[..filled]);
    }
}
