//! `setup`: makes `.libtorch`, the libtorch that everything in the workspace is built and run with.
//!
//! From `LIBTORCH` where the user exported it, else from an installed Python torch of the right version, else from
//! wheels that pip fetches into `.libtorch-cache`. The folder appears under its name in one step when it is complete.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::cargo::{Workspace, capture};
use crate::wheels::{self, WHEELS, Wheel};
use crate::{hash, python};

/// The only libtorch that the bindings accept.
pub const VERSION: &str = "2.11.0";

/// What stands in `.libtorch/setup.json`: where the libraries came from.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
pub struct Stamp {
    pub version: String,
    pub source: String,
    /// Name and sha256 of the wheels, where it was made of wheels.
    pub wheels: Vec<(String, String)>,
}

impl Stamp {
    /// The stamp of a `.libtorch`; none where it was made by hand.
    pub fn read(libtorch: &Path) -> Option<Self> {
        serde_json::from_str(&fs::read_to_string(libtorch.join("setup.json")).ok()?).ok()
    }
}

/// The verb: sets up and says what there is.
pub fn command(ws: &Workspace, cuda: bool, from: Option<&Path>) -> Result<()> {
    let exported = ws.exported_libtorch();
    make(ws, cuda, from.or(exported.as_deref()), WHEELS)?;
    let dir = ws.libtorch();
    let source = Stamp::read(&dir).map_or("made by hand".to_owned(), |stamp| format!("from {}", stamp.source));
    let kind = if dir.join("lib/libtorch_cuda.so").exists() { "with CUDA" } else { "CPU" };
    println!("{}: libtorch {VERSION}, {kind}, {source}", dir.display());
    Ok(())
}

/// Makes `.libtorch` unless it is there: what every other verb begins with.
pub fn ensure(ws: &Workspace) -> Result<()> {
    make(ws, false, ws.exported_libtorch().as_deref(), WHEELS)
}

/// What keeps a folder from being a complete libtorch of the right version.
pub fn fault(dir: &Path, cuda: bool) -> Option<String> {
    let Ok(version) = fs::read_to_string(dir.join("build-version")) else {
        return Some("it has no build-version file".to_owned());
    };
    let version = version.trim();
    if version.split('+').next() != Some(VERSION) {
        return Some(format!("it is version {version}, and {VERSION} is needed"));
    }
    missing_file(dir, cuda).map(|file| format!("it lacks {file}"))
}

fn missing_file(dir: &Path, cuda: bool) -> Option<&'static str> {
    let cuda: &[_] = if cuda { &["lib/libtorch_cuda.so"] } else { &[] };
    ["lib/libtorch.so", "lib/libtorch_cpu.so", "lib/libc10.so", "include/ATen/ATen.h", "include/torch/csrc/api/include"]
        .iter()
        .chain(cuda)
        .find(|file| !dir.join(file).exists())
        .copied()
}

