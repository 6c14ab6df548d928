//! The wheels that hold libtorch: which they are, fetching and verifying them, unpacking what is needed.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use zip::ZipArchive;

use crate::hash::sha256;
use crate::progress::Meter;
use crate::python;

/// One wheel by its exact contents; every machine unpacks the same, whatever Python it has.
pub struct Wheel {
    pub project: &'static str,
    pub version: &'static str,
    pub file: &'static str,
    pub sha256: &'static str,
    /// Only the CUDA libraries need it.
    pub cuda: bool,
}

/// Rows of: project, version, file, sha256, whether only the CUDA libraries need it.
macro_rules! wheels {
    ($($project:literal $version:literal $file:literal $sha256:literal $cuda:literal),+ $(,)?) => {
        &[$(Wheel { project: $project, version: $version, file: $file, sha256: $sha256, cuda: $cuda }),+]
    };
}

/// What `torch` 2.11.0 for Linux on x86_64 consists of.
#[rustfmt::skip]
pub const WHEELS: &[Wheel] = wheels![
    "torch" "2.11.0" "torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl"
        "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a" false,
    "nvidia-cuda-runtime" "13.0.96" "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
        "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548" false,
    "nvidia-cuda-cupti" "13.0.85" "nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl"
        "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8" false,
    "nvidia-cublas" "13.1.0.3" "nvidia_cublas-13.1.0.3-py3-none-manylinux_2_27_x86_64.whl"
        "ee8722c1f0145ab246bccb9e452153b5e0515fd094c3678df50b2a0888b8b171" true,
    "nvidia-cuda-nvrtc" "13.0.88" "nvidia_cuda_nvrtc-13.0.88-py3-none-manylinux2010_x86_64.manylinux_2_12_x86_64.whl"
        "ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575" true,
    "nvidia-cudnn-cu13" "9.19.0.56" "nvidia_cudnn_cu13-9.19.0.56-py3-none-manylinux_2_27_x86_64.whl"
        "d20e1734305e9d68889a96e3f35094d733ff1f83932ebe462753973e53a572bf" true,
    "nvidia-cufft" "12.0.0.61" "nvidia_cufft-12.0.0.61-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
        "6c44f692dce8fd5ffd3e3df134b6cdb9c2f72d99cf40b62c32dde45eea9ddad3" true,
    "nvidia-cufile" "1.15.1.6" "nvidia_cufile-1.15.1.6-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
        "08a3ecefae5a01c7f5117351c64f17c7c62efa5fffdbe24fc7d298da19cd0b44" true,
    "nvidia-curand" "10.4.0.35" "nvidia_curand-10.4.0.35-py3-none-manylinux_2_27_x86_64.whl"
        "1aee33a5da6e1db083fe2b90082def8915f30f3248d5896bcec36a579d941bfc" true,
    "nvidia-cusolver" "12.0.4.66" "nvidia_cusolver-12.0.4.66-py3-none-manylinux_2_27_x86_64.whl"
        "0a759da5dea5c0ea10fd307de75cdeb59e7ea4fcb8add0924859b944babf1112" true,
    "nvidia-cusparse" "12.6.3.3" "nvidia_cusparse-12.6.3.3-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
        "2b3c89c88d01ee0e477cb7f82ef60a11a4bcd57b6b87c33f789350b59759360b" true,
    "nvidia-cusparselt-cu13" "0.8.0" "nvidia_cusparselt_cu13-0.8.0-py3-none-manylinux2014_x86_64.whl"
        "25e30a8a7323935d4ad0340b95a0b69926eee755767e8e0b1cf8dd85b197d3fd" true,
    "nvidia-nccl-cu13" "2.28.9" "nvidia_nccl_cu13-2.28.9-py3-none-manylinux_2_18_x86_64.whl"
        "e4553a30f34195f3fa1da02a6da3d6337d28f2003943aa0a3d247bbc25fefc42" true,
    "nvidia-nvjitlink" "13.0.88" "nvidia_nvjitlink-13.0.88-py3-none-manylinux2010_x86_64.manylinux_2_12_x86_64.whl"
        "13a74f429e23b921c1109976abefacc69835f2f433ebd323d3946e11d804e47b" true,
    "nvidia-nvshmem-cu13" "3.4.5" "nvidia_nvshmem_cu13-3.4.5-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
        "290f0a2ee94c9f3687a02502f3b9299a9f9fe826e6d0287ee18482e78d495b80" true,
    "nvidia-nvtx" "13.0.85" "nvidia_nvtx-13.0.85-py3-none-manylinux1_x86_64.manylinux_2_5_x86_64.whl"
        "4936d1d6780fbe68db454f5e72a42ff64d1fd6397df9f363ae786930fd5c1cd4" true,
];

