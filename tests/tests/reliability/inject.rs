//! Faults at the calls that a run makes of the system, by `strace`.

use crate::lab::{LORA, Lab};
use e2e::{Done, has_program};
use std::process::Command;

/// The calls by which files and folders come to be, change and go.
pub const WRITES: &[&str] = &["write", "ftruncate", "sync_file_range"];
pub const SYNCS: &[&str] = &["fsync", "fdatasync"];
pub const NAMES: &[&str] = &["openat", "mkdir", "rename", "renameat", "unlink", "unlinkat", "flock", "statfs"];

/// A call of the run's main thread that touches its folder.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    pub name: String,
    /// Its place among the calls of that name, from 1.
    pub nth: usize,
    /// As `strace` shows it.
    pub text: String,
}

/// What the tests of this kind need; says so where it is missing.
pub fn strace() -> Option<&'static str> {
    has_program("strace").then_some("strace")
}

pub const NEEDS_STRACE: &str = "strace is not installed (apt-get install strace)";

/// Starts the run under `strace` with further arguments for it. It follows the main thread, which alone touches the
/// run's folder, and counts calls by that thread.
pub fn traced(lab: &Lab, output: &str, strace_args: &[&str], more: &[&str]) -> Command {
    let mut command = Command::new("strace");
    command.arg("-qq").args(strace_args).arg(LORA).args(lab.args(output, more));
    command
}

/// The calls of these names that a run makes in its folder, in order.
pub fn calls(lab: &Lab, output: &str, more: &[&str], names: &[&str]) -> Vec<Call> {
    let trace = lab.path("trace").display().to_string();
    let set = format!("trace={}", names.join(","));
    Done::of(traced(lab, output, &["-y", "-s", "16", "-o", &trace, "-e", &set], more).output().unwrap()).exits(0);
    let folder = lab.path(output).display().to_string();
    let mut counts = std::collections::BTreeMap::new();
    let mut calls = Vec::new();
    for line in std::fs::read_to_string(&trace).unwrap().lines() {
        let Some((name, _)) = line.split_once('(').filter(|(name, _)| names.contains(name)) else { continue };
        let nth = counts.entry(name.to_string()).or_insert(0);
        *nth += 1;
        if line.contains(&folder) {
            calls.push(Call { name: name.into(), nth: *nth, text: line.replace(&folder, "RUN") });
        }
    }
    assert!(calls.len() > 20, "{calls:#?}");
    calls
}

/// Every call, or a sample of so many, the last ones of each name among them.
pub fn sample(calls: Vec<Call>, most: usize) -> Vec<Call> {
    let every = calls.len().div_ceil(most);
    calls.into_iter().rev().step_by(every).collect()
}

/// Runs with a fault at a call: `signal=KILL` or `error=EIO`.
pub fn with_fault(lab: &Lab, output: &str, call: &Call, fault: &str, more: &[&str]) -> Done {
    let inject = format!("inject={}:{fault}:when={}", call.name, call.nth);
    let set = format!("trace={}", call.name);
    let output = traced(lab, output, &["-o", "/dev/null", "-e", &set, "-e", &inject], more).output().unwrap();
    Done::of(output)
}
