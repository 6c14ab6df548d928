//! `lora report`: a page of a run, or of several laid over each other.

use crate::failure::usage;
use crate::out;
use anyhow::Result;
use lora_format::write_atomic;
use lora_report::{REPORT_FILE, Run, page};
use std::path::PathBuf;

/// The flags of `lora report`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folders of runs, going on or over
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Where the page goes; of one run into its folder when absent
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs the verb.
///
/// # Errors
/// A folder that is none of a run, a file of it that is broken, and a page that cannot be written.
pub(crate) fn run(args: &Args) -> Result<()> {
    let runs = args.runs.iter().map(|dir| Run::read(dir)).collect::<Result<Vec<_>, _>>()?;
    let output = match (&args.output, &args.runs[..]) {
        (Some(file), _) => file.clone(),
        (None, [run]) => run.join(REPORT_FILE),
        (None, _) => return Err(usage("--output FILE: say where the page of several runs goes")),
    };
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty());
    if folder.is_some_and(|folder| !folder.is_dir()) {
        return Err(usage(format!("--output {}: there is no such folder; make it first", output.display())));
    }
    write_atomic(&output, page(&runs)?.as_bytes())?;
    out::line(output.display().to_string())
}
