//! Tensors of a device that wait in the memory of the host, and come back while the device computes.

use crate::error::Result;
use crate::ffi;
use tch::{Device, Tensor};

/// A tensor of a device that lies in the memory of the host, pinned where the device is not the CPU.
#[derive(Debug)]
pub struct OnHost {
    host: Tensor,
    device: Device,
}

/// A tensor on its way back to its device.
#[derive(Debug)]
pub struct Coming(ffi::HostCopy);

impl OnHost {
    /// Sends a tensor out; nobody waits for it, and it may be let go of at once. On the CPU it is copied.
    ///
    /// # Errors
    /// What libtorch reports, as where the host has not enough memory.
    pub fn send(tensor: &Tensor) -> Result<Self> {
        Ok(Self { host: ffi::HostCopy::begin(tensor, Device::Cpu)?.end()?, device: tensor.device() })
    }

    /// A tensor of the host, of any layout, that is for a device; it is copied, row-major.
    ///
    /// # Errors
    /// What libtorch reports, as where the host has not enough memory.
    pub fn keep(tensor: &Tensor, device: Device) -> Result<Self> {
        let host = match device {
            Device::Cpu => ffi::HostCopy::begin(tensor, device)?.end()?,
            _ => ffi::pinned(tensor)?,
        };
        Ok(Self { host, device })
    }

    /// Begins to bring it to its device.
    ///
    /// # Errors
    /// What libtorch reports, as where the device has not enough memory.
    pub fn fetch(&self) -> Result<Coming> {
        Ok(Coming(ffi::HostCopy::begin(&self.host, self.device)?))
    }

    /// What lies on the host. Of what was sent nobody may read it before the device has been waited for.
    pub fn host(&self) -> &Tensor {
        &self.host
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.host.numel() * crate::kind_bytes(self.host.kind())
    }
}

impl Coming {
    /// The tensor, for which the device waits where it has not come yet.
    ///
    /// # Errors
    /// What the device reports.
    pub fn arrive(self) -> Result<Tensor> {
        self.0.end()
    }
}

/// Lets a tensor, and whoever else holds it, have the numbers of another, which may be on another device.
///
/// # Errors
/// What libtorch reports.
pub fn set_data(tensor: &Tensor, data: &Tensor) -> Result<()> {
    ffi::set_data(tensor, data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn what_goes_out_comes_back_and_is_a_copy() {
        for device in devices() {
            let mut x = Tensor::arange(12, (Kind::Float, device)).view([3, 4]);
            let away = OnHost::send(&x).unwrap();
            let turned = OnHost::keep(&x.tr(), device).unwrap();
            let coming = away.fetch().unwrap();
            let _ = x.zero_();
            let back = coming.arrive().unwrap();
            assert_eq!((back.device(), away.host().device()), (device, Device::Cpu));
            assert_eq!(back.sum(Kind::Float).double_value(&[]), 66.0);
            assert!(turned.fetch().unwrap().arrive().unwrap().equal(&back.tr()) && turned.host().is_contiguous());
            assert_eq!(away.bytes(), 48);
            // Never fetched to the end: nothing hangs, nothing leaks.
            drop(away.fetch().unwrap());
        }
    }

    #[test]
    fn copies_and_what_is_computed_keep_their_order() {
        // Many at once, each of which is written over as soon as it has been sent, and read as soon as it has come.
        for device in devices() {
            let mut x = Tensor::zeros([1 << 16], (Kind::Float, device));
            let mut away = Vec::new();
            for i in 0..50 {
                let _ = x.fill_(i);
                away.push(OnHost::send(&x).unwrap());
            }
            for (i, away) in away.iter().enumerate().rev() {
                let back = away.fetch().unwrap().arrive().unwrap();
                assert_eq!((&back - i as f64).abs().max().double_value(&[]), 0.0, "{device:?}");
            }
        }
    }

    fn devices() -> Vec<Device> {
        match crate::cuda_status() {
            crate::CudaStatus::Loaded { .. } => vec![Device::Cpu, Device::Cuda(0)],
            _ => vec![Device::Cpu],
        }
    }

    #[test]
    fn all_who_hold_a_tensor_get_its_new_numbers() {
        for device in devices() {
            let one = Tensor::zeros([2, 2], (Kind::Float, Device::Cpu));
            let same = one.shallow_clone();
            set_data(&one, &Tensor::ones([2, 2], (Kind::Float, device))).unwrap();
            assert_eq!((same.sum(Kind::Float).double_value(&[]), same.device()), (4.0, device));
        }
    }
}
