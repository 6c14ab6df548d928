//! `lora export`: a model or an adapter for other programs.

use crate::failure::usage;
use crate::load::{check_model_folder, check_new_folder};
use crate::out;
use crate::progress::ByteBar;
use anyhow::{Context, Result};
use lora_export::{GgufReport, export_gguf, export_gguf_lora};
use lora_format::{GgufType, write_atomic};
use std::path::{Path, PathBuf};

/// What to export to.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// A model for llama.cpp, with adapters merged into it, tokenizer and chat template inside
    Gguf(GgufArgs),
    /// An adapter for llama.cpp, to be loaded beside the model
    GgufLora(LoraArgs),
    /// A folder for Ollama: the model and a Modelfile
    Ollama(OllamaArgs),
}

/// The types that matrices can be stored in.
const TYPES: [(&str, GgufType); 5] = [
    ("f32", GgufType::F32),
    ("f16", GgufType::F16),
    ("bf16", GgufType::BF16),
    ("q8_0", GgufType::Q8_0),
    ("q4_0", GgufType::Q4_0),
];

fn type_names() -> Vec<&'static str> {
    TYPES.iter().map(|(name, _)| *name).collect()
}

fn parse_type(name: &str) -> GgufType {
    TYPES.iter().find(|(n, _)| *n == name).map_or(GgufType::F16, |(_, kind)| *kind)
}

/// The flags of `lora export gguf`.
#[derive(Debug, clap::Args)]
pub(crate) struct GgufArgs {
    /// Folder of the base model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of an adapter to merge; several are added up
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// File to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// How matrices are stored
    #[arg(long = "type", value_name = "TYPE", default_value = "f16", value_parser = type_names())]
    kind: String,
}

/// The flags of `lora export gguf-lora`.
#[derive(Debug, clap::Args)]
pub(crate) struct LoraArgs {
    /// Folder of the base model, which names the parts
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of the adapter
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// File to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// How matrices are stored
    #[arg(long = "type", value_name = "TYPE", default_value = "f32", value_parser = ["f32", "f16", "bf16"])]
    kind: String,
}

/// The flags of `lora export ollama`.
#[derive(Debug, clap::Args)]
pub(crate) struct OllamaArgs {
    /// Folder of the base model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of an adapter to merge; several are added up
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// Folder to write, new or empty
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// How matrices are stored
    #[arg(long = "type", value_name = "TYPE", default_value = "q8_0", value_parser = type_names())]
    kind: String,
}

/// Runs the verb.
///
/// # Errors
/// What has no form there, and files that are taken or cannot be written.
pub(crate) fn run(verb: &Verb) -> Result<()> {
    match verb {
        Verb::Gguf(args) => {
            check_model_folder(&args.model)?;
            refuse_taken(&args.output)?;
            let report = model(&args.model, &args.adapter, &args.output, &args.kind)?;
            tell(&args.output, &args.kind, &report)
        }
        Verb::GgufLora(args) => {
            check_model_folder(&args.model)?;
            refuse_taken(&args.output)?;
            let report = export_gguf_lora(&args.model, &args.adapter, &args.output, parse_type(&args.kind))?;
            tell(&args.output, &args.kind, &report)
        }
        Verb::Ollama(args) => ollama(args),
    }
}

fn model(base: &Path, adapters: &[PathBuf], output: &Path, kind: &str) -> Result<GgufReport> {
    let mut bar = ByteBar::new("exporting");
    let report = export_gguf(base, adapters, output, parse_type(kind), &mut |done, of| bar.set(done, of));
    bar.finish();
    Ok(report?)
}

fn ollama(args: &OllamaArgs) -> Result<()> {
    check_model_folder(&args.model)?;
    let shown = args.output.display();
    check_new_folder(&args.output)?;
    std::fs::create_dir_all(&args.output).with_context(|| format!("cannot create {shown}"))?;
    let file = args.output.join("model.gguf");
    let report = model(&args.model, &args.adapter, &file, &args.kind).inspect_err(|_| {
        // Nothing was written into it; a folder that holds something else stays.
        let _ = std::fs::remove_dir(&args.output);
    })?;
    write_atomic(&args.output.join("Modelfile"), b"FROM ./model.gguf\n")?;
    tell(&file, &args.kind, &report)?;
    out::line(format!("try it       ollama create my-model -f {shown}/Modelfile && ollama run my-model"))
}

fn refuse_taken(output: &Path) -> Result<()> {
    if output.exists() {
        return Err(usage(format!("--output {}: is there already; choose another name", output.display())));
    }
    Ok(())
}

fn tell(output: &Path, kind: &str, report: &GgufReport) -> Result<()> {
    out::line(format!("{}: {} tensors, {} as {kind}", output.display(), report.tensors, out::bytes(report.bytes)))?;
    if !report.wider.is_empty() {
        let shown = report.wider.iter().take(4).cloned().collect::<Vec<_>>().join(", ");
        out::note(format!(
            "note: {} tensor{} f16, as rows that are no multiple of 32 have no {kind} form: {shown}",
            report.wider.len(),
            if report.wider.len() == 1 { " is" } else { "s are" }
        ));
    }
    Ok(())
}