/// `named` is what `--from` or an exported `LIBTORCH` names.
fn make(ws: &Workspace, cuda: bool, named: Option<&Path>, pinned: &[Wheel]) -> Result<()> {
    let dir = ws.libtorch();
    let named = match named {
        Some(path) => Some(
            fs::canonicalize(path)
                .with_context(|| format!("{}, named by --from or LIBTORCH, cannot be read", path.display()))?,
        ),
        None => None,
    };
    // Naming .libtorch itself is no wish for anything else.
    let named = named.filter(|path| fs::canonicalize(&dir).ok().as_ref() != Some(path));
    let done = || {
        let same = |path: &PathBuf| Stamp::read(&dir).is_some_and(|stamp| stamp.source == path.display().to_string());
        fault(&dir, cuda).is_none() && named.as_ref().is_none_or(same)
    };
    if done() {
        return Ok(());
    }
    ensure!(
        cfg!(all(target_os = "linux", target_arch = "x86_64"))
            || named.is_some()
            || python::installed_torch().is_some(),
        "libtorch is fetched for Linux on x86_64 only; here install it (`python3 -m pip install torch=={VERSION}`) or \
         export LIBTORCH with its folder, then run this again"
    );

    let cache = ws.root.join(".libtorch-cache");
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let lock = File::create(cache.join("lock"))?;
    if lock.try_lock().is_err() {
        eprintln!("another setup is at work; waiting for it");
        lock.lock()?;
        if done() {
            return Ok(());
        }
    }
    let new = cache.join("new");
    let _ = fs::remove_dir_all(&new);
    fs::create_dir_all(&new)?;
    match &named {
        Some(path) => from_named(path, &new, cuda, pinned)?,
        None => match python::installed_torch().filter(|torch| usable(torch, cuda)) {
            Some(torch) => link(&torch, &new)?,
            None => {
                let needed_gb = if cuda { 9 } else { 3 };
                let free = free_gb(&cache)?;
                ensure!(
                    free >= needed_gb,
                    "libtorch needs {needed_gb} GB of free disk and {} has {free}",
                    cache.display()
                );
                let wheels: Vec<_> = pinned.iter().filter(|wheel| cuda || !wheel.cuda).collect();
                let paths = wheels.iter().map(|wheel| wheels::fetch(wheel, &cache)).collect::<Result<Vec<_>>>()?;
                from_wheels(&paths, &wheels, "wheels fetched with pip", &new, cuda)?;
            }
        },
    }
    if let Some(fault) = fault(&new, cuda) {
        bail!("what was found is no libtorch {VERSION}: {fault}");
    }
    if let Some(missing) = unresolved(&new.join("lib/libtorch_cpu.so")) {
        bail!("libtorch_cpu.so would not load here, it does not find {missing}; install what it belongs to");
    }
    let old = cache.join("old");
    let _ = fs::remove_dir_all(&old);
    if fs::symlink_metadata(&dir).is_ok() {
        fs::rename(&dir, &old)?;
    }
    fs::rename(&new, &dir)?;
    let _ = fs::remove_dir_all(&old).or_else(|_| fs::remove_file(&old));
    Ok(())
}

/// A Python torch that would load, with CUDA where that is asked for.
fn usable(torch: &Path, cuda: bool) -> bool {
    if cuda && !torch.join("lib/libtorch_cuda.so").exists() {
        eprintln!("the installed Python torch at {} has no CUDA; fetching one that has", torch.display());
        return false;
    }
    match unresolved(&torch.join("lib/libtorch_cpu.so")) {
        Some(missing) => {
            eprintln!("the installed Python torch at {} does not find {missing}; not using it", torch.display());
            false
        }
        None => true,
    }
}

/// The libraries that a library needs and the loader does not find.
pub fn unresolved(library: &Path) -> Option<String> {
    let text = capture(Command::new("ldd").arg(library)).ok()?;
    let missing = text.lines().filter(|line| line.contains("not found"));
    let missing: Vec<_> = missing.filter_map(|line| line.split_whitespace().next()).collect();
    (!missing.is_empty()).then(|| missing.join(", "))
}

/// `--from` and `LIBTORCH`: a folder with `include` and `lib`, a folder with the wheels, or the torch wheel.
fn from_named(path: &Path, new: &Path, cuda: bool, pinned: &[Wheel]) -> Result<()> {
    if path.is_dir() && path.join("lib/libtorch_cpu.so").exists() {
        if let Some(file) = missing_file(path, cuda) {
            bail!("{} is no complete libtorch: it lacks {file}", path.display());
        }
        return link(path, new);
    }
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
    let wheels: Vec<_> = pinned.iter().filter(|wheel| cuda || !wheel.cuda).collect();
    let torch = wheels.first().map(|wheel| wheel.file).unwrap_or_default();
    if path.is_file() && path.file_name().is_none_or(|name| name != torch) {
        bail!("{} is not the wheel that this workspace is made for: {torch}", path.display());
    }
    let mut paths = Vec::new();
    for wheel in &wheels {
        let file = folder.join(wheel.file);
        ensure!(
            file.exists(),
            "{} holds neither libtorch (include, lib) nor the wheel {}; get it with `python3 -m pip download --no-deps {}=={}`",
            folder.display(),
            wheel.file,
            wheel.project,
            wheel.version
        );
        wheel.verify(&file)?;
        paths.push(file);
    }
    from_wheels(&paths, &wheels, &path.display().to_string(), new, cuda)
}

