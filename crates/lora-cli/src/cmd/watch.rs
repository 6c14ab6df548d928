//! `lora train --watch`: rounds of training on files as they arrive.

use crate::cmd::versions::table;
use crate::failure::usage;
use crate::interrupt::stop_on_signals;
use crate::out;
use crate::train_log::View;
use anyhow::Result;
use lora_train::config::FaultKind;
use lora_train::{ConfigErrors, Override, RunConfig, WatchOptions, WatchReport, watch};
use std::path::Path;

/// The configuration of a watch. `data.train` says how the files are read, and where it is absent they are read as they are.
///
/// # Errors
/// As [`RunConfig::load`].
pub(crate) fn configuration(file: Option<&Path>, dir: &Path, overrides: &[Override]) -> Result<RunConfig> {
    let absent = |e: &ConfigErrors| {
        let of_data = |key: &str| key == "data.train";
        e.faults().iter().any(|f| of_data(&f.key) && matches!(f.kind, FaultKind::Missing { .. }))
    };
    match RunConfig::load(file, overrides) {
        Err(e) if absent(&e) => {
            let text =
                dir.to_str().ok_or_else(|| usage(format!("--watch {}: the path must be UTF-8", dir.display())))?;
            let mut all = overrides.to_vec();
            all.push(Override::text("data.train", text));
            Ok(RunConfig::load(file, &all)?)
        }
        loaded => Ok(loaded?),
    }
}

/// Watches until it is asked to stop, or until all is taken up.
///
/// # Errors
/// What the watch reports.
pub(crate) fn run(config: RunConfig, options: &WatchOptions, mut view: View, json: bool) -> Result<()> {
    let stop = stop_on_signals()?;
    let report = watch(config, options, &stop, &mut view);
    view.finish();
    let report = report?;
    if json { out::json(&report) } else { out::line(closing(&report)) }
}

/// What came of it, and what to type next.
fn closing(report: &WatchReport) -> String {
    let out_dir = report.output_dir.display();
    let mut lines =
        vec![format!("{}: {} rounds, {} files refused", report.status, report.rounds.len(), report.refused.len())];
    lines.extend(table(&report.rounds, report.current));
    match report.current {
        Some(_) => lines.push(format!("adapter      {out_dir}/current")),
        None => lines.push("nothing is published yet".to_string()),
    }
    lines.push(format!("see all      lora versions {out_dir}"));
    lines.join("\n")
}
