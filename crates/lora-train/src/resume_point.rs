//! Where a run goes on: found and compared before a weight is read.

use crate::checkpoint::{Found, RunIdentity, compare_for_resume, find_checkpoint};
use crate::error::{Error, Result};
use crate::events::{Event, EventSink};
use crate::plan::RunPlan;
use crate::team::Team;
use lora_torch::{device_name, libtorch_version, num_threads};

/// The newest good checkpoint of the run's folder, which must be of this run. `allowed` are keys that the user changed on
/// purpose.
///
/// # Errors
/// [`Error::NothingToResume`] when there is none, [`Error::ResumeMismatch`] when it belongs to another run.
pub(crate) fn find_resume_point(
    plan: &RunPlan,
    team: &Team,
    allowed: &[String],
    sink: &mut dyn EventSink,
) -> Result<Found> {
    let run_dir = &plan.config.output_dir;
    let found = find_checkpoint(run_dir)?.ok_or_else(|| Error::NothingToResume { path: run_dir.clone() })?;
    for (path, reason) in &found.quarantined {
        sink.event(Event::Note(format!("a damaged checkpoint was put aside as {}: {reason}", path.display())));
    }
    for change in compare_for_resume(&found.manifest.run, &identity(plan, team)?, allowed)? {
        sink.event(Event::Note(format!("resuming with a change: {change}")));
    }
    Ok(found)
}

/// What a checkpoint says of the run that it belongs to.
pub(crate) fn identity(plan: &RunPlan, team: &Team) -> Result<RunIdentity> {
    Ok(RunIdentity {
        config: plan.config.flat()?,
        digests: plan.digests.clone(),
        libtorch: libtorch_version().into(),
        device: device_name(plan.device),
        world_size: team.world(),
        threads: num_threads() as u32,
    })
}
