//! The processes that this one was started with, by the variables of a launcher.

use anyhow::Result;
use lora_torch::distributed::{Gloo, Launch};
use lora_torch::{DeviceChoice, resolve_device};
use lora_train::{RunConfig, Team};
use std::collections::BTreeMap;
use std::time::Duration;
use tch::Device;

/// What a launcher set for this process; nothing where it was started alone.
///
/// # Errors
/// Variables that do not fit together.
pub(crate) fn launched() -> Result<Option<Launch>> {
    let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    Ok(Launch::of(&std::env::vars_os().filter_map(text).collect::<BTreeMap<_, _>>())?)
}

/// Meets the others. Of several devices of a machine each process takes its own.
///
/// # Errors
/// Others that do not come.
pub(crate) fn meet(launch: Option<&Launch>, config: &mut RunConfig) -> Result<Team> {
    let Some(launch) = launch else { return Ok(Team::default()) };
    if ["auto", "cuda"].contains(&config.model.device.as_str())
        && resolve_device(config.model.device.parse::<DeviceChoice>()?)? != Device::Cpu
    {
        config.model.device = format!("cuda:{}", launch.local_rank);
    }
    Ok(Team::of(Gloo::connect(launch, Duration::from_secs(config.train.ddp_timeout))?))
}
