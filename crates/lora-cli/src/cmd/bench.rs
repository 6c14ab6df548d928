//! `lora bench`: speed and memory, measured.

use crate::cmd::bench_data::{self, DataArgs};
use crate::cmd::bench_exchange::{self, ExchangeArgs};
use crate::cmd::logits::matrix;
use crate::compute::Compute;
use crate::failure::usage;
use crate::load::check_model_folder;
use crate::out;
use anyhow::Result;
use lora_format::TensorFile;
use lora_model::ModelConfig;
use lora_torch::{Products, use_products};
use lora_train::config::Checkpointing;
use lora_train::{BenchOptions, bench_step};
use std::path::PathBuf;
use tch::Device;

/// What is measured.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// A training step of fixed shape on random tokens
    Step(Box<StepArgs>),
    /// From a data file to the first packed batch: fresh, and with tokens that were kept
    Data(DataArgs),
    /// Exchanges between the processes of a launcher
    Exchange(ExchangeArgs),
}

impl Verb {
    /// The model, which may lie on the hub.
    pub(crate) fn model(&mut self) -> Option<&mut PathBuf> {
        match self {
            Self::Step(args) => Some(&mut args.model),
            Self::Data(args) => Some(&mut args.model),
            Self::Exchange(_) => None,
        }
    }
}

/// The flags of `lora bench step`.
#[derive(Debug, clap::Args)]
pub(crate) struct StepArgs {
    /// Folder of the base model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Rows of a step
    #[arg(long, value_name = "B", value_parser = clap::value_parser!(i64).range(1..=65536))]
    batch: i64,
    /// Tokens of a row
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(i64).range(2..=16_777_216))]
    seq: i64,
    /// Rank of the adapters; lora_alpha is twice that
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(i64).range(1..=65536))]
    r: i64,
    /// Modules that get an adapter: all-linear, or names with commas between them
    #[arg(long, default_value = "all-linear", value_delimiter = ',')]
    targets: Vec<String>,
    /// What is kept for the backward pass: all; all but what norms and gates give; or, where no word is given, the inputs of the
    /// blocks only
    #[arg(long, value_name = "POLICY", value_parser = ["none", "selective", "full", "offload"], num_args = 0..=1, default_value = "none",
          default_missing_value = "full")]
    checkpointing: String,
    /// Blocks, from the first, that are computed again in any case
    #[arg(long, value_name = "N", default_value_t = 0)]
    recompute_layers: u32,
    /// Steps to measure, after two that warm up
    #[arg(long, default_value_t = 5, value_name = "N")]
    steps: u16,
    /// Train every weight instead of adapters
    #[arg(long, conflicts_with_all = ["init_adapter", "targets"])]
    full: bool,
    /// Draw the weights on the device: the model's folder needs its config.json only
    #[arg(long)]
    random: bool,
    /// Folder of an adapter to start from
    #[arg(long, value_name = "DIR", conflicts_with = "targets")]
    init_adapter: Option<PathBuf>,
    /// safetensors file with `input_ids` [batch, seq] to use instead of random tokens
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Who computes products of float32 on the CPU: the widest of the project's own loops that it has, as when absent, those for
    /// AVX2, libtorch, or own and libtorch in turns
    #[arg(long, value_parser = ["own", "avx2", "libtorch", "both"])]
    products: Option<String>,
    #[command(flatten)]
    compute: Compute,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
///
/// # Errors
/// What is wrong with model, adapter or input, or what a step reports.
pub(crate) fn run(verb: &Verb) -> Result<()> {
    match verb {
        Verb::Step(args) => step(args),
        Verb::Exchange(args) => bench_exchange::run(args),
        Verb::Data(args) => bench_data::run(args),
    }
}

fn step(args: &StepArgs) -> Result<()> {
    if !args.random {
        check_model_folder(&args.model)?;
    }
    let device = args.compute.device()?;
    match args.products.as_deref() {
        Some("libtorch") => use_products(Products::Libtorch)?,
        Some("avx2") => use_products(Products::Avx2)?,
        _ => use_products(Products::widest()?)?,
    }
    let both_products = args.products.as_deref() == Some("both");
    let checkpointing = Checkpointing::named(&args.checkpointing).unwrap_or_default();
    if checkpointing.offloads() && device == Device::Cpu {
        return Err(usage(
            "--checkpointing offload: the host computes itself; use --checkpointing full, or a CUDA device",
        ));
    }
    let report = bench_step(&BenchOptions {
        model: args.model.clone(),
        random: args.random,
        batch: args.batch,
        seq: args.seq,
        r: args.r,
        targets: (args.targets != ["all-linear"]).then(|| args.targets.clone()),
        init_adapter: args.init_adapter.clone(),
        full: args.full,
        checkpointing,
        recompute_layers: args.recompute_layers,
        steps: args.steps.into(),
        storage: args.compute.storage(device)?,
        packing: args.compute.packing(),
        kind: args.compute.kind(&ModelConfig::read(&args.model)?, device)?,
        device,
        input_ids: input_ids(args)?,
        both_products,
    })?;
    if args.json {
        return out::json(&report);
    }
    out::line(format!("step          {:.4} s", report.step_s))?;
    out::line(format!("tokens        {:.0} a second", report.tok_s))?;
    out::line(format!(
        "of the rate   {:.3} of {:.1} GFLOP/s in matrix products",
        report.of_matmul_rate, report.matmul_gflops
    ))?;
    let device_memory = report.cuda_mb.map(|mb| format!(", {mb} MiB on the device")).unwrap_or_default();
    out::line(format!("peak memory   {} MiB{device_memory}", report.rss_mb))?;
    if let Some([median, low, high]) = report.libtorch_over_own {
        out::line(format!(
            "libtorch's    {median} times the step with products of our own, quartiles {low} and {high}"
        ))?;
    }
    out::line(format!("trained       {} parameters", out::count(report.trainable.unsigned_abs())))?;
    out::line(format!("losses        {:?}", report.losses))
}

fn input_ids(args: &StepArgs) -> Result<Option<Vec<i64>>> {
    let Some(path) = &args.input else { return Ok(None) };
    let (batch, seq, ids) = matrix(&TensorFile::open(path)?, "input_ids")?;
    if (batch as i64, seq as i64) != (args.batch, args.seq) {
        return Err(usage(format!(
            "{}: `input_ids` is [{batch}, {seq}], and --batch {} --seq {} were given; they must be alike",
            path.display(),
            args.batch,
            args.seq
        )));
    }
    Ok(Some(ids))
}
