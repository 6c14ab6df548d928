//! `lora eval`: loss, perplexity and accuracy over the trained tokens of a dataset, how near written answers are to its own, or how
//! well a classifier does.

use crate::classes;
use crate::failure::usage;
use crate::load::{ModelArgs, Wanted};
use crate::out;
use crate::progress::CountBar;
use crate::train_view::scores_in_words;
use anyhow::Result;
use lora_data::{DataOptions, Format, Rows, Source, build_dataset};
use lora_train::{Event, answer_questions, evaluate, questions};
use std::path::PathBuf;

/// The flags of `lora eval`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Dataset: a file, a folder, a pattern or dataset_info.json#NAME
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Format of its records: alpaca, sharegpt, messages, prompt_completion, text or tokenized; told from the first when absent; a
    /// classifier takes classification
    #[arg(long)]
    format: Option<String>,
    /// Jinja file with a chat template that goes before the tokenizer's own
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Longer examples are cut on the right
    #[arg(long, default_value_t = 2048, value_name = "TOKENS")]
    max_length: usize,
    /// Examples of one forward pass
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    batch_size: u16,
    /// Answer the prompts, too, and compare the answers with those of the data
    #[arg(long)]
    generate: bool,
    /// With --generate: most tokens of an answer
    #[arg(long, default_value_t = 128, value_name = "N", requires = "generate")]
    max_new_tokens: usize,
    /// With --generate: answer the first so many prompts only
    #[arg(long, value_name = "N", requires = "generate", value_parser = clap::value_parser!(u32).range(1..))]
    num_samples: Option<u32>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
///
/// # Errors
/// What is wrong with model, adapter or data.
pub(crate) fn run(args: &Args) -> Result<()> {
    args.model.check()?;
    let tokenizer = args.model.tokenizer()?;
    let format = args.format.as_deref().map(str::parse::<Format>).transpose()?;
    let source = Source { path: args.data.clone(), format, ..Source::default() };
    let options = DataOptions {
        max_length: args.max_length,
        truncation: lora_data::Truncation::Right,
        template: args.template.clone(),
        max_affected_share: 1.0,
        ..DataOptions::default()
    };
    if let Some(labels) = classes::labels_of_folders(&args.model)? {
        if args.generate {
            return Err(usage("--generate: a classifier writes no answers; leave it out"));
        }
        return classes::eval(&args.model, &labels, source, &tokenizer, &options, args.batch_size.into(), args.json);
    }
    let mut bar = CountBar::new("tokenising");
    let set = build_dataset(&[source], &tokenizer, &options, &mut |done, of| bar.set(done, of))?;
    bar.finish();
    let (cut, dropped) = (set.report.truncated, set.report.dropped.values().map(|d| d.count).sum::<usize>());
    if cut + dropped > 0 {
        out::note(format!("note: {cut} of {} examples were cut and {dropped} left out", set.report.read));
    }

    let rows: Rows = set.examples.into();
    let asked = match args.generate {
        true => questions(&rows, &tokenizer, args.num_samples)?,
        false => Vec::new(),
    };
    let model = args.model.load(Wanted::Language("continue text"))?.model;
    let mut bar = CountBar::new("evaluating");
    let mut show = |event| {
        if let Event::Evaluating { done, of } = event {
            bar.set(done, of);
        }
    };
    let mut report = evaluate(&model, &rows, args.batch_size.into(), &mut show)?;
    bar.finish();
    if args.generate {
        let mut bar = CountBar::new("answering");
        let mut show = |event| {
            if let Event::Evaluating { done, of } = event {
                bar.set(done, of);
            }
        };
        report.generated = Some(answer_questions(&model, &tokenizer, &asked, args.max_new_tokens, &mut show)?);
        bar.finish();
    }
    if args.json {
        return out::json(&report);
    }
    out::line(format!("loss        {:.6}", report.loss))?;
    out::line(format!("perplexity  {:.4}", report.perplexity))?;
    out::line(format!("accuracy    {:.4}", report.accuracy))?;
    out::line(format!("tokens      {} of {} examples", out::count(report.tokens), out::count(report.examples as u64)))?;
    let Some(scores) = report.generated else { return Ok(()) };
    out::line(format!("answers     {} to {} prompts", scores_in_words(&scores), out::count(scores.texts as u64)))
}