/// Unpacks wheels below `new/site` and lets `include` and `lib` lead there.
fn from_wheels(paths: &[PathBuf], wheels: &[&Wheel], source: &str, new: &Path, cuda: bool) -> Result<()> {
    use std::os::unix::fs::symlink;
    wheels::unpack(paths, &new.join("site"), cuda)?;
    for folder in ["include", "lib"] {
        symlink(Path::new("site/torch").join(folder), new.join(folder))?;
    }
    if !cuda {
        // The wheel's own libtorch.so would pull the CUDA libraries in; it holds nothing else.
        symlink("libtorch_cpu.so", new.join("site/torch/lib/libtorch.so"))?;
    }
    let wheels = wheels.iter().map(|wheel| (wheel.file.to_owned(), wheel.sha256.to_owned())).collect();
    finish(new, source, wheels)
}

/// Lets `include` and `lib` lead to a libtorch that lies elsewhere; that stays where it is.
fn link(torch: &Path, new: &Path) -> Result<()> {
    for folder in ["include", "lib"] {
        std::os::unix::fs::symlink(torch.join(folder), new.join(folder))?;
    }
    if let Ok(version) = fs::read_to_string(torch.join("build-version")) {
        let version = version.trim();
        ensure!(
            version.split('+').next() == Some(VERSION),
            "{} is libtorch {version}, and {VERSION} is needed",
            torch.display()
        );
    } else {
        let header = fs::read_to_string(torch.join("include/torch/headeronly/version.h")).unwrap_or_default();
        ensure!(
            header.contains(&format!("\"{VERSION}")),
            "{} is not libtorch {VERSION}: neither build-version nor include/torch/headeronly/version.h says so",
            torch.display()
        );
    }
    finish(new, &torch.display().to_string(), Vec::new())
}

/// Writes the stamp, then the version that makes the folder count as complete.
fn finish(new: &Path, source: &str, wheels: Vec<(String, String)>) -> Result<()> {
    let stamp = Stamp { version: VERSION.to_owned(), source: source.to_owned(), wheels };
    fs::write(new.join("setup.json"), serde_json::to_string_pretty(&stamp)?)?;
    fs::write(new.join("build-version"), format!("{VERSION}\n"))?;
    Ok(())
}

/// Free gigabytes on the disk of a folder.
pub fn free_gb(folder: &Path) -> Result<u64> {
    let text = capture(Command::new("df").arg("-Pk").arg(folder))?;
    let kib = text.lines().nth(1).and_then(|line| line.split_whitespace().nth(3)).and_then(|n| n.parse::<u64>().ok());
    Ok(kib.context("`df -Pk` printed no free size")? / 1_000_000)
}

