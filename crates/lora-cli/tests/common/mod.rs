//! Running the binary in a folder of its own.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test file uses a part; a helper that fails is a failed test

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// A folder with a small dataset over a fixture model.
pub struct Place {
    dir: tempfile::TempDir,
}

/// What a command came to.
#[derive(Debug)]
pub struct Done {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// The folder of the golden fixtures.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name).canonicalize().unwrap()
}

impl Place {
    /// A new folder with `train.jsonl`: 48 questions of which the answer is a letter three times.
    pub fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        let line = |i: usize| {
            let letter = char::from(b'a' + (i * 5 % 26) as u8);
            format!("{{\"prompt\": \"say {letter} {i}: \", \"completion\": \"{letter}{letter}{letter}\"}}\n")
        };
        place.write("train.jsonl", &(0..48).map(line).collect::<String>());
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    /// A configuration for a run of some steps in `run`, with more lines for its sections.
    pub fn config(&self, name: &str, model: &Path, data: &str, lora: &str, train: &str) -> PathBuf {
        let text = format!(
            "output_dir = \"run\"\n[model]\npath = {model:?}\ndevice = \"cpu\"\nthreads = 1\n[data]\ntrain = {data:?}\nmax_length = 64\n\
             [lora]\nr = 4\n{lora}\n[train]\nper_device_train_batch_size = 4\n{train}\n"
        );
        self.write(name, &text)
    }

    /// A copy of a fixture model.
    pub fn copy_of(&self, fixture_name: &str) -> PathBuf {
        let to = self.path("model");
        std::fs::create_dir_all(&to).unwrap();
        for entry in std::fs::read_dir(fixture(fixture_name)).unwrap().flatten().filter(|e| e.path().is_file()) {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
        to
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lora"));
        command.args(words).current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    /// Runs the words of a command line, which are split at spaces.
    pub fn lora(&self, line: &str) -> Done {
        self.lora_words(&line.split(' ').collect::<Vec<_>>())
    }

    pub fn lora_words(&self, words: &[&str]) -> Done {
        Done::of(self.command(words).output().unwrap())
    }

    pub fn spawn(&self, line: &str) -> Child {
        let words: Vec<&str> = line.split(' ').collect();
        self.command(&words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    pub fn lora_with_stdin(&self, line: &str, stdin: &str) -> Done {
        let words: Vec<&str> = line.split(' ').collect();
        std::fs::write(self.path("stdin"), stdin).unwrap();
        let file = std::fs::File::open(self.path("stdin")).unwrap();
        Done::of(self.command(&words).stdin(file).output().unwrap())
    }
}

impl Done {
    pub fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The exit code is this, and nothing panicked.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
        self
    }

    /// stderr has all of these.
    #[track_caller]
    pub fn says(self, words: &[&str]) -> Self {
        for word in words {
            assert!(self.stderr.contains(word), "`{word}` is not in {self:#?}");
        }
        self
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:#?}"))
    }
}
