//! `fixtures`: the golden files against their manifest, and against the reference that made them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::cargo::{Workspace, run as run_command};
use crate::hash::sha256;
use crate::python;

const MANIFEST: &str = "MANIFEST.sha256";

/// How many differences a message names.
const SHOWN: usize = 8;

/// Path below the fixtures -> sha256.
type Manifest = BTreeMap<String, String>;

/// The verb.
pub fn run(ws: &Workspace, update: bool, regenerate: bool, python: Option<&Path>) -> Result<()> {
    let folder = ws.root.join("tests/fixtures");
    if regenerate {
        self::regenerate(ws, &folder, update, python)?;
    }
    if update {
        let files = scan(&folder)?;
        let text: String = files.iter().map(|(path, digest)| format!("{digest}  {path}\n")).collect();
        fs::write(folder.join(MANIFEST), text)?;
    }
    println!("{} fixtures agree with {MANIFEST}", check(&folder)?);
    Ok(())
}

/// Checks every file against the manifest, both ways, and returns how many there are.
pub fn check(folder: &Path) -> Result<usize> {
    let path = folder.join(MANIFEST);
    let text = fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}; `cargo xtask fixtures --update` writes it", path.display()))?;
    let listed = parse(&text)?;
    let found = scan(folder)?;
    let mut faults = Vec::new();
    for (path, digest) in &listed {
        match found.get(path) {
            None => faults.push(format!("{path} is missing")),
            Some(other) if other != digest => faults.push(format!("{path} has changed")),
            Some(_) => {}
        }
    }
    faults.extend(found.keys().filter(|path| !listed.contains_key(*path)).map(|path| format!("{path} is not listed")));
    if !faults.is_empty() {
        let more = if faults.len() > SHOWN { format!(" and {} more", faults.len() - SHOWN) } else { String::new() };
        faults.truncate(SHOWN);
        bail!(
            "tests/fixtures does not agree with {MANIFEST}: {}{more}; if that is meant, run `cargo xtask fixtures --update`",
            faults.join(", ")
        );
    }
    Ok(found.len())
}

/// Reads the lines that `sha256sum` writes.
fn parse(text: &str) -> Result<Manifest> {
    let mut manifest = Manifest::new();
    for (number, line) in text.lines().enumerate() {
        let row = line.split_once("  ").filter(|(digest, path)| {
            digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit()) && !path.is_empty()
        });
        let Some((digest, path)) = row else { bail!("{MANIFEST} line {}: no `SHA256  PATH`: {line:?}", number + 1) };
        let twice = manifest.insert(path.to_owned(), digest.to_lowercase()).is_some();
        ensure!(!twice, "{MANIFEST} line {}: {path} is listed twice", number + 1);
    }
    Ok(manifest)
}

/// Digests of all files below a folder, the manifest itself excepted.
fn scan(folder: &Path) -> Result<Manifest> {
    let mut manifest = Manifest::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(current) = open.pop() {
        let entries = fs::read_dir(&current).with_context(|| format!("cannot read {}", current.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
                continue;
            }
            let name = path.strip_prefix(folder)?.to_string_lossy().into_owned();
            if name != MANIFEST {
                manifest.insert(name, sha256(&path)?);
            }
        }
    }
    Ok(manifest)
}

/// Runs the reference script and compares what it writes with the fixtures; `take` copies it over them.
fn regenerate(ws: &Workspace, folder: &Path, take: bool, python: Option<&Path>) -> Result<()> {
    let target = ws.target()?;
    let python = python::reference(python, &target.join("interop"), &ws.root.join(".libtorch-cache"), &python::PEFT)?;
    let out = target.join("fixtures");
    let _ = fs::remove_dir_all(&out);
    let script = ws.root.join("tests/reference/make_fixtures.py");
    run_command(std::process::Command::new(python).arg(script).arg(&out))?;
    let (made, had) = (scan(&out)?, scan(folder)?);
    let differ: Vec<_> =
        made.iter().filter(|(path, digest)| had.get(*path) != Some(digest)).map(|(path, _)| path).collect();
    println!("the reference wrote {} files, {} of them other than the fixtures", made.len(), differ.len());
    for path in differ {
        println!("  {path}");
        if take {
            let to = folder.join(path);
            fs::create_dir_all(to.parent().context("a fixture lies in a folder")?)?;
            fs::copy(out.join(path), to)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("llama")).unwrap();
        fs::write(dir.path().join("llama/config.json"), "{}").unwrap();
        let digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
        fs::write(dir.path().join(MANIFEST), format!("{digest}  llama/config.json\n")).unwrap();
        dir
    }

    #[test]
    fn an_agreeing_manifest_passes() {
        assert_eq!(check(sample().path()).unwrap(), 1);
    }

    #[test]
    fn changed_missing_and_unlisted_files_are_named() {
        let dir = sample();
        fs::write(dir.path().join("llama/config.json"), "{ }").unwrap();
        assert!(check(dir.path()).unwrap_err().to_string().contains("llama/config.json has changed"));
        fs::remove_file(dir.path().join("llama/config.json")).unwrap();
        assert!(check(dir.path()).unwrap_err().to_string().contains("llama/config.json is missing"));
        let dir = sample();
        fs::write(dir.path().join("stray"), "").unwrap();
        assert!(check(dir.path()).unwrap_err().to_string().contains("stray is not listed"));
    }

    #[test]
    fn damaged_manifests_are_refused() {
        let row = format!("{}  a\n", "0".repeat(64));
        assert!(parse(&row.repeat(2)).unwrap_err().to_string().contains("line 2: a is listed twice"));
        for text in ["abc  a", &format!("{} a", "0".repeat(64)), &format!("{}  a", "x".repeat(64))] {
            assert!(parse(text).unwrap_err().to_string().contains("line 1"), "{text}");
        }
    }
}
