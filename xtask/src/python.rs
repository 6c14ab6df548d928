//! The machine's Python: only ever asked where things are, or told to run pip and the reference scripts.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::cargo::{capture, run};
use crate::setup::VERSION;

const PROGRAM: &str = "python3";

/// Prints the version and the folder of torch without importing it.
const PROBE: &str = "
import importlib.metadata, importlib.util
spec = importlib.util.find_spec('torch')
print(importlib.metadata.version('torch'))
print(list(spec.submodule_search_locations)[0])
";

/// The folder of an installed Python torch of the right version with its headers.
pub fn installed_torch() -> Option<PathBuf> {
    let text = capture(Command::new(PROGRAM).args(["-c", PROBE])).ok()?;
    let mut lines = text.lines();
    let version = lines.next()?;
    let folder = PathBuf::from(lines.next()?);
    let right = version.split('+').next() == Some(VERSION);
    (right && folder.join("lib/libtorch_cpu.so").exists() && folder.join("include/ATen/ATen.h").exists())
        .then_some(folder)
}

/// A `python3 -m pip` command.
///
/// # Errors
/// When there is no python3 or it has no pip, with what to do.
pub fn pip() -> Result<Command> {
    let remedy = "install it (Debian, Ubuntu: `apt-get install python3-pip`), or name an unpacked libtorch 2.11.0: \
                  `cargo xtask setup --from DIR`";
    if let Err(error) = Command::new(PROGRAM).arg("--version").output() {
        bail!("fetching libtorch needs python3 with pip, and `python3` does not start ({error}): {remedy}");
    }
    if capture(Command::new(PROGRAM).args(["-m", "pip", "--version"])).is_err() {
        bail!("fetching libtorch needs pip, and `python3 -m pip` does not run: {remedy}");
    }
    let mut command = Command::new(PROGRAM);
    command.args(["-m", "pip"]);
    Ok(command)
}

/// Packages that reference scripts need.
pub struct Packages {
    /// By their exact versions.
    names: &'static [&'static str],
    /// What shows that they are there.
    imports: &'static str,
    /// The folder of the private environment.
    venv: &'static str,
    /// What making that costs.
    cost: &'static str,
}

/// PEFT and transformers.
pub const PEFT: Packages = Packages {
    names: &["torch==2.11.0", "transformers==5.23.0", "peft==0.21.2", "numpy", "scipy", "bitsandbytes==0.50.2"],
    imports: "import torch, transformers, peft, safetensors, scipy, bitsandbytes",
    venv: "venv",
    cost: "fetches about 3 GB",
};

/// llama.cpp, built from source, and the reader of its files.
pub const LLAMA_CPP: Packages = Packages {
    names: &["gguf==0.19.0", "llama-cpp-python==0.3.36", "safetensors", "numpy"],
    imports: "import gguf, llama_cpp, safetensors",
    venv: "venv-llama-cpp",
    cost: "builds llama.cpp, some 15 minutes on two cores",
};

/// TensorBoard, for the event files.
pub const TENSORBOARD: Packages = Packages {
    names: &["tensorboard==2.21.0"],
    imports: "import tensorboard",
    venv: "venv-tensorboard",
    cost: "fetches about 50 MB",
};

/// What others prepare data with.
pub const DATASETS: Packages = Packages {
    names: &["transformers==5.23.0", "datasets==5.2.0", "jinja2"],
    imports: "import transformers, datasets",
    venv: "venv-datasets",
    cost: "fetches about 300 MB",
};

/// The Python with these packages: the named one, or a private environment under `folder`, made on first use.
pub fn reference(named: Option<&Path>, folder: &Path, wheels: &Path, packages: &Packages) -> Result<PathBuf> {
    if let Some(program) = named {
        if let Err(error) = capture(Command::new(program).args(["-c", packages.imports])) {
            bail!(
                "--python {} lacks the reference packages ({}): {error:#}",
                program.display(),
                packages.names.join(", ")
            );
        }
        return Ok(program.to_path_buf());
    }
    let venv = folder.join(packages.venv);
    let (python, stamp) = (venv.join("bin/python"), venv.join("installed"));
    let wanted = packages.names.join("\n");
    if std::fs::read_to_string(&stamp).is_ok_and(|made| made == wanted) {
        return Ok(python);
    }
    eprintln!("making {} ({}; once)", venv.display(), packages.cost);
    std::fs::create_dir_all(folder)?;
    run(Command::new(PROGRAM).args(["-m", "venv", "--clear"]).arg(&venv)).map_err(|error| {
        error
            .context("no private Python environment (Debian, Ubuntu: `apt-get install python3-venv`), or give --python")
    })?;
    let mut install = Command::new(&python);
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    if wheels.exists() {
        install.arg("--find-links").arg(wheels);
    }
    run(install.args(packages.names))?;
    std::fs::write(&stamp, wanted)?;
    Ok(python)
}
