//! Writes an event file: scalars by step, and texts.

use super::proto::{Message, field};
use super::records::framed;
use crate::error::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What every event file's name begins with.
const PREFIX: &str = "events.out.tfevents.";
/// The first event of a file says which form it has.
const VERSION: &str = "brain.Event:2";

/// `SessionLog.START`: what an earlier file has of this step and later ones does not count.
const START: u64 = 1;
/// `DT_STRING`.
const STRING: u64 = 7;

/// Appends to an event file of a run. Every record reaches the system as one write.
#[derive(Debug)]
pub struct EventWriter {
    file: File,
    path: PathBuf,
}

impl EventWriter {
    /// Starts a file for the steps after `step`. The files of earlier parts of the run stay as they are; this one says that
    /// what they have of later steps does not count, which is how TensorBoard itself goes on after a break.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be read or the file cannot be made.
    pub fn start(run_dir: &Path, step: u64) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        // Files are read in the order of their names, and two of one second would have none.
        let time = match newest(run_dir)? {
            Some(newest) => now.max(newest.saturating_add(1)),
            None => now,
        };
        let path = run_dir.join(format!("{PREFIX}{time:010}.{}.{}", host(), std::process::id()));
        let file = OpenOptions::new().append(true).create_new(true).open(&path).map_err(Error::io("create", &path))?;
        let mut writer = Self { file, path };
        writer.write(event(0).bytes(field::FILE_VERSION, VERSION.as_bytes()))?;
        let session = Message::default().integer(field::STATUS, START);
        writer.write(event(step.saturating_add(u64::from(step > 0))).message(field::SESSION_LOG, &session))?;
        Ok(writer)
    }

    /// Appends the values of a step.
    ///
    /// # Errors
    /// [`Error::Io`] when they were not written.
    pub fn scalars<'a>(&mut self, step: u64, values: impl IntoIterator<Item = (&'a str, f64)>) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in values {
            let value = Message::default().bytes(field::TAG, tag.as_bytes()).float(field::SIMPLE_VALUE, value as f32);
            summary = summary.message(field::VALUE, &value);
        }
        self.write(event(step).message(field::SUMMARY, &summary))
    }

    /// Appends a text, which TensorBoard takes for Markdown.
    ///
    /// # Errors
    /// [`Error::Io`] when it was not written.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> Result<()> {
        let plugin = Message::default().bytes(field::PLUGIN_NAME, b"text");
        let metadata = Message::default().message(field::PLUGIN_DATA, &plugin);
        let tensor = Message::default()
            .integer(field::DTYPE, STRING)
            .message(field::SHAPE, &Message::default())
            .bytes(field::STRING_VALUE, text.as_bytes());
        let value = Message::default()
            .bytes(field::TAG, tag.as_bytes())
            .message(field::TENSOR, &tensor)
            .message(field::METADATA, &metadata);
        self.write(event(step).message(field::SUMMARY, &Message::default().message(field::VALUE, &value)))
    }

    fn write(&mut self, event: Message) -> Result<()> {
        self.file.write_all(&framed(&event.into_bytes())).map_err(Error::io("write", &self.path))
    }
}

fn event(step: u64) -> Message {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
    Message::default().double(field::WALL_TIME, now).integer(field::STEP, step)
}

/// The time in the name of the newest event file.
fn newest(dir: &Path) -> Result<Option<u64>> {
    let entries = std::fs::read_dir(dir).map_err(Error::io("read", dir))?;
    let time = |name: &str| name.strip_prefix(PREFIX)?.split('.').next()?.parse::<u64>().ok();
    Ok(entries.flatten().filter_map(|entry| time(entry.file_name().to_str()?)).max())
}

/// The machine's name, for a file's name.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let plain: String = name.trim().chars().filter(|c| c.is_ascii_alphanumeric() || "-_".contains(*c)).collect();
    if plain.is_empty() { "host".into() } else { plain }
}

#[cfg(test)]
mod tests {
    use super::super::read::{ScalarEvent, read_scalars};
    use super::super::records::read_records;
    use super::*;

    fn files(dir: &Path) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files
    }

    #[test]
    fn what_is_written_is_read_and_a_resumed_run_has_no_step_twice() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = EventWriter::start(dir.path(), 0).unwrap();
        first.text(0, "config", "    r = 8 <b>").unwrap();
        for step in 1..=6 {
            first.scalars(step, [("train/loss", 1.0 / step as f64), ("train/lr", 2e-4)]).unwrap();
        }
        first.scalars(4, [("eval/loss", 9.0)]).unwrap();
        // A checkpoint of step 3 was the last; the torn end is that of a kill.
        let path = files(dir.path())[0].clone();
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        let mut second = EventWriter::start(dir.path(), 3).unwrap();
        second.scalars(4, [("train/loss", 40.0)]).unwrap();
        second.scalars(5, [("train/loss", 50.0)]).unwrap();

        let names = files(dir.path());
        assert_eq!(names.len(), 2);
        assert!(names[0] == path && names[1] > path, "{names:?}");
        let loss: Vec<(u64, f32)> = read_scalars(dir.path())
            .unwrap()
            .into_iter()
            .filter(|event| event.tag == "train/loss")
            .map(|event| (event.step, event.value))
            .collect();
        assert_eq!(loss, [(1, 1.0), (2, 0.5), (3, 1.0 / 3.0), (4, 40.0), (5, 50.0)]);
    }

    #[test]
    fn a_run_that_begins_again_leaves_nothing_of_the_first_attempt() {
        let dir = tempfile::tempdir().unwrap();
        EventWriter::start(dir.path(), 0).unwrap().scalars(0, [("eval/loss", 1.0)]).unwrap();
        EventWriter::start(dir.path(), 0).unwrap().scalars(0, [("eval/loss", 2.0)]).unwrap();
        let scalars = read_scalars(dir.path()).unwrap();
        assert_eq!(scalars, [ScalarEvent { tag: "eval/loss".into(), step: 0, value: 2.0 }]);
    }

    #[test]
    fn a_file_begins_with_its_version() {
        let dir = tempfile::tempdir().unwrap();
        drop(EventWriter::start(dir.path(), 0).unwrap());
        let records = read_records(&files(dir.path())[0]).unwrap();
        assert_eq!(records.len(), 2);
        assert!(records[0].0.ends_with(b"\x1a\x0dbrain.Event:2"));
        assert!(records[1].0.ends_with(b"\x3a\x02\x08\x01"));
    }

    #[test]
    fn a_full_disk_is_an_error_that_names_the_file() {
        let mut writer = EventWriter { file: File::options().write(true).open("/dev/full").unwrap(), path: "x".into() };
        let e = writer.scalars(1, [("a", 1.0)]).unwrap_err();
        assert!(!e.is_usage() && e.to_string().contains("cannot write x"), "{e}");
    }
}
