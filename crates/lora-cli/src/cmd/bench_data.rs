//! `lora bench data`: how long it takes from a data file to the first packed batch.

use crate::fetching;
use crate::load::check_model_folder;
use crate::out;
use anyhow::{Result, bail};
use lora_data::{
    CacheUse, Cursor, DataOptions, RowPlan, Sampler, Source, TokenCache, Tokenizer, Truncation, open_dataset,
};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

/// The flags of `lora bench data`.
#[derive(Debug, clap::Args)]
pub(crate) struct DataArgs {
    /// Dataset: a file, a folder, a pattern or dataset_info.json#NAME
    #[arg(value_name = "FILE")]
    data: PathBuf,
    /// Folder of the model whose tokenizer is used
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Chat template that goes before the tokenizer's own: a Jinja file or a name
    #[arg(long, value_name = "FILE|NAME")]
    template: Option<PathBuf>,
    /// Tokens of the longest example and of a packed row; longer examples are cut on the right
    #[arg(long, default_value_t = 1024, value_name = "TOKENS")]
    max_length: usize,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// What was measured. Times are in seconds, and do not count loading the tokenizer, which has its own.
#[derive(Debug, Serialize)]
struct Report {
    rows: usize,
    tokens: usize,
    trained_tokens: usize,
    packed_rows: usize,
    tokenizer_s: f64,
    /// From opening the file to the first batch of packed rows, with tokens made and kept.
    fresh_s: f64,
    /// The same with the tokens that were kept.
    cached_s: f64,
    tokens_per_s: f64,
}

/// Packed rows of the batch that is waited for.
const BATCH: usize = 8;

/// Runs the verb.
///
/// # Errors
/// What is wrong with tokenizer or data.
pub(crate) fn run(args: &DataArgs) -> Result<()> {
    check_model_folder(&args.model)?;
    let start = Instant::now();
    let tokenizer = Tokenizer::load(&args.model)?;
    let tokenizer_s = start.elapsed().as_secs_f64();
    // Beside the data, where there is room for what comes of it.
    let folder = args.data.parent().filter(|folder| folder.is_dir());
    let folder = folder.map_or_else(tempfile::tempdir, tempfile::tempdir_in)?;
    let cache = TokenCache::new(folder.path()).for_every_size();
    let source = fetching::dataset(Source { path: args.data.clone(), ..Source::default() })?;
    let options = DataOptions {
        max_length: args.max_length,
        truncation: Truncation::Right,
        max_affected_share: 1.0,
        template: args.template.clone(),
        ..DataOptions::default()
    };
    let first_batch = || -> Result<_> {
        let start = Instant::now();
        let set = open_dataset(std::slice::from_ref(&source), &tokenizer, &options, Some(&cache), &mut |_, _| {})?;
        let plan = RowPlan::packed(&set.rows.lengths(), args.max_length);
        let (rows, _) = Sampler::new(plan.len(), 0, true).next_batch(Cursor::default(), BATCH);
        let batch = set.rows.batch(rows.into_iter().flat_map(|row| plan.members(row)).collect::<Vec<_>>())?;
        anyhow::ensure!(batch.tokens() > 0, "the first batch is empty");
        Ok((start.elapsed().as_secs_f64(), set, plan.len()))
    };
    let (fresh_s, _, _) = first_batch()?;
    let (cached_s, set, packed_rows) = first_batch()?;
    if !matches!(set.cache, CacheUse::Found(_)) {
        bail!("the tokens were not kept: {:?}", set.cache);
    }
    let tokens = set.rows.tokens();
    let report = Report {
        rows: set.rows.len(),
        tokens,
        trained_tokens: set.rows.trained_tokens(),
        packed_rows,
        tokenizer_s,
        fresh_s,
        cached_s,
        tokens_per_s: tokens as f64 / fresh_s,
    };
    if args.json {
        return out::json(&report);
    }
    out::line(format!("rows          {}, packed into {}", out::count(report.rows as u64), report.packed_rows))?;
    out::line(format!("tokens        {}, {} trained", out::count(tokens as u64), report.trained_tokens))?;
    out::line(format!("tokenizer     {tokenizer_s:.3} s"))?;
    out::line(format!("fresh         {fresh_s:.3} s, {:.0} tokens a second", report.tokens_per_s))?;
    out::line(format!("kept          {cached_s:.3} s to the first batch"))
}