impl Wheel {
    /// The platform tag that pip is asked for: it matches tags exactly and does not know older ones to be compatible.
    fn platform(&self) -> &str {
        let tags = self.file.trim_end_matches(".whl").rsplit('-').next().unwrap_or_default();
        tags.split('.').next().unwrap_or_default()
    }

    /// Checks that a file is this wheel to the last bit.
    pub fn verify(&self, path: &Path) -> Result<()> {
        let found = sha256(path)?;
        ensure!(
            found == self.sha256,
            "{} is not the wheel it is named after: its sha256 is {found}, not {}; remove it and fetch it again",
            path.display(),
            self.sha256
        );
        Ok(())
    }
}

/// The wheel's file in `cache`: verified where it lies there already, else fetched with pip.
pub fn fetch(wheel: &Wheel, cache: &Path) -> Result<PathBuf> {
    let path = cache.join(wheel.file);
    if path.exists() {
        if wheel.verify(&path).is_ok() {
            return Ok(path);
        }
        eprintln!("{} in the cache is damaged; fetching it again", wheel.file);
        fs::remove_file(&path)?;
    }
    // pip downloads into TMPDIR first: its size there is the progress, and nothing half-done gets out of it.
    let scratch = cache.join("partial");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch)?;
    let requirements = scratch.join("requirements.txt");
    fs::write(&requirements, format!("{}=={} --hash=sha256:{}\n", wheel.project, wheel.version, wheel.sha256))?;
    let log = scratch.join("log");
    let mut child = python::pip()?
        .args(["download", "--quiet", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"])
        .args(["--progress-bar", "off", "--only-binary=:all:", "--require-hashes"])
        .args(["--implementation", "cp", "--python-version", "3.11", "--platform", wheel.platform()])
        .arg("--requirement")
        .arg(&requirements)
        .arg("--dest")
        .arg(scratch.join("done"))
        .env("TMPDIR", &scratch)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log)?)
        .spawn()
        .context("cannot start pip")?;
    let total = (wheel.project == "torch").then_some(530_604_548);
    let mut meter = Meter::new(format!("fetching {} {}", wheel.project, wheel.version), total);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        meter.set(size_of(&scratch));
        std::thread::sleep(Duration::from_millis(150));
    };
    meter.finish();
    if !status.success() {
        let said = fs::read_to_string(&log).unwrap_or_default();
        let last: Vec<_> = said.lines().rev().filter(|line| !line.trim().is_empty()).take(3).collect();
        bail!(
            "pip could not fetch {}=={} ({status}): {}\nwithout a network, bring the wheels that xtask/src/wheels.rs \
             lists from another machine and run `cargo xtask setup --from FOLDER`, or export LIBTORCH with the folder of \
             libtorch 2.11.0",
            wheel.project,
            wheel.version,
            last.into_iter().rev().collect::<Vec<_>>().join(" | "),
        );
    }
    let fetched = scratch.join("done").join(wheel.file);
    wheel.verify(&fetched)?;
    fs::rename(&fetched, &path)?;
    let _ = fs::remove_dir_all(&scratch);
    Ok(path)
}

