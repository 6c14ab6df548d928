//! Signs of life: each process counts up a number in the store while it lives, whatever its other threads are at.
//!
//! A group that breaks says at best that some connection did. Which process is gone, the numbers tell: those that stand still.

use super::within;
use crate::error::Result;
use crate::ffi::Member;
use std::ffi::CString;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// Between two signs.
const BEAT: Duration = Duration::from_millis(150);
/// Who gives none for so long is gone.
const SILENCE: Duration = Duration::from_millis(800);

/// The signs of life of a process, until it is dropped.
#[derive(Debug)]
pub(super) struct Heart {
    _stop: Sender<()>,
}

impl Heart {
    /// Begins, over a connection of its own: that of others may be waiting for an answer.
    pub(super) fn start(member: Member, rank: u32) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        thread::Builder::new().name("signs of life".into()).spawn(move || {
            while stopped.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
                if beats(&member, rank, 1).is_err() {
                    return;
                }
            }
            member.close();
        })?;
        Ok(Self { _stop: stop })
    }
}

/// The ranks that give no sign of life; `None` where the store itself gives none.
pub(super) fn silent(member: &Arc<Member>, world: u32) -> Option<Vec<u32>> {
    let member = Arc::clone(member);
    let look = move || {
        let count = || (0..world).map(|rank| beats(&member, rank, 0)).collect::<Result<Vec<i64>>>();
        let before = count()?;
        thread::sleep(SILENCE);
        let after = count()?;
        let still = (0..world).zip(before.iter().zip(&after)).filter(|(_, (before, after))| before == after);
        Ok::<_, crate::Error>(still.map(|(rank, _)| rank).collect())
    };
    within(SILENCE + 2 * BEAT, look)?.ok()
}

fn beats(member: &Member, rank: u32, more: i64) -> Result<i64> {
    member.add(&CString::new(format!("beats/{rank}")).unwrap_or_default(), more)
}
