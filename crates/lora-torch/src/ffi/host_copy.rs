//! The border to shim/host.cpp: copies between a device and the host that are on their way.

use super::{Message, check, take};
use crate::error::Result;
use std::ffi::c_void;
use std::ptr;
use tch::{Device, Tensor};
use torch_sys::C_tensor;

unsafe extern "C" {
    fn lt_begin_copy(from: *const C_tensor, index: i64, out: *mut *mut c_void) -> Message;
    fn lt_end_copy(copy: *mut c_void, out: *mut *mut C_tensor) -> Message;
    fn lt_forget_copy(copy: *mut c_void);
    fn lt_set_data(tensor: *const C_tensor, data: *const C_tensor) -> Message;
    fn lt_pinned(from: *const C_tensor, out: *mut *mut C_tensor) -> Message;
}

/// A copy of a tensor that is being made.
#[derive(Debug)]
pub(crate) struct HostCopy(*mut c_void);

// SAFETY: it is two handles that libtorch counts atomically, and an event, which any thread may wait for.
unsafe impl Send for HostCopy {}

impl HostCopy {
    pub(crate) fn begin(from: &Tensor, to: Device) -> Result<Self> {
        let mut out = ptr::null_mut();
        let index = if let Device::Cuda(index) = to { index as i64 } else { -1 };
        // SAFETY: the tensor lives for the call, and the shim keeps a handle of its own.
        check("begin_copy", unsafe { lt_begin_copy(from.as_ptr(), index, &mut out) })?;
        Ok(Self(out))
    }

    pub(crate) fn end(self) -> Result<Tensor> {
        // SAFETY: it was made by the shim and is there until it is dropped.
        take("end_copy", |out| unsafe { lt_end_copy(self.0, out) })
    }
}

impl Drop for HostCopy {
    fn drop(&mut self) {
        // SAFETY: it was made by the shim, and nobody has it any more.
        unsafe { lt_forget_copy(self.0) }
    }
}

pub(crate) fn set_data(tensor: &Tensor, data: &Tensor) -> Result<()> {
    // SAFETY: both live for the call.
    check("set_data", unsafe { lt_set_data(tensor.as_ptr(), data.as_ptr()) })
}

pub(crate) fn pinned(from: &Tensor) -> Result<Tensor> {
    // SAFETY: it lives for the call.
    take("pinned", |out| unsafe { lt_pinned(from.as_ptr(), out) })
}
