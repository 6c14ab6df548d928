//! `lora export`: a model or an adapter for other programs.

use crate::failure::usage;
use crate::load::{check_model_folder, check_new_folder};
use crate::out;
use crate::progress::ByteBar;
use anyhow::{Context, Result};
use lora_export::{GgufFileType, GgufReport, export_gguf, export_gguf_lora};
use lora_format::{GgufType, write_atomic};
use std::collections::BTreeMap;
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

impl Verb {
    /// What the flags name that may lie on the hub: models, and adapters.
    pub(crate) fn of_hub(&mut self) -> (Vec<&mut PathBuf>, Vec<&mut PathBuf>) {
        match self {
            Self::Gguf(args) => (vec![&mut args.model], args.adapter.iter_mut().collect()),
            Self::GgufLora(args) => (vec![&mut args.model], vec![&mut args.adapter]),
            Self::Ollama(args) => (vec![&mut args.model], args.adapter.iter_mut().collect()),
        }
    }
}

fn file_type(name: &str) -> Result<GgufFileType, String> {
    GgufFileType::named(name).ok_or_else(|| format!("one of {}", GgufFileType::names().join(", ")))
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
    /// How matrices are stored: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m or q4_0
    #[arg(long = "type", value_name = "TYPE", default_value = "f16", value_parser = file_type)]
    kind: GgufFileType,
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
    /// How matrices are stored: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m or q4_0
    #[arg(long = "type", value_name = "TYPE", default_value = "q8_0", value_parser = file_type)]
    kind: GgufFileType,
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
            let report = model(&args.model, &args.adapter, &args.output, args.kind)?;
            tell(&args.output, args.kind.name(), &report)
        }
        Verb::GgufLora(args) => {
            check_model_folder(&args.model)?;
            refuse_taken(&args.output)?;
            let kind = match args.kind.as_str() {
                "f16" => GgufType::F16,
                "bf16" => GgufType::BF16,
                _ => GgufType::F32,
            };
            let report = export_gguf_lora(&args.model, &args.adapter, &args.output, kind)?;
            tell(&args.output, &args.kind, &report)
        }
        Verb::Ollama(args) => ollama(args),
    }
}

fn model(base: &Path, adapters: &[PathBuf], output: &Path, kind: GgufFileType) -> Result<GgufReport> {
    let mut bar = ByteBar::new("exporting");
    let report = export_gguf(base, adapters, output, kind, &mut |done, of| bar.set(done, of));
    bar.finish();
    Ok(report?)
}

fn ollama(args: &OllamaArgs) -> Result<()> {
    check_model_folder(&args.model)?;
    let shown = args.output.display();
    check_new_folder(&args.output)?;
    std::fs::create_dir_all(&args.output).with_context(|| format!("cannot create {shown}"))?;
    let file = args.output.join("model.gguf");
    let report = model(&args.model, &args.adapter, &file, args.kind).inspect_err(|_| {
        // Nothing was written into it; a folder that holds something else stays.
        let _ = std::fs::remove_dir(&args.output);
    })?;
    write_atomic(&args.output.join("Modelfile"), b"FROM ./model.gguf\n")?;
    tell(&file, args.kind.name(), &report)?;
    out::line(format!("try it       ollama create my-model -f {shown}/Modelfile && ollama run my-model"))
}

fn refuse_taken(output: &Path) -> Result<()> {
    if output.exists() {
        return Err(usage(format!("--output {}: is there already; choose another name", output.display())));
    }
    Ok(())
}

fn tell(output: &Path, kind: &str, report: &GgufReport) -> Result<()> {
    let types: Vec<String> = report.types.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
    let (tensors, bytes) = (report.tensors, out::bytes(report.bytes));
    out::line(format!("{}: {tensors} tensors, {bytes} as {kind} ({})", output.display(), types.join(", ")))?;
    // One line for each pair of types, however many tensors it is.
    let mut pairs: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for fallback in &report.fallbacks {
        pairs.entry((fallback.wanted.name(), fallback.stored.name())).or_default().push(&fallback.tensor);
    }
    for ((wanted, stored), tensors) in pairs {
        let shown = tensors.iter().take(3).copied().collect::<Vec<_>>().join(", ");
        let more = if tensors.len() > 3 { ", ..." } else { "" };
        let n = tensors.len();
        out::note(format!("note: {n} stored as {stored}, as their rows have no {wanted} form: {shown}{more}"));
    }
    report.notes.iter().for_each(|note| out::note(format!("note: {note}")));
    Ok(())
}
