//! Whether a run may go on from a checkpoint.

use super::manifest::RunIdentity;
use crate::error::{Error, Result};
use crate::plan::EVAL_DATA;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Keys whose change does not make it another run: they may be changed at a resume when the user says so.
const HARMLESS: &[&str] = &[
    "train.max_steps",
    "train.num_train_epochs",
    "train.max_time",
    "train.save_steps",
    "train.save_total_limit",
    "train.gradient_checkpointing",
    "train.recompute_layers",
    "train.accumulate_by_block",
    "train.logging_steps",
    "train.eval_steps",
    "train.per_device_eval_batch_size",
    "data.eval",
    EVAL_DATA,
];

/// Keys that only say where something lies; a digest stands for what lies there.
const PLACES: &[&str] = &["output_dir", "model.path", "data.hub_cache", "data.cache", "data.cache_dir"];

/// Keys of what a run tells, or of how its processes look after each other, and not of what it does.
const TELLING: &[&str] = &[
    "train.sample_prompts",
    "train.sample_count",
    "train.sample_max_new_tokens",
    "watch.interval",
    "watch.eval_tolerance",
    "watch.replay_share",
    "train.ddp_timeout",
    "train.ddp_check_steps",
];

/// Keys that say the same as a field of [`RunIdentity`], as they were asked for and not as they came out.
const RESOLVED: &[&str] = &["model.device", "model.threads"];

/// Fields that may differ where a run goes on with another number of processes, or with a model that is divided otherwise: its
/// result is then the same within rounding.
const FOLLOWS_WORLD: &[&str] = &["world_size", "threads", STAGES];
const STAGES: &str = "train.pipeline_stages";

/// One field that differs between the checkpoint and the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The key of the configuration, or the field of the manifest.
    pub field: String,
    /// What the checkpoint has; `None` when it has none.
    pub old: Option<String>,
    /// What the run has; `None` when it has none.
    pub new: Option<String>,
    /// Whether the user may ask for the change.
    pub harmless: bool,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".into());
        let mark = if self.harmless { "*" } else { "" };
        write!(f, "{}{mark} was {} and is {}", self.field, shown(&self.old), shown(&self.new))
    }
}

/// Compares the run of a checkpoint with the one that is to go on from it. `allowed` are the keys that the user set for this
/// start on the command line: of the harmless ones (how long the run is, when it saves, logs and evaluates, what it keeps in memory) a change is then
/// meant, and it is returned so that it can be told. A longer run changes what the schedule still does, never what was done.
///
/// # Errors
/// [`Error::ResumeMismatch`] with every field that differs and may not.
pub fn compare_for_resume(old: &RunIdentity, new: &RunIdentity, allowed: &[String]) -> Result<Vec<Difference>> {
    let mut differences = Vec::new();
    let no_prefix = |key: &str| key.to_string();
    compare(&old.config, &new.config, no_prefix, &mut differences);
    differences.retain(|d| ![PLACES, RESOLVED, TELLING].iter().any(|keys| keys.contains(&d.field.as_str())));
    compare(&old.digests, &new.digests, digest_of, &mut differences);
    compare(&fields(old), &fields(new), no_prefix, &mut differences);

    // Any number of processes takes the same rows in the same order, and they share the machine's threads.
    let resized = old.world_size != new.world_size || old.config.get(STAGES) != new.config.get(STAGES);
    let is_allowed = |d: &Difference| {
        (resized && FOLLOWS_WORLD.contains(&d.field.as_str()))
            || d.harmless && allowed.iter().any(|key| *key == d.field || replaces(key, &d.field))
    };
    let (taken, refused): (Vec<_>, Vec<_>) = differences.into_iter().partition(is_allowed);
    if refused.is_empty() { Ok(taken) } else { Err(Error::ResumeMismatch { differences: refused }) }
}

/// Setting one of the lengths of a run takes the other away, and other data to evaluate on has another digest.
fn replaces(key: &str, field: &str) -> bool {
    if key == "data.eval" && field == digest_of(EVAL_DATA) {
        return true;
    }
    let lengths = ["train.max_steps", "train.num_train_epochs"];
    lengths.contains(&key) && lengths.contains(&field)
}

fn digest_of(key: &str) -> String {
    format!("the sha256 of the {key}")
}

fn fields(run: &RunIdentity) -> BTreeMap<String, String> {
    let RunIdentity { libtorch, device, world_size, threads, config: _, digests: _ } = run;
    [
        ("libtorch", libtorch.clone()),
        ("device", device.clone()),
        ("world_size", world_size.to_string()),
        ("threads", threads.to_string()),
    ]
    .map(|(field, value)| (field.to_string(), value))
    .into()
}

fn compare(
    old: &BTreeMap<String, String>,
    new: &BTreeMap<String, String>,
    name: impl Fn(&str) -> String,
    differences: &mut Vec<Difference>,
) {
    let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    for key in keys {
        let (old, new) = (old.get(key), new.get(key));
        if old != new {
            let harmless = HARMLESS.contains(&key.as_str());
            differences.push(Difference { field: name(key), old: old.cloned(), new: new.cloned(), harmless });
        }
    }
}
