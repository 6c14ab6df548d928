//! A model with its adapters and tokenizer, loaded with the cheap checks first.

use crate::compute::Compute;
use crate::failure::usage;
use crate::progress::ByteBar;
use crate::serve::Served;
use anyhow::{Context, Result};
use lora_data::Tokenizer;
use lora_format::{AdapterFolder, Labels, read_adapter};
use lora_model::{ModelConfig, absent_head, check_adapter};
use std::path::{Path, PathBuf};

/// What a verb needs the model for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted {
    /// Text: to do this with.
    Language(&'static str),
    /// Labels.
    Classes,
    /// Whatever it gives.
    Any,
}

/// The flags that name a model and its adapters.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// Base model: the folder of a Hugging Face checkpoint, or a model of the hub as OWNER/NAME
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Folder of an adapter to put beside the weights; several are added up, each with its --weight
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Vec<PathBuf>,
    /// What the change of the adapter in the same place is multiplied by; 1 for all when absent
    #[arg(long, value_name = "W", allow_hyphen_values = true)]
    pub(crate) weight: Vec<f64>,
    #[command(flatten)]
    pub(crate) compute: Compute,
}

impl ModelArgs {
    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// Another number of weights than of adapters, or one that is no number.
    pub(crate) fn check(&self) -> Result<()> {
        check_mix(self.adapter.len(), &self.weight)
    }

    /// Loads the model, with the adapters in place.
    ///
    /// # Errors
    /// What is wrong with the folders, each by its name.
    pub(crate) fn load(&self, wanted: Wanted) -> Result<Served> {
        self.check()?;
        load(&self.model, &self.adapter, &self.weight, &self.compute, wanted)
    }

    /// Loads the tokenizer of the model; one that was saved beside the first adapter goes first, as it may have been
    /// changed.
    ///
    /// # Errors
    /// What is wrong with the tokenizer's files.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer> {
        let beside = self.adapter.first().filter(|dir| dir.join("tokenizer.json").is_file());
        check_model_folder(&self.model)?;
        Ok(Tokenizer::load(beside.unwrap_or(&self.model))?)
    }
}

/// Checks that there is a weight for each adapter, or none at all.
///
/// # Errors
/// Another number of weights than of adapters, or one that is no number.
pub(crate) fn check_mix(adapters: usize, weights: &[f64]) -> Result<()> {
    let given = weights.len();
    if given != 0 && given != adapters {
        return Err(usage(format!(
            "--weight was given {given} times for {adapters} adapters; give one for each, or none"
        )));
    }
    match weights.iter().find(|w| !w.is_finite()) {
        Some(w) => Err(usage(format!("--weight {w}: must be a finite number"))),
        None => Ok(()),
    }
}

/// Refuses an output that is a file, or a folder with something in it.
///
/// # Errors
/// When it is taken.
pub(crate) fn check_new_folder(output: &Path) -> Result<()> {
    let holds = std::fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_some());
    if holds || output.is_file() {
        return Err(usage(format!("--output {}: must be a new or empty folder", output.display())));
    }
    Ok(())
}

/// Loads a model with adapters. Configs and the adapters' shapes are checked before any weight of the base is read.
///
/// # Errors
/// What is wrong with the folders, each by its name.
pub(crate) fn load(
    dir: &Path,
    adapters: &[PathBuf],
    weights: &[f64],
    compute: &Compute,
    wanted: Wanted,
) -> Result<Served> {
    check_model_folder(dir)?;
    let device = compute.device()?;
    let mut config = ModelConfig::read(dir)?;
    let kind = compute.kind(&config, device)?;
    let read = |path: &PathBuf| -> Result<(PathBuf, AdapterFolder)> { Ok((path.clone(), read_adapter(path)?)) };
    let folders = adapters.iter().map(read).collect::<Result<Vec<_>>>()?;
    for (path, folder) in &folders {
        if let Some(labels) = Labels::of_adapter(path, folder, config.labels.as_ref())? {
            config = config.for_classes(labels);
        }
    }
    match wanted {
        Wanted::Language(purpose) => config.check_language(purpose)?,
        Wanted::Classes if config.labels.is_none() => {
            return Err(lora_model::Error::NoClasses { family: config.family }.into());
        }
        Wanted::Classes | Wanted::Any => {}
    }
    for (path, folder) in &folders {
        check_adapter(&config, folder).with_context(|| format!("adapter {}", path.display()))?;
    }
    check_head(dir, &config, &folders)?;
    let mut bar = ByteBar::new("loading");
    let model = compute.load(dir, config, kind, device, &mut |done, of| bar.set(done, of))?;
    bar.finish();
    Served::new(model, &folders, weights)
}

/// A head that the checkpoint lacks must be an adapter's.
fn check_head(dir: &Path, config: &ModelConfig, folders: &[(PathBuf, AdapterFolder)]) -> Result<()> {
    let given = |path: &str| folders.iter().any(|(_, folder)| folder.modules.contains_key(path));
    let modules = absent_head(dir, config)?.into_iter().map(|m| m.path);
    let modules: Vec<String> = modules.filter(|path| !given(path)).collect();
    if modules.is_empty() {
        return Ok(());
    }
    let remedy = "give an adapter that was trained on this checkpoint, whose own head goes with it";
    Err(lora_model::Error::NoHead { dir: dir.into(), modules, remedy }.into())
}

/// Refuses a folder that is none, with a word on what is expected.
///
/// # Errors
/// When it is not a folder with a `config.json`.
pub(crate) fn check_model_folder(dir: &Path) -> Result<()> {
    let shown = dir.display();
    if dir.join("config.json").is_file() {
        return Ok(());
    }
    if dir.join("adapter_config.json").is_file() {
        return Err(usage(format!(
            "model {shown}: this is the folder of an adapter; give it with --adapter, and its base model with --model"
        )));
    }
    let what = match (dir.is_dir(), dir.exists()) {
        (true, _) => "the folder has no config.json",
        (false, true) => "is a file and not a folder",
        (false, false) => "there is no such folder",
    };
    Err(usage(format!(
        "model {shown}: {what}; give the folder of a downloaded Hugging Face checkpoint, with config.json, safetensors files \
         and tokenizer.json, or the name of one on the hub, as OWNER/NAME"
    )))
}
