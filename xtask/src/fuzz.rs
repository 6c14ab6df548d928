//! `fuzz`: hostile input for every way into the data pipeline, by mutation of the corpus or led by coverage.
//!
//! libFuzzer needs a program that counts which of its edges are taken. The compiler's own pass for that is reached through
//! flags of the stable compiler, so neither `cargo fuzz` nor a nightly is needed; sanitizers, which need one, are left out:
//! the crates that are fuzzed have no `unsafe` but the mapping of files.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::cargo::{Workspace, capture, run as run_command};
use crate::setup;

/// Counters, the table of places, and what comparisons compare, as `cargo fuzz` asks for them.
const COVERAGE: [&str; 7] = [
    "--cfg=fuzzing",
    "-Ccodegen-units=1",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// No input may take more memory, or more time.
const MEMORY_MB: u32 = 1024;
const SECONDS_EACH: u32 = 20;
/// Longer input only repeats what shorter input does.
const LONGEST: u32 = 16384;

/// How it is fuzzed.
#[derive(clap::Args)]
pub struct Args {
    /// Mutations of every file of the corpus, without libFuzzer
    #[arg(long, default_value_t = 2000)]
    runs: u32,
    /// Let libFuzzer look for input that reaches new code, for so long with each target
    #[arg(long, conflicts_with = "runs")]
    seconds: Option<u32>,
    /// Only this target; of libFuzzer
    #[arg(long, requires = "seconds")]
    target: Option<String>,
}

/// Runs the targets.
pub fn run(ws: &Workspace, args: &Args) -> Result<()> {
    let Some(seconds) = args.seconds else {
        setup::ensure(ws)?;
        let test = ["test", "--release", "--workspace", "--test", "fuzz_corpus", "--test", "mutations"];
        return run_command(ws.cargo().args(test).env("LORA_FUZZ_RUNS", args.runs.to_string()));
    };
    let targets = targets(&ws.root.join("fuzz/corpus"))?;
    if let Some(one) = &args.target {
        ensure!(targets.contains(one), "--target {one}: there is no such target; there are {}", targets.join(", "));
    }
    let host = host()?;
    let (built, found) = (ws.target()?.join("fuzz"), ws.target()?.join("fuzz-corpus"));
    let mut build = ws.cargo();
    // With `--target`, programs that run while it is built are not counted.
    build.args(["build", "--release", "--manifest-path", "fuzz/Cargo.toml", "--target", &host, "--target-dir"]);
    build.arg(&built).env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\x1f"));
    run_command(&mut build)?;
    let mut faults = Vec::new();
    for target in targets.iter().filter(|target| args.target.as_ref().is_none_or(|one| one == *target)) {
        let (own, faulty) = (found.join(target), found.join(format!("{target}-faults")));
        std::fs::create_dir_all(&own)?;
        std::fs::create_dir_all(&faulty)?;
        println!("== {target}: {seconds} s");
        let mut fuzz = std::process::Command::new(built.join(&host).join("release").join(target));
        // New input goes into the first folder.
        fuzz.arg(&own).arg(ws.root.join("fuzz/corpus").join(target));
        fuzz.arg(format!("-max_total_time={seconds}")).arg(format!("-rss_limit_mb={MEMORY_MB}"));
        fuzz.arg(format!("-timeout={SECONDS_EACH}")).arg(format!("-max_len={LONGEST}")).arg("-print_final_stats=1");
        fuzz.arg(format!("-artifact_prefix={}/", faulty.display()));
        if !fuzz.status().with_context(|| format!("cannot start {target}"))?.success() {
            faults.push(format!("{target} (input in {})", faulty.display()));
        }
    }
    if !faults.is_empty() {
        bail!("faults were found: {}; put the input into fuzz/corpus, where the tests replay it", faults.join(", "));
    }
    Ok(())
}

/// Every target has a folder of its name in the corpus.
fn targets(corpus: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(corpus).with_context(|| format!("cannot list {}", corpus.display()))?;
    let mut names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

/// The machine that the compiler compiles for.
fn host() -> Result<String> {
    let text = capture(std::process::Command::new("rustc").arg("-vV"))?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: ")).context("`rustc -vV` names no host")?;
    Ok(host.to_owned())
}
