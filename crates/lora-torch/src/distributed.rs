//! Processes that train together, by libtorch's own c10d: the store they meet at, and sums over all of them.
//!
//! [`Launch`] reads what a launcher (torchrun, `lora launch`, srun, Kubeflow's training operator) set, [`Gloo`] meets the
//! others, and [`Collective`] is what they then do with each other. A process alone is [`Single`], which never touches c10d.

mod gloo;
mod heart;
mod launch;

pub use gloo::Gloo;
pub use launch::Launch;

use crate::error::{Error, Result};
use crate::ffi::Work;
use std::fmt::Debug;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;
use tch::{Kind, Tensor};

/// What processes do together. Every one of them makes the same calls in the same order.
pub trait Collective: Debug + Send + Sync {
    /// The place of this process, from 0.
    fn rank(&self) -> u32;

    /// How many there are.
    fn world(&self) -> u32;

    /// Replaces the entries by their sums over all processes, which have the same bits everywhere.
    ///
    /// # Errors
    /// [`Error::Lost`] where a process is gone or does not answer in time, and from then on always.
    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<()>;

    /// Replaces the entries by those of the process `root`.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn broadcast(&self, tensor: &mut Tensor, root: u32) -> Result<()>;

    /// What each process gave, in the order of ranks.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Begins to give a contiguous tensor on the host to another process, which takes what it is given in the order of these
    /// calls. Nothing leaves before that process has begun to take it, and until then the numbers must stay as they are.
    ///
    /// # Errors
    /// [`Error::NoPeer`] for a process that is not another of them, or as [`Collective::all_reduce_sum`].
    fn send(&self, tensor: &Tensor, to: u32) -> Result<Transfer>;

    /// Begins to take what another process gives: a tensor on the host of this shape and dtype.
    ///
    /// # Errors
    /// As [`Collective::send`].
    fn receive(&self, shape: &[i64], kind: Kind, from: u32) -> Result<Transfer>;

    /// Waits until a transfer has ended, and returns what was given or taken.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_sum`].
    fn arrive(&self, transfer: Transfer) -> Result<Tensor>;
}

/// A tensor on its way to or from another process.
#[derive(Debug)]
pub struct Transfer {
    work: Work,
    tensor: Tensor,
}

/// A process alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Single;

impl Collective for Single {
    fn rank(&self) -> u32 {
        0
    }

    fn world(&self) -> u32 {
        1
    }

    fn all_reduce_sum(&self, _tensor: &mut Tensor) -> Result<()> {
        Ok(())
    }

    fn broadcast(&self, _tensor: &mut Tensor, _root: u32) -> Result<()> {
        Ok(())
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![own.to_vec()])
    }

    fn send(&self, _tensor: &Tensor, to: u32) -> Result<Transfer> {
        Err(Error::NoPeer { peer: to, rank: 0, world: 1 })
    }

    fn receive(&self, _shape: &[i64], _kind: Kind, from: u32) -> Result<Transfer> {
        Err(Error::NoPeer { peer: from, rank: 0, world: 1 })
    }

    fn arrive(&self, transfer: Transfer) -> Result<Tensor> {
        transfer.work.wait()?;
        Ok(transfer.tensor)
    }
}

/// What a conversation with the store came to, if it ended in time. libtorch's own waits have an end, but what it writes and reads
/// to end them has none: where the store's machine is gone that takes until TCP gives up, a quarter of an hour. The thread that is
/// left behind then ends with the process.
fn within<T: Send + 'static>(limit: Duration, talk: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (end, ending) = channel();
    thread::Builder::new().spawn(move || end.send(talk())).ok()?;
    ending.recv_timeout(limit).ok()
}
