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
mod train_log;
mod train_view;

use clap::Parser;
use lora_torch::keep_freed_memory;
use std::process::ExitCode;

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
    match keep_freed_memory().map_err(Into::into).and_then(|()| cmd::run(cli.verb)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}
