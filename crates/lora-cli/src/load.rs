//! A model with its adapter and tokenizer, loaded with the cheap checks first.

use crate::compute::Compute;
use crate::failure::usage;
use crate::progress::ByteBar;
use anyhow::{Context, Result};
use lora_data::Tokenizer;
use lora_format::{AdapterFolder, AdapterModule, LoraTensors, read_adapter};
use lora_model::{Decoder, ModelConfig, modules};
use std::path::{Path, PathBuf};

/// The flags that name a model and its adapter.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// Folder of the base model: a Hugging Face checkpoint
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Folder of an adapter to put beside the weights
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) compute: Compute,
}

impl ModelArgs {
    /// The adapter, if one was given.
    ///
    /// # Errors
    /// More than one adapter.
    pub(crate) fn adapter(&self) -> Result<Option<&Path>> {
        match self.adapter.as_slice() {
            [] => Ok(None),
            [one] => Ok(Some(one)),
            several => Err(usage(format!(
                "--adapter was given {} times, and one adapter at a time can be run; `lora merge` takes several",
                several.len()
            ))),
        }
    }

    /// Loads the model, with the adapter in place.
    ///
    /// # Errors
    /// What is wrong with the folders, each by its name.
    pub(crate) fn load(&self) -> Result<Decoder> {
        load(&self.model, self.adapter()?, &self.compute)
    }

    /// Loads the tokenizer of the model; one that was saved beside the adapter goes first, as it may have been changed.
    ///
    /// # Errors
    /// What is wrong with the tokenizer's files.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer> {
        let beside = self.adapter()?.filter(|dir| dir.join("tokenizer.json").is_file());
        check_model_folder(&self.model)?;
        Ok(Tokenizer::load(beside.unwrap_or(&self.model))?)
    }
}

/// Loads a model with an adapter. Configs and the adapter's shapes are checked before any weight of the base is read.
///
/// # Errors
/// What is wrong with the folders, each by its name.
pub(crate) fn load(dir: &Path, adapter: Option<&Path>, compute: &Compute) -> Result<Decoder> {
    check_model_folder(dir)?;
    let device = compute.device()?;
    let config = ModelConfig::read(dir)?;
    let kind = compute.kind(&config, device)?;
    let adapter = match adapter {
        Some(path) => {
            let folder = read_adapter(path)?;
            check_adapter(&config, &folder).with_context(|| format!("adapter {}", path.display()))?;
            Some((path, folder))
        }
        None => None,
    };
    let mut bar = ByteBar::new("loading");
    let mut model = Decoder::load(dir, kind, device, &mut |done, of| bar.set(done, of))?;
    bar.finish();
    if let Some((path, folder)) = &adapter {
        model.load_adapter(folder).with_context(|| format!("adapter {}", path.display()))?;
    }
    Ok(model)
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
         and tokenizer.json"
    )))
}

/// Whether the adapter's modules are the model's, and of its shapes.
fn check_adapter(config: &ModelConfig, folder: &AdapterFolder) -> Result<()> {
    let known = modules(config);
    for (path, module) in &folder.modules {
        let wrong = |reason: String| lora_model::Error::Module { module: path.clone(), reason };
        let Some(spec) = known.iter().find(|m| m.path == *path) else {
            return Err(wrong("is not in the base model; the adapter belongs to another one".into()).into());
        };
        let (AdapterModule::Linear(lora) | AdapterModule::Embedding(lora)) = module else { continue };
        let LoraTensors { a, b, .. } = lora;
        let (given, wanted) = ([a.size()[1], b.size()[0]], [spec.in_features, spec.out_features]);
        if given != wanted {
            let [i, o] = given;
            let [wi, wo] = wanted;
            return Err(
                wrong(format!("goes from {i} to {o} in the adapter and from {wi} to {wo} in the base model")).into()
            );
        }
    }
    Ok(())
}
