//! `ci`: what must pass before a change lands.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::cargo::{self, Workspace};
use crate::{layout, setup, tidy};

/// Runs the steps in order and stops at the first that fails. The tests come last, so that cargo's own summary ends
/// the output; everything is built in the release profile, so that it is built once.
pub fn run(ws: &Workspace, test: bool) -> Result<()> {
    step("setup", || setup::ensure(ws))?;
    step("fmt", || cargo::run(ws.cargo().args(["fmt", "--all", "--check"])))?;
    step("tidy", || tidy::run(ws))?;
    step("layout", || layout::run(ws))?;
    let clippy = ["clippy", "--release", "--workspace", "--all-targets", "--", "-D", "warnings"];
    step("clippy", || cargo::run(ws.cargo().args(clippy)))?;
    let doc = ["doc", "--release", "--workspace", "--no-deps"];
    step("doc", || cargo::run(ws.cargo().args(doc).env("RUSTDOCFLAGS", "-D warnings")))?;
    if test {
        eprintln!("== test");
        cargo::replace(ws.cargo().args(["test", "--release", "--workspace"]))?;
    }
    Ok(())
}

fn step(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    eprintln!("== {name}");
    work().with_context(|| format!("step `{name}`"))?;
    eprintln!("== {name}: {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}
