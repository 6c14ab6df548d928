//! `lora init-model`: a checkpoint with fresh random weights, to be trained from the beginning.

use crate::compute::STORED_DTYPES;
use crate::load::check_new_folder;
use crate::out;
use anyhow::{Context, Result};
use lora_format::{TensorFile, create_staging_dir, read_json_object, sync_dir, write_atomic, write_tensors};
use lora_model::{Decoder, ModelConfig};
use lora_torch::{kind_name, parse_kind};
use std::path::{Path, PathBuf};
use tch::{Device, Kind};

/// Files that lie beside a config and go with it.
const BESIDE: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// The flags of `lora init-model`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// config.json of the model; tokenizer files that lie beside it are copied
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Folder to write, new or empty
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Where the weights are drawn from
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// dtype of the weights
    #[arg(long, default_value = "float32", value_parser = STORED_DTYPES)]
    dtype: String,
}

/// Runs the verb.
///
/// # Errors
/// What is wrong with the config, or an output that is taken.
pub(crate) fn run(args: &Args) -> Result<()> {
    let out_dir = &args.output;
    check_new_folder(out_dir)?;
    let kind = parse_kind(&args.dtype).unwrap_or(Kind::Float);
    let mut config = read_json_object(&args.config)?;
    config.remove("torch_dtype");
    config.insert("dtype".into(), kind_name(kind).into());

    let parent = out_dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let staging = create_staging_dir(out_dir)?;
    let text = format!("{:#}\n", serde_json::Value::Object(config));
    write_atomic(&staging.path().join("config.json"), text.as_bytes())?;
    let source = args.config.parent().unwrap_or(Path::new("."));
    for name in BESIDE {
        let from = source.join(name);
        if from.is_file() {
            let bytes = std::fs::read(&from).with_context(|| format!("cannot read {}", from.display()))?;
            write_atomic(&staging.path().join(name), &bytes)?;
        }
    }
    let model = Decoder::fresh(ModelConfig::read(staging.path())?, args.seed, Device::Cpu)?;
    model.save_weights(staging.path())?;
    if kind != Kind::Float {
        convert(&staging.path().join("model.safetensors"), kind)?;
    }
    sync_dir(staging.path())?;
    std::fs::rename(staging.path(), out_dir).with_context(|| format!("cannot rename to {}", out_dir.display()))?;
    // The staged folder has its final name now; there is nothing left to remove.
    let _ = staging.keep();
    sync_dir(parent)?;
    let parameters: i64 =
        lora_model::checkpoint_tensors(&model.config).iter().map(|(_, s)| s.iter().product::<i64>()).sum();
    out::line(format!(
        "{}: {} parameters in {}",
        out_dir.display(),
        out::count(parameters.unsigned_abs()),
        kind_name(kind)
    ))
}

/// Writes a file's tensors again in another dtype.
fn convert(path: &Path, kind: Kind) -> Result<()> {
    let file = TensorFile::open(path)?;
    let names: Vec<String> = file.names().map(String::from).collect();
    let tensors = names
        .into_iter()
        .map(|name| {
            let tensor = file.read(&name)?.f_to_kind(kind).map_err(lora_torch::Error::from)?;
            Ok((name, tensor))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(write_tensors(path, &tensors, file.metadata())?)
}
