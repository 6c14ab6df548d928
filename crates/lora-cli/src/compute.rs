//! Where and in what dtype to compute: the flags shared by the verbs that run a model.

use crate::failure::usage;
use anyhow::Result;
use lora_model::ModelConfig;
use lora_torch::{DeviceChoice, parse_kind, resolve_device, set_num_threads};
use tch::{Device, Kind};

/// The names that `--dtype` takes where something is computed.
pub(crate) const DTYPES: [&str; 4] = ["auto", "float32", "bfloat16", "float16"];
/// The names that `--dtype` takes where something is stored.
pub(crate) const STORED_DTYPES: [&str; 3] = ["float32", "bfloat16", "float16"];

/// Device, dtype, threads.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Compute {
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", help_heading = "Computing")]
    pub(crate) device: String,
    /// What the model computes in; auto is float32 on a CPU and the checkpoint's own dtype on a GPU
    #[arg(long, default_value = "auto", value_parser = DTYPES, help_heading = "Computing")]
    pub(crate) dtype: String,
    /// Threads of one operation on the CPU; 0 takes all cores
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Computing")]
    pub(crate) threads: u16,
}

impl Compute {
    /// The device, with the threads set.
    ///
    /// # Errors
    /// A device that is unknown or not there.
    pub(crate) fn device(&self) -> Result<Device> {
        if self.threads > 0 {
            set_num_threads(self.threads.into());
        }
        Ok(resolve_device(self.device.parse::<DeviceChoice>()?)?)
    }

    /// The dtype for a model on a device.
    ///
    /// # Errors
    /// A dtype that is not known.
    pub(crate) fn kind(&self, model: &ModelConfig, device: Device) -> Result<Kind> {
        if self.dtype != "auto" {
            return parse_kind(&self.dtype).ok_or_else(|| usage(format!("--dtype {}: not a dtype", self.dtype)));
        }
        let own = model.dtype.as_deref().and_then(parse_kind);
        Ok(own.filter(|_| device != Device::Cpu).unwrap_or(Kind::Float))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_that_do_not_exist_are_refused() {
        let compute = Compute { device: "gpu".into(), dtype: "auto".into(), threads: 0 };
        assert!(compute.device().unwrap_err().to_string().contains("cuda:N"));
    }
}
