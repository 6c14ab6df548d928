//! `lora data`: what will be trained, token by token and in figures.

use crate::failure::usage;
use crate::load::check_model_folder;
use crate::out;
use crate::progress::CountBar;
use anyhow::Result;
use lora_data::{
    DataOptions, DataReport, Dataset, Example, KnownLabels, PreviewToken, Tokenizer, build_dataset, build_labelled,
    pack, preview,
};
use lora_train::config::TaskType;
use lora_train::{Override, RunConfig, data_options, data_sources};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// The two ways to look at data.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// The first examples, with what is trained marked
    Preview(PreviewArgs),
    /// Counts, lengths, and what was cut or left out
    Stats(StatsArgs),
}

/// Which data.
#[derive(Debug, clap::Args)]
struct DataArgs {
    /// Configuration (.toml, .yaml) or dataset (.json, .jsonl); a dataset needs --model
    #[arg(value_name = "CONFIG|FILE")]
    what: PathBuf,
    /// Folder of the model whose tokenizer is used
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Set any key of the configuration, as data.max_length=512
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The flags of `lora data preview`.
#[derive(Debug, clap::Args)]
pub(crate) struct PreviewArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Examples to show
    #[arg(long, default_value_t = 3)]
    n: usize,
    /// A line for each token, with its id
    #[arg(long)]
    ids: bool,
}

/// The flags of `lora data stats`.
#[derive(Debug, clap::Args)]
pub(crate) struct StatsArgs {
    #[command(flatten)]
    data: DataArgs,
}

/// Runs the verb.
///
/// # Errors
/// What is wrong with configuration, tokenizer or data.
pub(crate) fn run(verb: &Verb) -> Result<()> {
    match verb {
        Verb::Preview(args) => show_examples(args),
        Verb::Stats(args) => show_stats(args),
    }
}

/// Reads the data as a run would, but without refusing it for what is cut or left out.
fn read(args: &DataArgs) -> Result<(RunConfig, Tokenizer, Dataset)> {
    let is_config = args.what.extension().is_some_and(|e| e == "toml" || e == "yaml" || e == "yml");
    let mut overrides = args.set.iter().map(|s| s.parse()).collect::<Result<Vec<Override>, _>>()?;
    let text = |path: &Path| {
        path.to_str().map(str::to_string).ok_or_else(|| usage(format!("{}: the path must be UTF-8", path.display())))
    };
    if let Some(model) = &args.model {
        overrides.push(Override::text("model.path", text(model)?));
    }
    if !is_config {
        if args.model.is_none() {
            return Err(usage(format!(
                "{}: a dataset needs --model DIR, whose tokenizer is used",
                args.what.display()
            )));
        }
        overrides.push(Override::text("data.train", text(&args.what)?));
        // Nothing is written; a configuration must name a folder all the same.
        overrides.push(Override::text("output_dir", "unused"));
    }
    let config = RunConfig::load(is_config.then_some(args.what.as_path()), &overrides)?;
    let model_dir = Path::new(&config.model.path);
    check_model_folder(model_dir)?;
    let tokenizer = Tokenizer::load(model_dir)?;
    let mut options = data_options(&config.data);
    options.max_affected_share = 1.0;
    let mut bar = CountBar::new("tokenising");
    if config.lora.task_type == TaskType::SeqCls {
        let set = read_labelled(&config, &tokenizer, &options, &mut bar)?;
        return Ok((config, tokenizer, set));
    }
    let set =
        build_dataset(&data_sources(&config.data.train)?, &tokenizer, &options, &mut |done, of| bar.set(done, of))?;
    bar.finish();
    Ok((config, tokenizer, set))
}

/// The texts of a classifier, as rows of which no token is trained; how many have each label is noted.
fn read_labelled(
    config: &RunConfig,
    tokenizer: &Tokenizer,
    options: &DataOptions,
    bar: &mut CountBar,
) -> Result<Dataset> {
    let sources = data_sources(&config.data.train)?;
    let named = Some(config.model.labels.clone()).filter(|names| !names.is_empty());
    let known = KnownLabels { names: named, kind: None };
    let set = build_labelled(&sources, tokenizer, options, &known, &mut |done, of| bar.set(done, of))?;
    bar.finish();
    let counts = set.labels.names.iter().zip(set.counts()).map(|(name, count)| format!("{name} {count}"));
    let counts: Vec<String> = counts.collect();
    if !counts.is_empty() {
        out::note(format!("labels: {}", counts.join(", ")));
    }
    Ok(Dataset { examples: set.texts.into_iter().map(|text| text.tokens).collect(), report: set.report })
}

