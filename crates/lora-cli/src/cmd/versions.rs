//! `lora versions`: what a watch has trained.

use crate::failure::usage;
use crate::out;
use anyhow::Result;
use lora_train::{Version, Versions, version_name};
use serde::Serialize;
use std::path::PathBuf;

/// The flags of `lora versions`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the watch (output_dir)
    #[arg(value_name = "OUT")]
    dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// All of it, for programs.
#[derive(Serialize)]
struct Listed {
    current: Option<u64>,
    versions: Vec<Version>,
}

/// Runs the verb.
///
/// # Errors
/// A folder without versions, and a record of one that cannot be read.
pub(crate) fn run(args: &Args) -> Result<()> {
    let folder = Versions::new(&args.dir);
    let (current, versions) = (folder.current()?, folder.list()?);
    if versions.is_empty() {
        let dir = args.dir.display();
        return Err(usage(format!(
            "{dir}: there are no versions; `lora train CONFIG --watch DIR` makes them in output_dir"
        )));
    }
    match args.json {
        true => out::json(&Listed { current, versions }),
        false => out::line(table(&versions, current).join("\n")),
    }
}

/// A line for each version, the one that counts marked.
pub(crate) fn table(versions: &[Version], current: Option<u64>) -> Vec<String> {
    if versions.is_empty() {
        return Vec::new();
    }
    let loss = |loss: Option<f64>| loss.map_or("-".to_string(), |loss| format!("{loss:.6}"));
    let mut lines = vec!["  version  parent  before    after     steps  files".to_string()];
    for version in versions {
        let mark = if current == Some(version.version) { '*' } else { ' ' };
        let (number, parent) = (version_name(version.version), version.parent.map_or("-".to_string(), version_name));
        let (before, after) = (loss(version.eval_loss_before), loss(version.eval_loss));
        let files: Vec<&str> = version.files.iter().map(|file| file.name.as_str()).collect();
        let why = version.rejected.as_ref().map(|reason| format!("  not published: {reason}")).unwrap_or_default();
        let (steps, files) = (version.steps, files.join(", "));
        lines.push(format!("{mark} {number:<7}  {parent:<6}  {before:<8}  {after:<8}  {steps:>5}  {files}{why}"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_train::TakenFile;

    #[test]
    fn the_one_that_counts_is_marked_and_reasons_are_told() {
        let file = TakenFile { name: "a.jsonl".into(), sha256: "00".into(), bytes: 1 };
        let first = Version {
            version: 1,
            parent: None,
            files: vec![file],
            steps: 12,
            eval_loss_before: Some(2.0),
            eval_loss: Some(1.5),
            rejected: None,
            finished_at: 0,
        };
        let second =
            Version { version: 2, parent: Some(1), eval_loss: None, rejected: Some("worse".into()), ..first.clone() };
        let lines = table(&[first, second], Some(1));
        assert_eq!(lines[1], "* 0001     -       2.000000  1.500000     12  a.jsonl");
        assert_eq!(lines[2], "  0002     0001    2.000000  -            12  a.jsonl  not published: worse");
        assert!(table(&[], None).is_empty());
    }
}
