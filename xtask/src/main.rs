//! Developer commands of the workspace: `cargo xtask VERB`.
//!
//! Plain `std::process` around cargo, pip and the built programs. Nothing here depends on the project's own
//! crates, so this program builds in seconds on a machine that has no libtorch yet; `setup` gets it.

mod against;
mod against_full;
mod against_peft;
mod bench;
mod cargo;
mod ci;
mod compare;
mod demo;
mod dist;
mod doctor;
mod faults;
mod fixtures;
mod fuzz;
mod gpu_check;
mod hash;
mod interop;
mod layout;
mod processes;
mod progress;
mod python;
mod setup;
mod tidy;
mod wheels;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::cargo::Workspace;

#[derive(Parser)]
#[command(bin_name = "cargo xtask", about = "Developer commands: everything that is more than one cargo call")]
struct Cli {
    /// Work on another copy of the workspace.
    #[arg(long, global = true, hide = true)]
    root: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
#[expect(clippy::large_enum_variant, reason = "there is one, and no list of them")]
enum Verb {
    /// Get libtorch 2.11.0 into .libtorch; does nothing when it is there
    Setup {
        /// Also the CUDA libraries (about 2.5 GB more to fetch)
        #[arg(long)]
        cuda: bool,
        /// Take libtorch from a folder (libtorch, Python torch, or wheels) or from a torch wheel
        #[arg(long, value_name = "DIR|WHEEL")]
        from: Option<PathBuf>,
    },
    /// Say what this machine has and lacks
    Doctor,
    /// Build the `lora` program (release unless --dev)
    Build {
        /// The release profile: the default, accepted for habit
        #[arg(long, conflicts_with = "dev")]
        release: bool,
        /// The dev profile: debug assertions, slow
        #[arg(long)]
        dev: bool,
    },
    /// Run `lora train ARGS`; without arguments `lora demo`. With -n, as so many processes that train together
    Train {
        /// Processes
        #[arg(short = 'n', value_name = "N")]
        ranks: Option<u32>,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run every test of the workspace; arguments go to `cargo test`
    Test {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// What must pass before a change lands: fmt, clippy, tidy, doc, test
    Ci {
        /// Stop before the tests
        #[arg(long)]
        no_test: bool,
    },
    /// Run the benchmarks
    Bench {
        /// Write docs/benchmarks/DATE-REVISION.json and its README.md
        #[arg(long)]
        report: bool,
        /// Compare two reports instead of running anything
        #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["report", "filter"])]
        compare: Option<Vec<PathBuf>>,
        /// Only benchmarks whose id contains this
        filter: Option<String>,
        #[command(flatten)]
        against: against::Args,
        #[command(flatten)]
        full: against_full::Args,
        #[command(flatten)]
        peft: against_peft::Args,
        #[command(flatten)]
        processes: processes::Args,
    },
    /// Check the golden fixtures against their manifest
    Fixtures {
        /// Only check: the default, accepted for habit
        #[arg(long, conflicts_with_all = ["update", "regenerate"])]
        check: bool,
        /// Write the manifest anew
        #[arg(long)]
        update: bool,
        /// Run the reference script into target/fixtures and compare; with --update take its files
        #[arg(long)]
        regenerate: bool,
        /// A Python that has the reference packages, instead of a private environment
        #[arg(long, value_name = "PROGRAM")]
        python: Option<PathBuf>,
    },
    /// Check against PEFT and transformers, both ways
    Interop {
        /// A Python that has the reference packages, instead of a private environment
        #[arg(long, value_name = "PROGRAM")]
        python: Option<PathBuf>,
        /// Write what was found as a Markdown page, too
        #[arg(long, value_name = "FILE")]
        table: Option<PathBuf>,
        /// Check the GGUF files against llama.cpp instead
        #[arg(long)]
        gguf: bool,
        /// Check the event files against TensorBoard instead
        #[arg(long, conflicts_with = "gguf")]
        tensorboard: bool,
        /// Only these model families of the fixtures; with --gguf, folders of real models to compare greedy texts of
        family: Vec<String>,
    },
    /// Throw hostile input at every reader of files: mutations of the corpus and the fixtures, or libFuzzer
    Fuzz(fuzz::Args),
    /// Kill, damage, fill up and interrupt runs, and see that nothing is lost
    Faults(faults::Args),
    /// Check the rules that the compiler does not: dependencies, file lengths, printing, links
    Tidy,
    /// Compare the size of libtorch's ProcessGroupGloo, as the shim is compiled, with what libtorch's own code takes for one
    Layout,
    /// Make target/gpu-check: a folder to carry to a machine with a GPU and Python torch
    GpuCheck {
        /// Crates whose tests go along
        #[arg(short, long, default_value = "lora-torch")]
        package: Vec<String>,
    },
    /// Make the shipped demo anew: its data and, by training, its base model
    DemoBase {
        /// Write the data and the vocabulary only
        #[arg(long)]
        data_only: bool,
    },
    /// Make a portable archive of `lora` with the libraries that it needs
    Dist,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let root = match cli.root {
        Some(root) => std::fs::canonicalize(&root).with_context(|| format!("--root {}", root.display()))?,
        None => Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")?.to_path_buf(),
    };
    let ws = Workspace { root };
    match cli.verb {
        Verb::Setup { cuda, from } => setup::command(&ws, cuda, from.as_deref()),
        Verb::Doctor => doctor::run(&ws),
        Verb::Build { release: _, dev } => {
            setup::ensure(&ws)?;
            let profile: &[&str] = if dev { &[] } else { &["--release"] };
            cargo::run(ws.cargo().args(["build", "--workspace", "--bin", "lora"]).args(profile))
        }
        Verb::Train { ranks, args } => {
            setup::ensure(&ws)?;
            // The user's own folder stays current: the arguments hold paths.
            let mut lora = std::process::Command::new(ws.build_lora()?);
            match (ranks, args.is_empty()) {
                // The demo's configuration, with its rows of a step shared; its paths are those of the workspace.
                (Some(ranks), true) => lora
                    .current_dir(&ws.root)
                    .args(["launch", "-n", &ranks.to_string(), "demo/demo.toml"])
                    .args(["--output", &format!("runs/demo-of-{ranks}")])
                    .args(["--set", &format!("train.gradient_accumulation_steps={ranks}")])
                    .args(["--set", &format!("train.per_device_train_batch_size={}", (16 / ranks).max(1))]),
                (Some(ranks), false) => lora.args(["launch", "-n", &ranks.to_string()]).args(args),
                (None, true) => lora.arg("demo"),
                (None, false) => lora.arg("train").args(args),
            };
            cargo::replace(&mut lora)
        }
        Verb::Test { args } => {
            setup::ensure(&ws)?;
            cargo::replace(ws.cargo().args(["test", "--release", "--workspace"]).args(keep_separator(args)))
        }
        Verb::Ci { no_test } => ci::run(&ws, !no_test),
        Verb::Bench { compare: Some(pair), .. } => compare::run(&pair[0], &pair[1]),
        Verb::Bench { against, peft, .. } if peft.wanted() => against_peft::run(&ws, &peft, &against),
        Verb::Bench { processes, .. } if processes.wanted() => processes::run(&ws, &processes),
        Verb::Bench { against, full, report, filter, .. } => match (against.wanted(), full.wanted()) {
            (_, Some((data, base))) => against_full::run(&ws, &full, data, base),
            (Some((data, model)), None) => against::run(&ws, &against, data, model),
            (None, None) => bench::run(&ws, report, filter.as_deref()),
        },
        Verb::Fixtures { check: _, update, regenerate, python } => {
            fixtures::run(&ws, update, regenerate, python.as_deref())
        }
        Verb::Interop { python, tensorboard: true, .. } => interop::tensorboard(&ws, python.as_deref()),
        Verb::Interop { python, gguf: true, family, .. } => {
            let real: Vec<PathBuf> = family.iter().map(PathBuf::from).collect();
            interop::gguf(&ws, python.as_deref(), &real)
        }
        Verb::Interop { python, table, family, .. } => interop::run(&ws, python.as_deref(), table.as_deref(), &family),
        Verb::Fuzz(args) => fuzz::run(&ws, &args),
        Verb::Faults(args) => faults::run(&ws, &args),
        Verb::Tidy => tidy::run(&ws),
        Verb::Layout => layout::run(&ws),
        Verb::GpuCheck { package } => gpu_check::run(&ws, &package),
        Verb::DemoBase { data_only } => demo::run(&ws, data_only),
        Verb::Dist => dist::run(&ws),
    }
}

/// Puts back the `--` that the argument parser takes from `cargo xtask test -- --nocapture`.
fn keep_separator(mut args: Vec<String>) -> Vec<String> {
    let typed = std::env::args().filter(|a| a == "--").count();
    if typed > args.iter().filter(|a| *a == "--").count() {
        args.insert(0, "--".to_owned());
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn train_hands_every_argument_on() {
        let cli = Cli::parse_from(["xtask", "train", "run.toml", "--set", "seed=1", "--dry-run"]);
        let Verb::Train { ranks: None, args } = cli.verb else { panic!("not train") };
        assert_eq!(args, ["run.toml", "--set", "seed=1", "--dry-run"]);
        let cli = Cli::parse_from(["xtask", "train", "-n", "2", "run.toml", "--resume"]);
        let Verb::Train { ranks: Some(2), args } = cli.verb else { panic!("not two ranks") };
        assert_eq!(args, ["run.toml", "--resume"]);
        let cli = Cli::parse_from(["xtask", "train", "--model", "m"]);
        let Verb::Train { ranks: None, args } = cli.verb else { panic!("not train") };
        assert_eq!(args, ["--model", "m"]);
    }
}
