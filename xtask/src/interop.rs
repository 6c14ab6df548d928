//! `interop`: our files in PEFT and transformers, and theirs in ours.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::cargo::{Workspace, run as run_command};
use crate::{python, setup};

/// Builds `lora` and hands it to the reference script.
pub fn run(ws: &Workspace, python: Option<&Path>, families: &[String]) -> Result<()> {
    setup::ensure(ws)?;
    let lora = ws.build_lora()?;
    let work = ws.target()?.join("interop");
    let python = python::reference(python, &work, &ws.root.join(".libtorch-cache"))?;
    let mut script = Command::new(python);
    script.arg(ws.root.join("tests/reference/interop.py"));
    script.arg("--lora").arg(lora);
    script.arg("--fixtures").arg(ws.root.join("tests/fixtures"));
    script.arg("--work").arg(work.join("work"));
    run_command(script.args(families))
}
