//! Starting cargo and other programs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The workspace that a verb works on.
pub struct Workspace {
    pub root: PathBuf,
}

impl Workspace {
    /// The folder that cargo's configuration names as `LIBTORCH`.
    pub fn libtorch(&self) -> PathBuf {
        self.root.join(".libtorch")
    }

    /// `LIBTORCH` where the user exported it; cargo sets it to `.libtorch` for what it starts, which is not meant.
    pub fn exported_libtorch(&self) -> Option<PathBuf> {
        let path = PathBuf::from(std::env::var_os("LIBTORCH")?);
        let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name(".libtorch");
        (!path.as_os_str().is_empty() && path != built_in && path != self.libtorch()).then_some(path)
    }

    /// A cargo command in the workspace's root, with the environment that a user's own call would have.
    pub fn cargo(&self) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(&self.root);
        if self.exported_libtorch().is_none() {
            command.env_remove("LIBTORCH");
        }
        command
    }

    /// What `cargo metadata` says; `args` narrows it.
    pub fn metadata(&self, args: &[&str]) -> Result<Value> {
        let text = capture(self.cargo().args(["metadata", "--format-version", "1"]).args(args))?;
        serde_json::from_str(&text).context("`cargo metadata` printed no JSON")
    }

    /// The folder that cargo builds into.
    pub fn target(&self) -> Result<PathBuf> {
        let metadata = self.metadata(&["--no-deps"])?;
        Ok(PathBuf::from(metadata["target_directory"].as_str().context("cargo metadata names no target_directory")?))
    }

    /// Builds the release `lora` and returns its path. Of the whole workspace, so that it shares what the tests are made of.
    pub fn build_lora(&self) -> Result<PathBuf> {
        run(self.cargo().args(["build", "--release", "--workspace", "--bin", "lora"]))?;
        Ok(self.target()?.join("release/lora"))
    }
}

/// The command as a user would type it.
pub fn shown(command: &Command) -> String {
    let name = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words: Vec<_> = std::iter::once(name).chain(command.get_args()).map(OsStr::to_string_lossy).collect();
    words.join(" ")
}

/// Runs a command that shares our terminal; a failure names it.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", shown(command));
    }
    Ok(())
}

/// Becomes the command: Ctrl-C and its exit code are then its own, so a training run can save before it stops.
pub fn replace(command: &mut Command) -> Result<()> {
    use std::os::unix::process::CommandExt;
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start `{}`", shown(command)))
}

/// Runs a command and returns what it wrote to stdout; its stderr goes into the error.
pub fn capture(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed ({}): {}", shown(command), output.status, stderr.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The first line that a command prints, or nothing when it cannot run.
pub fn first_line(program: &str, args: &[&str]) -> Option<String> {
    let text = capture(Command::new(program).args(args)).ok()?;
    text.lines().next().map(str::to_owned)
}
