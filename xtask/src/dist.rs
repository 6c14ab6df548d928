//! `dist`: an archive that runs where it is unpacked: `lora` and the libraries that the loader finds outside the system.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cargo::{Workspace, capture, run as run_command};
use crate::gpu_check::strip;
use crate::{hash, setup};

/// Where the system's own libraries lie; those are not carried along.
const SYSTEM: [&str; 4] = ["/lib/", "/lib64/", "/usr/lib/", "/usr/lib64/"];

/// Makes `target/dist/lora-VERSION-ARCH-OS.tar.gz` and its sha256.
pub fn run(ws: &Workspace) -> Result<()> {
    setup::ensure(ws)?;
    // One more search path for the program alone; a flag in the environment would build every crate again.
    let rpath = "link-arg=-Wl,-rpath,$ORIGIN/lib";
    run_command(ws.cargo().args(["rustc", "--release", "-p", "lora-cli", "--bin", "lora", "--", "-C", rpath]))?;
    let target = ws.target()?;
    let lora = target.join("release/lora");
    let name = format!("lora-{}-{}-{}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH, std::env::consts::OS);
    let dist = target.join("dist");
    let folder = dist.join(&name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(folder.join("lib"))?;

    strip(&lora, &folder.join("lora"))?;
    for library in carried(&capture(Command::new("ldd").arg(&lora))?)? {
        let file = library.file_name().context("a library has a name")?;
        fs::copy(&library, folder.join("lib").join(file)).with_context(|| format!("copying {}", library.display()))?;
    }
    for file in ["LICENSE-MIT", "LICENSE-APACHE", "README.md"] {
        fs::copy(ws.root.join(file), folder.join(file)).with_context(|| format!("copying {file}"))?;
    }
    // `lora demo` looks for it beside the program.
    run_command(Command::new("cp").arg("-r").arg(ws.root.join("demo")).arg(folder.join("demo")))?;
    licences(ws, &folder.join("licences"))?;
    // It must start from where it lies, without the workspace's libraries: the archive is worth nothing otherwise.
    let found = capture(Command::new("ldd").arg(folder.join("lora")))?;
    for library in carried(&found)? {
        let library = fs::canonicalize(&library)?;
        ensure!(library.starts_with(fs::canonicalize(&folder)?), "the archive's lora takes {}", library.display());
    }

    let archive = dist.join(format!("{name}.tar.gz"));
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "-czf"]).arg(&archive);
    run_command(tar.arg("-C").arg(&dist).arg(&name))?;
    let digest = hash::sha256(&archive)?;
    fs::write(dist.join(format!("{name}.tar.gz.sha256")), format!("{digest}  {name}.tar.gz\n"))?;
    println!("{} ({} MB, sha256 {digest})", archive.display(), fs::metadata(&archive)?.len() / 1_000_000);
    Ok(())
}

/// Copies the licences of what is carried along, which lie beside torch where pip or setup unpacked it.
fn licences(ws: &Workspace, to: &Path) -> Result<()> {
    let torch = fs::canonicalize(ws.libtorch().join("lib"))?.with_file_name("");
    let site = torch.parent().context("torch lies in a folder")?;
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(site)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let (ours, from) =
            (["torch-", "nvidia_cuda_"].iter().any(|p| name.starts_with(p)), entry.path().join("licenses"));
        if ours && name.ends_with(".dist-info") && from.is_dir() {
            run_command(Command::new("cp").arg("-r").arg(from).arg(to.join(name.trim_end_matches(".dist-info"))))?;
        }
    }
    ensure!(
        fs::read_dir(to)?.next().is_some(),
        "libtorch's licence, which must go along, is not in {}; remove .libtorch and run `cargo xtask setup`",
        site.display()
    );
    Ok(())
}

/// The libraries in what `ldd` printed that are not the system's.
fn carried(ldd: &str) -> Result<Vec<PathBuf>> {
    let mut libraries = Vec::new();
    for line in ldd.lines().map(str::trim) {
        ensure!(!line.ends_with("not found"), "the loader does not find {line}");
        let Some((_, path)) = line.split_once(" => ") else { continue };
        let path = path.split(" (").next().unwrap_or(path);
        if !SYSTEM.iter().any(|prefix| path.starts_with(prefix)) {
            libraries.push(Path::new(path).to_path_buf());
        }
    }
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_libraries_outside_the_system_are_carried() {
        let text = "\tlinux-vdso.so.1 (0x1)\n\tlibc10.so => /ws/.libtorch/lib/libc10.so (0x2)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x3)\n\t/lib64/ld-linux-x86-64.so.2 (0x4)\n";
        assert_eq!(carried(text).unwrap(), [PathBuf::from("/ws/.libtorch/lib/libc10.so")]);
        assert!(carried("\tlibcupti.so.13 => not found\n").is_err());
    }
}
