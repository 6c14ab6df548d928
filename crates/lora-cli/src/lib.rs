//! The `lora` command as a library, so that tests start the very same program.
//!
//! `cli` reads the command line, each file of `cmd` is a verb, `out` is the only place that prints, and `failure` decides
//! the exit code.

mod classes;
mod cli;
mod cmd;
mod compute;
mod estimate;
mod failure;
mod fetching;
mod generator;
mod hub;
mod interrupt;
mod load;
mod machine;
mod out;
mod progress;
mod prompt;
mod serve;
mod summary;
mod team;
mod train_log;
mod train_view;

use anyhow::Context;
use clap::Parser;
use lora_torch::{catching, keep_freed_memory, tell_errors_once};
use rayon::ThreadPoolBuilder;
use std::process::ExitCode;

/// The threads that libraries share for work on data, which they could only panic without.
fn start_threads() -> anyhow::Result<()> {
    let started = ThreadPoolBuilder::new().build_global();
    started.context("cannot start threads; allow more processes or more address space (ulimit -u, ulimit -v)")
}

/// Runs the command line of this process and returns its exit code: 0 done, 1 the run failed, 2 the command line, the
/// configuration or the data is at fault.
pub fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Where the terminal is gone there is nobody to tell.
            let _ = e.print();
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(failure::USAGE));
        }
    };
    tell_errors_once();
    let run = || start_threads().and_then(|()| Ok(keep_freed_memory()?)).and_then(|()| cmd::run(cli.verb));
    match catching(run).map_err(anyhow::Error::from).flatten() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}
