//! `interop`: our files in PEFT, transformers, llama.cpp and TensorBoard, and theirs in ours.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::cargo::{Workspace, run as run_command};
use crate::{python, setup};

/// Builds `lora` and hands it to the reference script.
pub fn run(ws: &Workspace, python: Option<&Path>, table: Option<&Path>, families: &[String]) -> Result<()> {
    setup::ensure(ws)?;
    let lora = ws.build_lora()?;
    let work = ws.target()?.join("interop");
    let python = python::reference(python, &work, &ws.root.join(".libtorch-cache"), &python::PEFT)?;
    let mut script = Command::new(python);
    script.arg(ws.root.join("tests/reference/interop.py"));
    script.arg("--lora").arg(lora);
    script.arg("--fixtures").arg(ws.root.join("tests/fixtures"));
    script.arg("--work").arg(work.join("work"));
    if let Some(table) = table {
        script.arg("--table").arg(table);
    }
    run_command(script.args(families))
}

/// Builds `lora` and hands it to the script that reads its GGUF files with llama.cpp; `real` are model folders with a
/// `golden.json` of prompts.
pub fn gguf(ws: &Workspace, python: Option<&Path>, real: &[PathBuf]) -> Result<()> {
    setup::ensure(ws)?;
    let lora = ws.build_lora()?;
    let work = ws.target()?.join("interop");
    let python = python::reference(python, &work, &ws.root.join(".libtorch-cache"), &python::LLAMA_CPP)?;
    let mut script = Command::new(python);
    script.arg(ws.root.join("tests/reference/gguf_check.py"));
    script.arg("--lora").arg(lora);
    script.arg("--fixtures").arg(ws.root.join("tests/fixtures"));
    script.arg("--work").arg(work.join("gguf"));
    real.iter().for_each(|model| {
        script.arg("--real").arg(model);
    });
    run_command(&mut script)
}

/// Builds `lora` and hands it to the script that reads its event files with TensorBoard.
pub fn tensorboard(ws: &Workspace, python: Option<&Path>) -> Result<()> {
    setup::ensure(ws)?;
    let lora = ws.build_lora()?;
    let work = ws.target()?.join("interop");
    let python = python::reference(python, &work, &ws.root.join(".libtorch-cache"), &python::TENSORBOARD)?;
    let mut script = Command::new(python);
    script.arg(ws.root.join("tests/reference/tensorboard_check.py"));
    script.arg("--lora").arg(lora);
    script.arg("--fixtures").arg(ws.root.join("tests/fixtures"));
    script.arg("--work").arg(work.join("tensorboard"));
    run_command(&mut script)
}