/// Bytes in the files below a folder; what vanishes meanwhile counts nothing.
fn size_of(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => size_of(&entry.path()),
            _ => entry.metadata().map_or(0, |m| m.len()),
        })
        .sum()
}

/// Whether a file of a wheel belongs into `.libtorch`.
pub fn wanted(name: &str, cuda: bool) -> bool {
    let file = name.rsplit('/').next().unwrap_or_default();
    if name.starts_with("torch/include/") || name.contains(".dist-info/licenses/") {
        return true;
    }
    if name.starts_with("torch/lib/") {
        let cpu = matches!(file, "libtorch_cpu.so" | "libc10.so" | "libshm.so") || file.starts_with("libgomp");
        return cpu || (cuda && file.ends_with(".so") && file != "libtorch_python.so");
    }
    if name.starts_with("nvidia/") && name.contains("/lib/") {
        return matches!(file, "libcudart.so.13" | "libcupti.so.13") || (cuda && file.contains(".so"));
    }
    false
}

/// Unpacks what is wanted of the wheels into `site`, where they lie as pip would install them: the libraries find
/// each other by paths relative to that.
pub fn unpack(wheels: &[PathBuf], site: &Path, cuda: bool) -> Result<()> {
    for path in wheels {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let open = || -> Result<_> { Ok(ZipArchive::new(File::open(path)?)?) };
        let mut archive = open().with_context(|| format!("{} is not a readable wheel", path.display()))?;
        let mut total = 0;
        for index in 0..archive.len() {
            let entry = archive.by_index_raw(index)?;
            total += if wanted(entry.name(), cuda) { entry.size() } else { 0 };
        }
        let mut meter =
            Meter::new(format!("unpacking {}", name.splitn(3, '-').take(2).collect::<Vec<_>>().join(" ")), Some(total));
        let mut done = 0;
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index)?;
            if !entry.is_file() || !wanted(entry.name(), cuda) {
                continue;
            }
            let inside = entry.enclosed_name().map(|p| site.join(p));
            let Some(out) = inside else { bail!("{name} holds {:?}, a path that leads out of it", entry.name()) };
            if let Some(parent) = out.parent() {
                fs::create_dir_all(parent)?;
            }
            let mut file = File::create(&out).with_context(|| format!("cannot write {}", out.display()))?;
            let mut buffer = [0u8; 1 << 16];
            loop {
                let n = entry.read(&mut buffer).with_context(|| format!("{name}: {:?} is damaged", out))?;
                if n == 0 {
                    break;
                }
                file.write_all(&buffer[..n])
                    .with_context(|| format!("cannot write {}: is the disk full?", out.display()))?;
                done += n as u64;
                meter.set(done);
            }
        }
        meter.finish();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wheel_is_pinned_and_its_name_agrees() {
        for wheel in WHEELS {
            let start = format!("{}-{}-", wheel.project.replace('-', "_"), wheel.version);
            assert!(wheel.file.starts_with(&start), "{}", wheel.file);
            assert_eq!(wheel.sha256.len(), 64);
            assert!(wheel.platform().starts_with("manylinux") && wheel.platform().ends_with("x86_64"));
        }
    }

    #[test]
    fn the_cpu_set_leaves_cuda_and_python_out() {
        assert!(wanted("torch/lib/libtorch_cpu.so", false));
        assert!(wanted("torch/lib/libgomp.so.1", false));
        assert!(wanted("torch/include/ATen/ATen.h", false));
        assert!(wanted("nvidia/cu13/lib/libcupti.so.13", false));
        for name in ["torch/lib/libtorch_cuda.so", "nvidia/cu13/lib/libnvperf_host.so", "torch/__init__.py"] {
            assert!(!wanted(name, false), "{name}");
        }
        assert!(wanted("torch/lib/libtorch_cuda.so", true));
        assert!(wanted("nvidia/cudnn/lib/libcudnn.so.9", true));
        assert!(!wanted("torch/lib/libtorch_python.so", true));
    }
}
