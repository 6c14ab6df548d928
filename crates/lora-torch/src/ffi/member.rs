//! The border to shim/distributed.cpp: membership of a group of processes, and transfers between two of them.

use super::{Message, check};
use crate::error::Result;
use std::ffi::{CStr, c_char, c_void};
use std::ptr;
use tch::Tensor;
use torch_sys::C_tensor;

unsafe extern "C" {
    fn lt_group_available() -> Message;
    fn lt_group_takes_cuda() -> i32;
    fn lt_store_open(
        host: *const c_char,
        port: u16,
        hosts: i32,
        timeout_ms: i64,
        prefix: *const c_char,
        out: *mut *mut c_void,
    ) -> Message;
    fn lt_store_add(member: *mut c_void, key: *const c_char, amount: i64, out: *mut i64) -> Message;
    fn lt_group_open(member: *mut c_void, rank: i32, world: i32, timeout_ms: i64) -> Message;
    fn lt_group_sum(member: *mut c_void, tensor: *const C_tensor) -> Message;
    fn lt_group_broadcast(member: *mut c_void, tensor: *const C_tensor, root: i64) -> Message;
    fn lt_group_send(member: *mut c_void, tensor: *const C_tensor, to: i32, out: *mut *mut c_void) -> Message;
    fn lt_group_receive(member: *mut c_void, tensor: *const C_tensor, from: i32, out: *mut *mut c_void) -> Message;
    fn lt_transfer_wait(transfer: *mut c_void) -> Message;
    fn lt_transfer_close(transfer: *mut c_void) -> Message;
    fn lt_store_close(member: *mut c_void) -> Message;
}

/// A process's membership of a group of processes (shim/distributed.cpp): its connection to their store, and to them.
#[derive(Debug)]
pub(crate) struct Member(*mut c_void);

// SAFETY: libtorch's store guards itself by a lock, so any thread may use it; the group is used by one thread at a time,
// which `distributed::Gloo` sees to.
unsafe impl Send for Member {}
unsafe impl Sync for Member {}

impl Member {
    /// Whether this libtorch has groups; an error that says so where it has not.
    pub(crate) fn available() -> Result<()> {
        check("distributed", unsafe { lt_group_available() })
    }

    /// Whether sums and broadcasts take tensors of CUDA devices as they are.
    pub(crate) fn takes_cuda() -> bool {
        // SAFETY: it returns a number, and touches nothing.
        unsafe { lt_group_takes_cuda() != 0 }
    }

    pub(crate) fn open(host: &CStr, port: u16, hosts: bool, timeout_ms: i64, prefix: &CStr) -> Result<Self> {
        let mut out = ptr::null_mut();
        let (host, prefix) = (host.as_ptr(), prefix.as_ptr());
        check("store", unsafe { lt_store_open(host, port, i32::from(hosts), timeout_ms, prefix, &mut out) })?;
        Ok(Self(out))
    }

    pub(crate) fn add(&self, key: &CStr, amount: i64) -> Result<i64> {
        let mut out = 0;
        check("store", unsafe { lt_store_add(self.0, key.as_ptr(), amount, &mut out) })?;
        Ok(out)
    }

    pub(crate) fn open_group(&self, rank: i32, world: i32, timeout_ms: i64) -> Result<()> {
        check("group", unsafe { lt_group_open(self.0, rank, world, timeout_ms) })
    }

    pub(crate) fn sum(&self, tensor: &mut Tensor) -> Result<()> {
        check("all_reduce_sum", unsafe { lt_group_sum(self.0, tensor.as_mut_ptr()) })
    }

    pub(crate) fn broadcast(&self, tensor: &mut Tensor, root: i64) -> Result<()> {
        check("broadcast", unsafe { lt_group_broadcast(self.0, tensor.as_mut_ptr(), root) })
    }

    /// Begins to give a tensor to another member; the shim holds it until then.
    pub(crate) fn send(&self, tensor: &Tensor, to: i32) -> Result<Work> {
        let mut out = ptr::null_mut();
        check("send", unsafe { lt_group_send(self.0, tensor.as_ptr(), to, &mut out) })?;
        Ok(Work(out))
    }

    /// Begins to take what another member gives.
    pub(crate) fn receive(&self, tensor: &mut Tensor, from: i32) -> Result<Work> {
        let mut out = ptr::null_mut();
        check("receive", unsafe { lt_group_receive(self.0, tensor.as_mut_ptr(), from, &mut out) })?;
        Ok(Work(out))
    }

    /// Leaves the group. Threads of it may wait here for processes that are gone, so a broken group is not closed.
    pub(crate) fn close(self) {
        // An error changes nothing: the system closes what the shim has not.
        let _ = check("store", unsafe { lt_store_close(self.0) });
    }
}

/// A transfer that was begun.
#[derive(Debug)]
pub(crate) struct Work(*mut c_void);

// SAFETY: c10d's work guards itself by a lock, so any thread may wait for it.
unsafe impl Send for Work {}
unsafe impl Sync for Work {}

impl Work {
    pub(crate) fn wait(&self) -> Result<()> {
        check("transfer", unsafe { lt_transfer_wait(self.0) })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // An error changes nothing: what is not given back here goes with the process.
        let _ = check("transfer", unsafe { lt_transfer_close(self.0) });
    }
}
