//! `lora merge`: adapters into their base model, file by file, and proof that the result is right.

use crate::cmd::logits::Input;
use crate::compute::{Compute, STORED_DTYPES};
use crate::failure::usage;
use crate::hub::model_name;
use crate::load::{Wanted, check_model_folder, load};
use crate::out;
use crate::progress::ByteBar;
use anyhow::{Result, bail};
use lora_export::{MergeOptions, merge, verify};
use lora_model::ModelConfig;
use lora_torch::{kind_name, mix_seed, parse_kind};
use std::path::PathBuf;
use std::time::Instant;
use tch::Kind;

/// Threads of libtorch while weights are merged.
const MERGE_THREADS: usize = 4;

/// The flags of `lora merge`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the base model
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Folder of an adapter; several are added up
    #[arg(long, value_name = "DIR", required = true)]
    pub(crate) adapter: Vec<PathBuf>,
    /// Folder to write, new or empty
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// dtype of the result; each tensor keeps the base's when absent
    #[arg(long, value_parser = STORED_DTYPES)]
    dtype: Option<String>,
    /// Check every weight against base and adapters, and the logits of both ways of running
    #[arg(long)]
    verify: bool,
}

/// Runs the verb.
///
/// # Errors
/// What does not fit, and a result that is not what it should be.
pub(crate) fn run(args: &Args) -> Result<()> {
    check_model_folder(&args.model)?;
    let options = MergeOptions { dtype: args.dtype.as_deref().and_then(parse_kind) };
    let start = Instant::now();
    let mut bar = ByteBar::new("merging");
    // Low-rank sums keep pace with a disk on few threads. One core is left to the digests; threads that wait for more work
    // spin, and would take it.
    let before = tch::get_num_threads();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    tch::set_num_threads(cores.saturating_sub(1).clamp(1, MERGE_THREADS) as i32);
    let report = merge(&args.model, &args.adapter, &args.output, &options, &mut |done, of| bar.set(done, of));
    tch::set_num_threads(before);
    bar.finish();
    let report = report?;
    let seconds = start.elapsed().as_secs_f64();
    out::line(format!(
        "{}: {} of {} tensors changed, {} in {} file{}, {:.0} MB/s",
        args.output.display(),
        report.changed.len(),
        report.tensors,
        out::bytes(report.bytes),
        report.shards,
        if report.shards == 1 { "" } else { "s" },
        report.bytes as f64 / 1e6 / seconds
    ))?;
    if report.untied {
        out::line("embedding and head share no weight any more: the adapter changes one of them only")?;
    }
    if report.unpacked > 0 {
        out::line(format!(
            "{} matrices of the base were packed by bitsandbytes; the result holds them unpacked, without quantization_config",
            report.unpacked
        ))?;
    }
    for (adapter, base) in args.adapter.iter().zip(&report.named_bases) {
        let named = base.as_deref().and_then(|b| b.trim_end_matches('/').rsplit('/').next());
        let given = model_name(&args.model);
        if let (Some(named), Some(given)) = (named, given)
            && named != given
        {
            out::note(format!(
                "note: {} names {} as its base model",
                adapter.display(),
                base.as_deref().unwrap_or_default()
            ));
        }
    }
    if args.verify { prove(args) } else { Ok(()) }
}

/// Checks weights, then logits.
fn prove(args: &Args) -> Result<()> {
    let agreement = verify(&args.model, &args.adapter, &args.output)?;
    out::line(format!(
        "weights: {} tensors agree, {} changed ones within {:.3e} ({:.0} % of what rounding explains)",
        agreement.tensors,
        agreement.changed,
        agreement.max_error,
        100.0 * agreement.max_ratio
    ))?;
    let config = match ModelConfig::read(&args.model) {
        Ok(config) => config,
        Err(e) => return out::line(format!("logits: not compared: {e}")),
    };
    let compute = Compute { device: "cpu".into(), dtype: "float32".into(), ..Compute::default() };
    let tokens = Input::from_rows(fixed_tokens(&config));
    let beside = match load(&args.model, &args.adapter, &[], &compute, Wanted::Any) {
        Ok(served) => served.model,
        // Several adapters of which one cannot be weighted are merged in order, and cannot be run beside each other.
        Err(e) if args.adapter.len() > 1 => return out::line(format!("logits: not compared: {e:#}")),
        Err(e) => return Err(e),
    };
    let with_adapter = tokens.logits(&beside, &mut |_, _| {})?;
    drop(beside);
    let merged = tokens.logits(&load(&args.output, &[], &[], &compute, Wanted::Any)?.model, &mut |_, _| {})?;
    let torch = lora_torch::Error::from;
    let largest = |t: tch::Tensor| t.f_abs()?.f_max()?.f_double_value(&[]);
    let difference = with_adapter.f_sub(&merged).and_then(largest).map_err(torch)?;
    let scale = with_adapter.f_abs().and_then(largest).map_err(torch)?;
    let stored = stored_kind(args, &config)?;
    let bound = bound(stored, &config) * scale;
    out::line(format!(
        "logits: largest difference {difference:.3e} of {scale:.3e}, allowed {bound:.3e} for {}",
        kind_name(stored)
    ))?;
    if difference > bound || !difference.is_finite() {
        bail!("{}: the merged model's logits differ by {difference:.3e}, more than {bound:.3e}", args.output.display());
    }
    Ok(())
}

/// Two rows of fixed tokens, as different as a vocabulary allows.
fn fixed_tokens(config: &ModelConfig) -> Vec<Vec<i64>> {
    let vocab = config.vocab_size.unsigned_abs();
    let length = config.max_position_embeddings.clamp(1, 32).unsigned_abs();
    (0..2).map(|row| (0..length).map(|i| (mix_seed(&[row, i]) % vocab) as i64).collect()).collect()
}

/// The coarsest dtype of the weights that were changed.
fn stored_kind(args: &Args, config: &ModelConfig) -> Result<Kind> {
    let name = args.dtype.as_deref().or(config.dtype.as_deref()).unwrap_or("float32");
    parse_kind(name)
        .ok_or_else(|| usage(format!("{}: dtype {name} is not known", args.model.join("config.json").display())))
}

/// The share of the largest logit by which rounding may move one. Each of the 7 matrices of a block and the head moves what
/// passes it by about the unit roundoff of the dtype; such errors add up as their squares do. Four standard deviations, and
/// as much as float32 sums need in any case.
fn bound(stored: Kind, config: &ModelConfig) -> f64 {
    const SUMS: f64 = 1e-4;
    let roundoff = match stored {
        Kind::BFloat16 => 2f64.powi(-9),
        Kind::Half => 2f64.powi(-12),
        _ => 0.0,
    };
    SUMS + 4.0 * roundoff * ((7 * config.num_hidden_layers + 1) as f64).sqrt()
}
