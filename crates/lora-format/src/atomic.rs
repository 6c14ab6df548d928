//! Writes that leave either the old state or the new one, whatever happens in between.

use crate::error::{Error, Result};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use tempfile::{NamedTempFile, TempDir};

/// Replaces or creates the file `path` with `bytes`: temporary file in the same folder, fsync, rename, fsync of the
/// folder.
///
/// # Errors
/// [`Error::Io`] naming the path; the file then is as it was before.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temp = create_temp(path)?;
    temp.write_all(bytes).map_err(|e| Error::io("write", path, e))?;
    persist(temp, path)
}

/// Replaces or creates the file `to` with a copy of `from`, as [`write_atomic`] does, whatever its size.
///
/// # Errors
/// [`Error::Io`] naming the path that could not be read or written; `to` then is as it was before.
pub fn copy_atomic(from: &Path, to: &Path) -> Result<()> {
    let mut source = File::open(from).map_err(|e| Error::io("read", from, e))?;
    let mut temp = create_temp(to)?;
    std::io::copy(&mut source, &mut temp).map_err(|e| Error::io("write", to, e))?;
    persist(temp, to)
}

/// Makes the names in a folder durable.
///
/// # Errors
/// [`Error::Io`] naming the folder.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|f| f.sync_all()).map_err(|e| Error::io("sync", dir, e))
}

/// A fresh folder beside `target`, to be filled and then renamed to it; removed when dropped.
///
/// # Errors
/// [`Error::Io`] naming the target.
pub fn create_staging_dir(target: &Path) -> Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tmp-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder.tempdir_in(parent(target)).map_err(|e| Error::io("create", target, e))
}

/// The folder of a path; `.` for a bare name.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

pub(crate) fn create_temp(path: &Path) -> Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tmp-");
    // The default of 0600 would make every result private; the umask still applies.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(parent(path)).map_err(|e| Error::io("create", path, e))
}

pub(crate) fn persist(temp: NamedTempFile, path: &Path) -> Result<()> {
    temp.as_file().sync_all().map_err(|e| Error::io("sync", path, e))?;
    temp.persist(path).map_err(|e| Error::io("rename to", path, e.error))?;
    sync_dir(parent(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn replaces_whole_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        write_atomic(&dir.path().join("b"), b"three").unwrap();
        copy_atomic(&dir.path().join("b"), &path).unwrap();
        assert!(copy_atomic(&dir.path().join("none"), &path).unwrap_err().to_string().contains("none"));
        assert_eq!(fs::read(&path).unwrap(), b"three");
        fs::remove_file(dir.path().join("b")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            fs::write(dir.path().join("plain"), "").unwrap();
            let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode("a.json"), mode("plain"));
        }
    }

    #[test]
    fn a_failed_write_names_the_path_and_keeps_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("kept"), "x").unwrap();
        let error = write_atomic(&path, b"x").unwrap_err();
        assert!(error.to_string().contains("sub"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_atomic(&dir.path().join("no/such/folder"), b"x").is_err());
    }
}
