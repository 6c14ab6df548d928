//! `gpu-check`: a folder to carry to a machine that has a GPU and Python torch but need not have Rust.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cargo::{Workspace, capture, run as run_command};
use crate::setup;

/// Builds `lora` and the packages' tests, strips copies of them into `target/gpu-check` and puts the script beside them.
pub fn run(ws: &Workspace, packages: &[String]) -> Result<()> {
    setup::ensure(ws)?;
    let lora = ws.build_lora()?;
    let out = ws.target()?.join("gpu-check");
    let _ = fs::remove_dir_all(&out);
    fs::create_dir_all(out.join("tests"))?;
    strip(&lora, &out.join("lora"))?;
    for test in test_programs(ws, packages)? {
        let name = test.file_name().context("a test program has a name")?;
        strip(&test, &out.join("tests").join(name))?;
    }
    let script = out.join("gpu_check.sh");
    fs::write(&script, include_str!("gpu_check.sh"))?;
    println!("{}: run `bash gpu_check.sh MODEL_DIR` there", out.display());
    Ok(())
}

/// Builds the tests of the packages and returns the programs.
fn test_programs(ws: &Workspace, packages: &[String]) -> Result<Vec<PathBuf>> {
    let mut build = ws.cargo();
    build.args(["test", "--release", "--no-run", "--message-format", "json"]);
    for package in packages {
        build.args(["-p", package]);
    }
    let text = capture(&mut build)?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let programs: Vec<_> = messages
        .filter(|m| m["profile"]["test"] == true)
        .filter_map(|m| m["executable"].as_str().map(PathBuf::from))
        .collect();
    ensure!(!programs.is_empty(), "{} have no test programs", packages.join(", "));
    Ok(programs)
}

/// Copies a program without its symbols.
pub fn strip(from: &Path, to: &Path) -> Result<()> {
    run_command(Command::new("strip").arg("-o").arg(to).arg(from))
}
