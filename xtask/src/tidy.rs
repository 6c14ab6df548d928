//! `tidy`: the workspace's rules that the compiler does not check.

mod code;
mod packages;
mod pages;
mod sources;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cargo::Workspace;
use crate::fixtures;

/// Where sources lie; what is made while working lies elsewhere.
const FOLDERS: [&str; 8] = ["crates", "xtask", "tests", "docs", "examples", ".ci", ".cargo", ".github"];

/// A breach of a rule.
#[derive(Debug, PartialEq)]
pub struct Finding {
    pub path: String,
    /// Counted from 1; 0 means the whole file.
    pub line: usize,
    pub message: String,
    /// Said, but no failure.
    pub warning: bool,
}

impl Finding {
    fn new(path: &str, line: usize, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, message: message.into(), warning: false }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.warning { "warning: " } else { "" };
        match self.line {
            0 => write!(f, "{kind}{}: {}", self.path, self.message),
            line => write!(f, "{kind}{}:{line}: {}", self.path, self.message),
        }
    }
}

/// Checks all rules and prints every breach.
pub fn run(ws: &Workspace) -> Result<()> {
    let mut findings = Vec::new();
    let files = files(&ws.root)?;
    for path in &files {
        let Ok(text) = fs::read_to_string(ws.root.join(path)) else { continue };
        findings.extend(sources::check(path, &text));
        findings.extend(pages::links(&ws.root, path, &text));
    }
    let metadata = ws.metadata(&["--locked", "--filter-platform", "x86_64-unknown-linux-gnu"])?;
    findings.extend(packages::directions(&metadata));
    let deny = fs::read_to_string(ws.root.join("deny.toml")).context("cannot read deny.toml")?;
    findings.extend(packages::licences(&metadata, &deny)?);
    findings.extend(packages::lints(&metadata));
    let changelog = fs::read_to_string(ws.root.join("CHANGELOG.md")).unwrap_or_default();
    findings.extend(pages::changelog(&changelog, env!("CARGO_PKG_VERSION")));
    if let Err(error) = fixtures::check(&ws.root.join("tests/fixtures")) {
        findings.push(Finding::new("tests/fixtures", 0, format!("{error:#}")));
    }

    for finding in &findings {
        eprintln!("{finding}");
    }
    let faults = findings.iter().filter(|finding| !finding.warning).count();
    if faults > 0 {
        bail!("tidy found {faults} faults");
    }
    println!("tidy: {} files agree with the rules", files.len());
    Ok(())
}

/// The text files that rules apply to, relative to the root; the golden fixtures are data.
fn files(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut open: Vec<PathBuf> = FOLDERS.iter().map(|folder| root.join(folder)).filter(|path| path.is_dir()).collect();
    for entry in fs::read_dir(root)?.flatten().filter(|entry| entry.path().is_file()) {
        found.push(entry.path());
    }
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() && !matches!(name.as_str(), "target" | "fixtures" | "book" | "__pycache__" | ".venv") {
                open.push(path);
            } else if path.is_file() {
                found.push(path);
            }
        }
    }
    let relative = found.iter().filter_map(|path| path.strip_prefix(root).ok());
    let mut names: Vec<_> = relative.map(|path| path.to_string_lossy().into_owned()).collect();
    names.retain(|name| name != "Cargo.lock");
    names.sort();
    Ok(names)
}