/// The sha256 of the stamp, by which two machines can be told to have the same libraries.
pub fn stamp_digest(libtorch: &Path) -> Option<String> {
    hash::sha256(&libtorch.join("setup.json")).ok().map(|digest| digest[..12].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn workspace() -> (tempfile::TempDir, Workspace) {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        (dir, Workspace { root })
    }

    /// The files by which a libtorch is known, as they lie in a wheel.
    const FILES: [&str; 4] =
        ["lib/libtorch_cpu.so", "lib/libc10.so", "include/ATen/ATen.h", "include/torch/csrc/api/include/torch/all.h"];

    fn unpacked(folder: &Path, version: &str) {
        for file in FILES.iter().chain(&["lib/libtorch.so"]) {
            let path = folder.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        fs::write(folder.join("build-version"), version).unwrap();
    }

    /// A torch wheel with the right files and more, and the row that pins it.
    fn wheel(folder: &Path) -> Wheel {
        let file = "torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl";
        let mut zip = zip::ZipWriter::new(File::create(folder.join(file)).unwrap());
        let options = zip::write::SimpleFileOptions::default();
        for name in FILES.iter().copied().chain(["lib/libtorch_cuda.so", "__init__.py"]) {
            zip.start_file(format!("torch/{name}"), options).unwrap();
            zip.write_all(name.as_bytes()).unwrap();
        }
        zip.finish().unwrap();
        let sha256 = Box::leak(hash::sha256(&folder.join(file)).unwrap().into_boxed_str());
        Wheel { project: "torch", version: VERSION, file, sha256, cuda: false }
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_complete_folder_made_by_hand_is_left_alone() {
        let (_dir, ws) = workspace();
        unpacked(&ws.libtorch(), "2.11.0+cpu\n");
        make(&ws, false, None, &[]).unwrap();
        assert_eq!(names(&ws.root), [".libtorch"], "nothing may be written");
    }

    #[test]
    fn incomplete_folders_are_told_apart() {
        let (_dir, ws) = workspace();
        let dir = ws.libtorch();
        assert!(fault(&dir, false).unwrap().contains("build-version"));
        unpacked(&dir, "2.10.0");
        assert!(fault(&dir, false).unwrap().contains("2.10.0"));
        unpacked(&dir, VERSION);
        assert_eq!(fault(&dir, false), None);
        assert!(fault(&dir, true).unwrap().contains("libtorch_cuda.so"));
        fs::remove_file(dir.join("lib/libc10.so")).unwrap();
        assert!(fault(&dir, false).unwrap().contains("libc10.so"));
    }

    #[test]
    fn a_wheel_is_unpacked_once_and_only_what_is_needed() {
        let (_dir, ws) = workspace();
        let pinned = [wheel(&ws.root)];
        make(&ws, false, Some(&ws.root.join(pinned[0].file)), &pinned).unwrap();
        let dir = ws.libtorch();
        assert_eq!(names(&dir.join("lib")), ["libc10.so", "libtorch.so", "libtorch_cpu.so"]);
        assert_eq!(fs::read_to_string(dir.join("lib/libtorch_cpu.so")).unwrap(), "lib/libtorch_cpu.so");
        assert!(!dir.join("site/torch/__init__.py").exists());
        assert_eq!(Stamp::read(&dir).unwrap().wheels[0].1, pinned[0].sha256);
        assert_eq!(names(&ws.root.join(".libtorch-cache")), ["lock"], "nothing half-done stays");
        fs::remove_file(ws.root.join(pinned[0].file)).unwrap();
        make(&ws, false, None, &pinned).unwrap();
    }

    #[test]
    fn damaged_and_foreign_wheels_are_refused() {
        let (_dir, ws) = workspace();
        let pinned = [wheel(&ws.root)];
        let path = ws.root.join(pinned[0].file);
        let mut bytes = fs::read(&path).unwrap();
        bytes.truncate(bytes.len() - 1);
        fs::write(&path, bytes).unwrap();
        let error = make(&ws, false, Some(&path), &pinned).unwrap_err();
        assert!(error.to_string().contains("its sha256 is"), "{error}");
        let other = ws.root.join("torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl");
        fs::rename(&path, &other).unwrap();
        let error = make(&ws, false, Some(&other), &pinned).unwrap_err();
        assert!(error.to_string().contains("not the wheel"), "{error}");
        let error = make(&ws, false, Some(&ws.root), &pinned).unwrap_err();
        assert!(error.to_string().contains("holds neither libtorch"), "{error}");
        assert!(!ws.libtorch().exists());
    }

    #[test]
    fn a_named_folder_is_linked_and_its_version_checked() {
        let (_dir, ws) = workspace();
        let there = ws.root.join("there");
        unpacked(&there, "2.10.0");
        let error = make(&ws, false, Some(&there), &[]).unwrap_err();
        assert!(error.to_string().contains("2.10.0"), "{error}");
        unpacked(&there, "2.11.0+cu130");
        make(&ws, false, Some(&there), &[]).unwrap();
        assert_eq!(fs::read_link(ws.libtorch().join("lib")).unwrap(), there.join("lib"));
        assert_eq!(fault(&ws.libtorch(), false), None);
        let error = make(&ws, false, Some(&ws.root.join("gone")), &[]).unwrap_err();
        assert!(error.to_string().contains("named by --from"), "{error}");
    }

    #[test]
    fn a_cached_wheel_is_not_fetched_again() {
        let (_dir, ws) = workspace();
        let pinned = wheel(&ws.root);
        assert_eq!(wheels::fetch(&pinned, &ws.root).unwrap(), ws.root.join(pinned.file));
        assert_eq!(names(&ws.root), [pinned.file]);
    }
}
