//! Running the binary in tests.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A finished command.
#[derive(Debug)]
pub struct Done {
    /// The exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it said.
    pub stderr: String,
}

impl Done {
    /// Takes the output of a command.
    pub fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Requires the exit code, and that nothing panicked.
    ///
    /// # Panics
    /// With all that was printed, when it was another.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert!(self.code == Some(code) && !self.stderr.contains("panicked"), "wanted exit code {code}: {self:#?}");
        self
    }

    /// Requires one of several exit codes, and that nothing panicked.
    ///
    /// # Panics
    /// With all that was printed, when it was another.
    #[track_caller]
    pub fn exits_with(self, codes: &[i32]) -> Self {
        let code = self.code.filter(|code| codes.contains(code));
        self.exits(code.unwrap_or_else(|| codes.first().copied().unwrap_or_default()))
    }

    /// Requires that the message holds each of `parts`.
    ///
    /// # Panics
    /// With the message, when one is missing.
    #[track_caller]
    pub fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "no {part:?} in: {}", self.stderr);
        }
        self
    }
}

/// Runs a program with arguments.
///
/// # Panics
/// When it cannot be started.
pub fn run(program: &str, args: &[&str]) -> Done {
    match Command::new(program).args(args).output() {
        Ok(output) => Done::of(output),
        Err(e) => panic!("{program}: {e}"),
    }
}

/// The committed fixtures.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// Whether a program is there; says loudly when it is not.
pub fn has_program(name: &str) -> bool {
    let there = Command::new(name).arg("--version").output().is_ok();
    if !there {
        #[allow(clippy::print_stderr)]
        {
            eprintln!("\n=== NOT TESTED: {name} is not installed ===\n");
        }
    }
    there
}

/// Sixteen prompts with answers in the fixtures' vocabulary, as JSONL.
pub fn small_dataset() -> String {
    let row = |i: usize| {
        let (q, a) = (
            ["adds two", "asks a", "answers it", "sentence beside"][i % 4],
            ["matrices", "question", "weight", "user"][i / 4 % 4],
        );
        format!("{{\"prompt\": \"{q} {i}: \", \"completion\": \"the {a} is {}\"}}\n", i * 3 % 7)
    };
    (0..16).map(row).collect()
}
