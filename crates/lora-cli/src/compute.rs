//! Where and in what dtype to compute: the flags shared by the verbs that run a model.

use crate::failure::usage;
use anyhow::Result;
use lora_model::{Decoder, Keeping, ModelConfig, Packing, Progress, Storage};
use lora_torch::{DeviceChoice, DeviceKernels, parse_kind, resolve_device, set_num_threads, use_device_kernels};
use std::path::Path;
use tch::{Device, Kind};

/// The names that `--dtype` takes where something is computed.
pub(crate) const DTYPES: [&str; 4] = ["auto", "float32", "bfloat16", "float16"];
/// The names that `--dtype` takes where something is stored.
pub(crate) const STORED_DTYPES: [&str; 3] = ["float32", "bfloat16", "float16"];

/// The names that `--quantization` takes.
pub(crate) const QUANTIZATIONS: [&str; 4] = ["none", "nf4", "nf4-double", "int8"];

/// The names that `--kernels` takes.
const KERNELS: [&str; 2] = ["libtorch", "compiled"];

/// Device, dtype, threads.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Compute {
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", help_heading = "Computing")]
    pub(crate) device: String,
    /// What the model computes in; auto is float32 on a CPU and the checkpoint's own dtype on a GPU
    #[arg(long, default_value = "auto", value_parser = DTYPES, help_heading = "Computing")]
    pub(crate) dtype: String,
    /// Pack the linear layers of the blocks: nf4 or nf4-double (4 bits a weight), int8, or none
    #[arg(long, default_value = "none", value_parser = QUANTIZATIONS, help_heading = "Computing")]
    pub(crate) quantization: String,
    /// Where the matrices of the base lie: converted to the dtype that is computed in, stored in that of the checkpoint,
    /// mapped from its file, or, those of the blocks, on the host, from where a CUDA device fetches each when it is computed
    #[arg(long, default_value = "converted", value_parser = Storage::NAMES, help_heading = "Computing")]
    pub(crate) weights: String,
    /// Who computes gates, rotary embeddings, losses and the numbers of NF4 on a CUDA device: libtorch, or kernels that are
    /// compiled at the start
    #[arg(long, default_value = "libtorch", value_parser = KERNELS, help_heading = "Computing")]
    pub(crate) kernels: String,
    /// Threads of one operation on the CPU; 0 takes all cores
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Computing")]
    pub(crate) threads: u16,
}

impl Default for Compute {
    /// What the flags are when none is given.
    fn default() -> Self {
        let auto = || "auto".to_string();
        Self {
            device: auto(),
            dtype: auto(),
            quantization: "none".into(),
            weights: "converted".into(),
            kernels: "libtorch".into(),
            threads: 0,
        }
    }
}

impl Compute {
    /// The device, with the threads set and the kernels chosen.
    ///
    /// # Errors
    /// A device that is unknown or not there.
    pub(crate) fn device(&self) -> Result<Device> {
        if self.threads > 0 {
            set_num_threads(self.threads.into());
        }
        use_device_kernels(DeviceKernels::named(&self.kernels).unwrap_or(DeviceKernels::Libtorch))?;
        Ok(resolve_device(self.device.parse::<DeviceChoice>()?)?)
    }

    /// Loads a base model, kept as the flags say.
    ///
    /// # Errors
    /// What is wrong with the checkpoint, or a base that cannot be kept so on this device.
    pub(crate) fn load(
        &self,
        dir: &Path,
        config: ModelConfig,
        kind: Kind,
        device: Device,
        progress: Progress<'_>,
    ) -> Result<Decoder> {
        let (storage, packing) = (self.storage(device)?, self.packing());
        // What is to be packed comes from the mapped file, one matrix at a time.
        let storage = if packing.is_some() { Storage::Mapped } else { storage };
        let mut model = Decoder::load_as(dir, config, 0, Keeping { kind, device, storage }, progress)?;
        if let Some(packing) = packing {
            model.pack(packing, progress)?;
        }
        if storage == Storage::Host {
            model.keep_on_host()?;
        }
        Ok(model)
    }

    /// Into what the base is packed.
    pub(crate) fn packing(&self) -> Option<Packing> {
        Packing::named(&self.quantization)
    }

    /// Where the base lies.
    ///
    /// # Errors
    /// A mapped base on a device, or one on the host without a device.
    pub(crate) fn storage(&self, device: Device) -> Result<Storage> {
        match Storage::named(&self.weights).unwrap_or_default() {
            Storage::Mapped if device != Device::Cpu => {
                Err(usage("--weights mapped: a mapped base is read by the CPU; use --device cpu, or --weights stored"))
            }
            Storage::Host if device == Device::Cpu => {
                Err(usage("--weights host: the host computes itself; use --weights stored or mapped, or a CUDA device"))
            }
            storage => Ok(storage),
        }
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
        let compute = Compute { device: "gpu".into(), ..Compute::default() };
        assert!(compute.device().unwrap_err().to_string().contains("cuda:N"));
    }
}