/// An example as it is shown.
#[derive(Serialize)]
struct Shown {
    origin: String,
    tokens: Vec<PreviewToken>,
}

fn show_examples(args: &PreviewArgs) -> Result<()> {
    let (_, tokenizer, set) = read(&args.data)?;
    let shown = |example: &Example| -> Result<Shown> {
        Ok(Shown { origin: example.origin.to_string(), tokens: preview(example, &tokenizer)? })
    };
    let examples = set.examples.iter().take(args.n).map(shown).collect::<Result<Vec<_>>>()?;
    if args.data.json {
        return out::json(&examples);
    }
    for example in &examples {
        let trained = example.tokens.iter().filter(|t| t.trained).count();
        out::line(format!("--- {}: {} tokens, {trained} trained", example.origin, example.tokens.len()))?;
        match args.ids {
            true => example.tokens.iter().try_for_each(|t| out::line(table_line(t)))?,
            false => out::line(marked(&example.tokens, out::colour()))?,
        }
    }
    out::note(format!("{} of {} examples", examples.len(), set.examples.len()));
    Ok(())
}

fn table_line(token: &PreviewToken) -> String {
    let trained = if token.trained { "trained" } else { "-" };
    let special = if token.special { "  special" } else { "" };
    format!("{:>8}  {trained:<8}{:?}{special}", token.id, token.text)
}

/// The text of the tokens with what is trained marked: green and underlined where colours are seen, in [[ ]] elsewhere.
fn marked(tokens: &[PreviewToken], colour: bool) -> String {
    let mut text = String::new();
    for run in tokens.chunk_by(|a, b| (a.trained, a.special && colour) == (b.trained, b.special && colour)) {
        let part: String = run.iter().map(|t| t.text.as_str()).collect();
        let (trained, special) = (run[0].trained, run[0].special);
        text += &match (colour, trained) {
            (false, false) => part,
            (false, true) => format!("[[{part}]]"),
            (true, trained) => {
                let codes = match (trained, special) {
                    (true, false) => "32;4",
                    (true, true) => "32;4;7",
                    (false, true) => "2;7",
                    (false, false) => "2",
                };
                format!("\x1b[{codes}m{part}\x1b[0m")
            }
        };
    }
    text
}

/// How well rows are filled when examples are packed.
#[derive(Serialize)]
struct Packing {
    max_length: u32,
    rows: usize,
    efficiency: f64,
}

#[derive(Serialize)]
struct Stats<'a> {
    #[serde(flatten)]
    report: &'a DataReport,
    packing: Packing,
}

fn show_stats(args: &StatsArgs) -> Result<()> {
    let (config, _, set) = read(&args.data)?;
    let lengths: Vec<usize> = set.examples.iter().map(|e| e.input_ids.len()).collect();
    let max_length = config.data.max_length;
    let rows = pack(&lengths, max_length as usize).len();
    let efficiency = set.report.tokens as f64 / (rows * max_length as usize).max(1) as f64;
    let packing = Packing { max_length, rows, efficiency };
    let (affected, read, limit) = (set.report.affected, set.report.read, config.data.max_affected_share);
    if affected as f64 > limit * read as f64 {
        out::note(format!(
            "warning: {affected} of {read} records are cut or left out, and a run refuses more than the share data.max_affected_share = {limit}"
        ));
    }
    if args.data.json {
        return out::json(&Stats { report: &set.report, packing });
    }
    out::text(&set.report.to_string())?;
    out::line(format!("packed rows     {rows:>12}  of {max_length} tokens, {:.1} % filled", 100.0 * efficiency))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str, trained: bool, special: bool) -> PreviewToken {
        PreviewToken { id: 0, text: text.into(), trained, special }
    }

    #[test]
    fn what_is_trained_is_marked_in_runs() {
        let tokens = [
            token("<s>", false, true),
            token("Q", false, false),
            token("an", true, false),
            token("s", true, false),
            token("</s>", true, true),
        ];
        assert_eq!(marked(&tokens, false), "<s>Q[[ans</s>]]");
        assert_eq!(
            marked(&tokens, true),
            "\x1b[2;7m<s>\x1b[0m\x1b[2mQ\x1b[0m\x1b[32;4mans\x1b[0m\x1b[32;4;7m</s>\x1b[0m"
        );
    }
}
