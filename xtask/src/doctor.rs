//! `doctor`: what this machine has, what it lacks, and what to do about it.

use std::fs;

use anyhow::{Result, bail};

use crate::cargo::{Workspace, first_line};
use crate::setup::{self, Stamp};

/// Prints one line for each thing looked at; fails when something is missing that every build needs.
pub fn run(ws: &Workspace) -> Result<()> {
    let mut missing = Vec::new();
    let mut need = |name: &str, found: Option<String>, remedy: &str| match found {
        Some(found) => row(name, &found),
        None => {
            row(name, "MISSING");
            missing.push(format!("{name}: {remedy}"));
        }
    };

    need("rustc", first_line("rustc", &["--version"]), "install Rust, https://rustup.rs");
    need("cargo", first_line("cargo", &["--version"]), "install Rust, https://rustup.rs");
    need("g++", first_line("g++", &["--version"]), "Debian, Ubuntu: apt-get install g++");
    let libtorch = ws.libtorch();
    match (setup::fault(&libtorch, false), libtorch.exists()) {
        (None, _) => {
            let stamp =
                Stamp::read(&libtorch).map_or("made by hand".to_owned(), |stamp| format!("from {}", stamp.source));
            let digest = setup::stamp_digest(&libtorch).map_or(String::new(), |digest| format!(" (stamp {digest})"));
            need("libtorch", Some(format!("{}, {stamp}{digest}", setup::VERSION)), "");
            let unresolved = setup::unresolved(&libtorch.join("lib/libtorch_cpu.so"));
            let loads = unresolved.as_ref().is_none().then(|| "yes".to_owned());
            need("libtorch loads", loads, &format!("it does not find {}", unresolved.unwrap_or_default()));
        }
        (Some(fault), true) => need("libtorch", None, &format!("{fault}; run `cargo xtask setup`")),
        (Some(_), false) => need("libtorch", None, "run `cargo xtask setup`"),
    }

    // The rest is good to have: setup needs pip only to fetch, and a CPU is enough.
    let absent = |remedy: &str| format!("absent ({remedy})");
    row("python3", &first_line("python3", &["--version"]).unwrap_or_else(|| absent("only needed to fetch libtorch")));
    let pip = first_line("python3", &["-m", "pip", "--version"]);
    row("pip", &pip.unwrap_or_else(|| absent("only needed to fetch libtorch")));
    let cuda = libtorch.join("lib/libtorch_cuda.so").exists();
    row("CUDA libraries", if cuda { "present" } else { "absent (`cargo xtask setup --cuda` fetches them)" });
    let query = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"];
    row("GPU", &first_line("nvidia-smi", &query).unwrap_or_else(|| absent("nvidia-smi does not run")));
    row("cores", &std::thread::available_parallelism().map_or("unknown".to_owned(), |n| n.to_string()));
    row("CPU", &cpu_model());
    row("memory", &memory_gib().map_or("unknown".to_owned(), |gib| format!("{gib:.1} GiB")));
    match setup::free_gb(&ws.root) {
        Ok(free) if free < 5 => row("free disk", &format!("{free} GB: little, a full build takes about 5")),
        Ok(free) => row("free disk", &format!("{free} GB")),
        Err(error) => row("free disk", &format!("unknown ({error:#})")),
    }

    if !missing.is_empty() {
        bail!("missing: {}", missing.join("; "));
    }
    Ok(())
}

fn row(name: &str, value: &str) {
    println!("{name:<16}{value}");
}

/// The processor's name as the kernel gives it.
pub fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or(std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// The machine's memory.
pub fn memory_gib() -> Option<f64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kib: f64 =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim().split(' ').next()?.parse().ok()?;
    Some(kib / 1024.0 / 1024.0)
}
