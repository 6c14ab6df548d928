//! Writing to disk while more is made: without it a large file lies in memory until the end, and making and writing take turns.

use std::fs::File;
use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Bytes after which what was written so far is sent to the disk. Fewer than twice that many never start a thread.
const STRIDE: u64 = 32 << 20;

/// Makes a file durable piece by piece on a thread of its own.
#[derive(Debug)]
pub(crate) struct WriteBehind {
    unsent: u64,
    worker: Option<(SyncSender<()>, JoinHandle<io::Result<()>>)>,
}

impl WriteBehind {
    pub(crate) fn new() -> Self {
        Self { unsent: 0, worker: None }
    }

    /// Says that so many bytes more were written to the file.
    pub(crate) fn wrote(&mut self, file: &File, bytes: u64) -> io::Result<()> {
        self.unsent += bytes;
        if self.unsent < STRIDE {
            return Ok(());
        }
        match &self.worker {
            None if self.unsent >= 2 * STRIDE => {
                let file = file.try_clone()?;
                let (sender, receiver) = sync_channel(1);
                let sync = move || receiver.into_iter().try_for_each(|()| file.sync_data());
                self.worker = Some((sender, std::thread::Builder::new().name("write-behind".into()).spawn(sync)?));
            }
            None => return Ok(()),
            Some(_) => {}
        }
        // A thread that is still busy takes these bytes along the next time; one that failed says so at the end.
        if let Some((sender, _)) = &self.worker
            && sender.try_send(()).is_ok()
        {
            self.unsent = 0;
        }
        Ok(())
    }

    /// Waits for the thread. The system reports a failed write once, to whoever asks first: without this it would be lost.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        let Some((sender, worker)) = self.worker.take() else { return Ok(()) };
        drop(sender);
        worker.join().unwrap_or_else(|_| Err(io::Error::other("the thread that writes to disk ended early")))
    }
}

impl Drop for WriteBehind {
    fn drop(&mut self) {
        // A file that is given up: how its last bytes fared is of no interest.
        let _ = self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn small_files_start_no_thread_and_large_ones_end_theirs() {
        let mut file = tempfile::tempfile().unwrap();
        let mut behind = WriteBehind::new();
        file.write_all(b"x").unwrap();
        behind.wrote(&file, STRIDE).unwrap();
        assert!(behind.worker.is_none());
        for _ in 0..3 {
            behind.wrote(&file, STRIDE).unwrap();
        }
        assert!(behind.worker.is_some());
        behind.finish().unwrap();
        assert!(behind.worker.is_none());
    }
}
