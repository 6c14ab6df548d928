//! One run at a time in a folder, and a first proof that the folder can be written to.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const LOCK_FILE: &str = ".lock";
/// How long to wait, and how often, for a holder that has taken a folder to write itself down.
const MOMENT: Duration = Duration::from_millis(10);
const MOMENTS: usize = 100;
/// How files began that earlier versions tried a folder with.
const PROBE_PREFIX: &str = ".probe-";
/// How files begin that are being written beside their place.
const TEMPORARY_PREFIX: &str = ".tmp-";

/// The run that holds a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its process.
    pub pid: u32,
    /// The name of its machine.
    pub host: String,
    /// When it started, in seconds since 1970-01-01 UTC.
    pub started: u64,
}

impl Holder {
    fn this_process() -> Self {
        Self { pid: std::process::id(), host: this_host(), started: now() }
    }

    /// Whether it is on this machine, whose system keeps locks truly: it is gone when its lock is free.
    pub fn is_here(&self) -> bool {
        self.host == this_host()
    }
}

fn this_host() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if host.trim().is_empty() { "unknown".to_string() } else { host.trim().to_string() }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pid == 0 {
            return write!(f, "it has not written its process id yet");
        }
        let seconds = now().saturating_sub(self.started);
        write!(f, "pid {} on host {}, started {seconds} s ago", self.pid, self.host)
    }
}

/// The right to work in a run's folder, held until it is dropped or the process ends, however it ends.
#[derive(Debug)]
pub struct RunLock {
    file: File,
    run_dir: PathBuf,
    abandoned: Option<Holder>,
}

impl RunLock {
    /// Makes the folder where it is missing, shows that it can be written to, and takes it for this process.
    ///
    /// The lock is an advisory one of the file system (`flock`), so a killed run leaves nothing to clean up. Network file
    /// systems may not keep such locks between machines: see [`RunLock::abandoned`].
    ///
    /// # Errors
    /// [`Error::OutputDir`] when the folder cannot be made or written to, [`Error::Locked`] when another run has it.
    pub fn acquire(run_dir: &Path) -> Result<Self> {
        let unusable = |source| Error::OutputDir { path: run_dir.to_path_buf(), source };
        fs::create_dir_all(run_dir).map_err(unusable)?;
        probe(run_dir).map_err(unusable)?;
        let path = run_dir.join(LOCK_FILE);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(unusable)?;
        let locked = file.try_lock();
        let mut found = holder_in(&mut file);
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                // Whoever has just taken the folder writes itself down in a moment.
                for _ in 0..MOMENTS {
                    if found.is_some() {
                        break;
                    }
                    std::thread::sleep(MOMENT);
                    found = holder_in(&mut file);
                }
                let holder = found.unwrap_or(Holder { pid: 0, host: String::new(), started: 0 });
                return Err(Error::Locked { path: run_dir.to_path_buf(), holder });
            }
            Err(TryLockError::Error(source)) => return Err(Error::Io { action: "lock", path, source }),
        }
        let holder = serde_json::to_string(&Holder::this_process())
            .map_err(|source| Error::Json { what: "the lock's holder", source })?;
        let written = file
            .set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| file.write_all(holder.as_bytes()));
        written.map_err(Error::io("write", &path))?;
        // Not only where a holder was found: one that was killed while it wrote itself down left none.
        sweep(run_dir)?;
        Ok(Self { file, run_dir: run_dir.to_path_buf(), abandoned: found })
    }

    /// The folder.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// An earlier run that ended without giving the folder back: it was killed. When its host is another one and the folder
    /// lies on a network file system it may still be at work, so tell the user.
    pub fn abandoned(&self) -> Option<&Holder> {
        self.abandoned.as_ref()
    }
}

/// Who is written down in a lock's file. A page is far more than a holder takes; what is not a holder was torn by a crash and says
/// nothing.
fn holder_in(file: &mut File) -> Option<Holder> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).ok()?;
    file.take(4096).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

impl Drop for RunLock {
    fn drop(&mut self) {
        // The file stays: removing it would let two later runs lock two different files. An error changes nothing, the
        // system gives the lock back when the file is closed.
        let _ = self.file.set_len(0);
    }
}

/// Removes what a killed run left half written beside its results.
fn sweep(run_dir: &Path) -> Result<()> {
    for entry in fs::read_dir(run_dir).map_err(Error::io("list", run_dir))? {
        let entry = entry.map_err(Error::io("list", run_dir))?;
        let (name, path) = (entry.file_name(), entry.path());
        let name = name.to_string_lossy();
        let ours = name.starts_with(TEMPORARY_PREFIX) || name.starts_with(PROBE_PREFIX);
        if ours && entry.file_type().is_ok_and(|kind| kind.is_file()) {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Writes and syncs a small file, which has no name where the file system has such: then a kill leaves nothing of it.
fn probe(run_dir: &Path) -> std::io::Result<()> {
    let mut file = tempfile::tempfile_in(run_dir)?;
    file.write_all(b"probe")?;
    file.sync_all()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_run_is_refused_by_pid_and_host_and_the_folder_is_free_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("runs/a");
        let lock = RunLock::acquire(&run).unwrap();
        assert!(lock.abandoned().is_none());
        let e = RunLock::acquire(&run).unwrap_err();
        let text = e.to_string();
        assert!(text.contains(&format!("pid {} on host ", std::process::id())), "{text}");
        assert!(matches!(e, Error::Locked { ref holder, .. } if !holder.host.is_empty()));
        drop(lock);
        assert!(RunLock::acquire(&run).unwrap().abandoned().is_none());
        let names: Vec<_> = fs::read_dir(&run).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, [LOCK_FILE]);
    }

    #[test]
    fn what_a_killed_run_left_is_taken_over_and_its_halves_go() {
        let dir = tempfile::tempdir().unwrap();
        for half in [".tmp-a1b2", ".probe-c3"] {
            fs::write(dir.path().join(half), b"half").unwrap();
        }
        fs::create_dir(dir.path().join(".tmp-folder")).unwrap();
        fs::write(dir.path().join("adapter_model.safetensors"), b"whole").unwrap();
        let old = Holder { pid: 1, host: "elsewhere".into(), started: 5 };
        fs::write(dir.path().join(LOCK_FILE), serde_json::to_string(&old).unwrap()).unwrap();
        let lock = RunLock::acquire(dir.path()).unwrap();
        assert_eq!(lock.abandoned(), Some(&old));
        assert!(!old.is_here() && Holder::this_process().is_here());
        drop(lock);
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [LOCK_FILE, ".tmp-folder", "adapter_model.safetensors"]);
        fs::write(dir.path().join(LOCK_FILE), b"{\"pid\": 12, \xff").unwrap();
        assert_eq!(RunLock::acquire(dir.path()).unwrap().abandoned(), None);
    }

    #[test]
    fn what_is_not_a_folder_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"mine").unwrap();
        let link = dir.path().join("dangling");
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).unwrap();
        for path in [file.clone(), file.join("below"), link, PathBuf::from("/proc/no-such-folder")] {
            let e = RunLock::acquire(&path).unwrap_err();
            assert!(matches!(e, Error::OutputDir { .. }) && e.is_usage(), "{}: {e}", path.display());
        }
        assert_eq!(fs::read(&file).unwrap(), b"mine");
    }
}
