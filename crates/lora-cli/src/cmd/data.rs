//! `lora data`: what will be trained, token by token and in figures.

use crate::cmd::data_cache::{self, CacheArgs};
use crate::failure::usage;
use crate::fetching::{Part, prepare};
use crate::load::check_model_folder;
use crate::out;
use crate::progress::CountBar;
use anyhow::Result;
use lora_data::{
    AnswerKind, CacheUse, DataFigures, DataOptions, DataReport, Example, KnownLabels, PageRow, PreferenceUse,
    PreviewToken, StatsText, TokenSet, Tokenizer, build_labelled, data_page, open_answers, open_dataset, preview,
};
use lora_format::write_atomic;
use lora_train::config::TaskType;
use lora_train::{
    Override, RunConfig, answer_kind, cache_note, data_options, data_sources, data_tokenizer, new_and_old, replayed,
    token_cache, trained_sources,
};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// The two ways to look at data.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// The first examples, with what is trained marked
    Preview(PreviewArgs),
    /// Counts, lengths, and what was cut or left out
    Stats(StatsArgs),
    /// The files in which tokens are kept between runs
    Cache(CacheArgs),
}

/// Which data.
#[derive(Debug, clap::Args)]
struct DataArgs {
    /// Configuration (.toml, .yaml) or dataset (a file, a folder, a pattern, dataset_info.json#NAME, hf://OWNER/NAME); a dataset needs --model
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
    /// Write figures and rows as one self-contained HTML page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// The flags of `lora data preview`.
#[derive(Debug, clap::Args)]
pub(crate) struct PreviewArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Examples to show
    #[arg(long, default_value_t = 3)]
    n: usize,
    /// Examples to pass over first
    #[arg(long, default_value_t = 0)]
    skip: usize,
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

/// Rows on a page that was asked for with figures.
const PAGE_ROWS: usize = 50;

/// Runs the verb.
///
/// # Errors
/// What is wrong with configuration, tokenizer or data.
pub(crate) fn run(verb: &Verb) -> Result<()> {
    match verb {
        Verb::Preview(args) => show_examples(args),
        Verb::Stats(args) => show_stats(args),
        Verb::Cache(args) => data_cache::run(args),
    }
}

/// Reads the data as a run would, but without refusing it for what is cut or left out.
fn read(args: &DataArgs) -> Result<(RunConfig, Tokenizer, TokenSet)> {
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
    let mut config = RunConfig::load(is_config.then_some(args.what.as_path()), &overrides)?;
    let model_dir = prepare(&mut config, Part::Settings, false)?;
    check_model_folder(&model_dir)?;
    let tokenizer = data_tokenizer(&model_dir, &config.data)?;
    let mut options = data_options(&config.data);
    options.max_affected_share = 1.0;
    if options.preference == PreferenceUse::Refuse && !config.objective.compares() {
        options.preference = PreferenceUse::BothSides;
    }
    let mut bar = CountBar::new("tokenising");
    if config.lora.task_type == TaskType::SeqCls && !config.objective.compares() {
        let set = read_labelled(&config, &tokenizer, &options, &mut bar)?;
        return Ok((config, tokenizer, set));
    }
    let sources = data_sources(&trained_sources(&config.data), config.data.hub_cache.as_deref())?;
    let cache = token_cache(&config.data);
    let mut progress = |done, of| bar.set(done, of);
    let mut set = match answer_kind(&config) {
        None => open_dataset(&sources, &tokenizer, &options, cache.as_ref(), &mut progress)?,
        Some(kind) => open_answers(&sources, &tokenizer, &options, kind, cache.as_ref(), &mut progress)?,
    };
    bar.finish();
    set.report.replay = replayed(&config, &set.source_ends);
    cache_note(&set.cache).into_iter().for_each(out::note);
    Ok((config, tokenizer, set))
}

/// The texts of a classifier, as rows of which no token is trained; how many have each label is noted.
fn read_labelled(
    config: &RunConfig,
    tokenizer: &Tokenizer,
    options: &DataOptions,
    bar: &mut CountBar,
) -> Result<TokenSet> {
    let sources = data_sources(&config.data.train, config.data.hub_cache.as_deref())?;
    let named = Some(config.model.labels.clone()).filter(|names| !names.is_empty());
    let known = KnownLabels { names: named, kind: None };
    let set = build_labelled(&sources, tokenizer, options, &known, &mut |done, of| bar.set(done, of))?;
    bar.finish();
    let counts = set.labels.names.iter().zip(set.counts()).map(|(name, count)| format!("{name} {count}"));
    let counts: Vec<String> = counts.collect();
    if !counts.is_empty() {
        out::note(format!("labels: {}", counts.join(", ")));
    }
    let examples: Vec<Example> = set.texts.into_iter().map(|text| text.tokens).collect();
    let source_ends = vec![examples.len()];
    Ok(TokenSet { source_ends, good: vec![], rows: examples.into(), report: set.report, cache: CacheUse::Memory })
}

/// An example as it is shown.
#[derive(Serialize)]
struct Shown {
    origin: String,
    /// What an objective that compares answers takes it for.
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<&'static str>,
    /// Whether it is of the old set, which is trained in part.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    replayed: bool,
    tokens: Vec<PreviewToken>,
}

/// Some of the examples, token by token.
fn shown(config: &RunConfig, set: &TokenSet, tokenizer: &Tokenizer, skip: usize, n: usize) -> Result<Vec<Shown>> {
    let kind = answer_kind(config);
    let answer = |row: usize| match kind? {
        AnswerKind::Pairs => Some(["better", "worse"][row % 2]),
        AnswerKind::Rated => set.good.get(row).map(|good| if *good { "good" } else { "bad" }),
    };
    let each = if kind == Some(AnswerKind::Pairs) { 2 } else { 1 };
    let (new, _) = new_and_old(&config.data, &set.source_ends);
    let show = |row: usize| -> Result<Shown> {
        let example = set.rows.example(row)?;
        let (origin, tokens) = (example.origin.to_string(), preview(&example, tokenizer)?);
        Ok(Shown { origin, answer: answer(row), replayed: row >= new * each, tokens })
    };
    (0..set.rows.len()).skip(skip).take(n).map(show).collect()
}

/// Writes the page, if one was asked for.
fn write_page(args: &DataArgs, set: &TokenSet, figures: &DataFigures, examples: Vec<Shown>) -> Result<()> {
    let Some(path) = &args.html else { return Ok(()) };
    let title = args.what.file_name().map_or_else(|| args.what.display().to_string(), |n| n.to_string_lossy().into());
    let rows: Vec<PageRow> =
        examples.into_iter().map(|Shown { origin, tokens, .. }| PageRow { origin, tokens }).collect();
    let page = data_page(&title, &set.report, figures, &rows, set.rows.len());
    write_atomic(path, page.as_bytes())?;
    out::note(format!("page written to {}", path.display()));
    Ok(())
}

fn figures_of(config: &RunConfig, set: &TokenSet) -> DataFigures {
    DataFigures::of(
        &set.rows.lengths(),
        config.data.max_length as usize,
        config.train.per_device_train_batch_size as usize,
    )
}

fn show_examples(args: &PreviewArgs) -> Result<()> {
    let (config, tokenizer, set) = read(&args.data)?;
    let examples = shown(&config, &set, &tokenizer, args.skip, args.n)?;
    if args.data.json {
        out::json(&examples)?;
    } else {
        for example in &examples {
            let trained = example.tokens.iter().filter(|t| t.trained).count();
            let answer = example.answer.map_or(String::new(), |answer| format!(" {answer} answer,"));
            let old = if example.replayed { " replayed," } else { "" };
            out::line(format!(
                "--- {}:{old}{answer} {} tokens, {trained} trained",
                example.origin,
                example.tokens.len()
            ))?;
            match args.ids {
                true => example.tokens.iter().try_for_each(|t| out::line(table_line(t, out::width())))?,
                false => out::line(marked(&example.tokens, out::colour()))?,
            }
        }
        out::note(format!("{} of {} examples", examples.len(), set.rows.len()));
        if let Some(replay) = set.report.replay {
            let (drawn, all, old) = (replay.drawn, replay.rows_per_pass(), replay.old);
            out::note(format!("a pass has {all} of them, {drawn} of those from the old set of {old}"));
        }
    }
    write_page(&args.data, &set, &figures_of(&config, &set), examples)
}

fn table_line(token: &PreviewToken, width: usize) -> String {
    let trained = if token.trained { "trained" } else { "-" };
    let special = if token.special { "  special" } else { "" };
    let text = format!("{:?}", token.text);
    let room = width.saturating_sub(18 + special.len()).max(8);
    let text = match text.chars().count() > room {
        true => text.chars().take(room - 1).chain(['…']).collect(),
        false => text,
    };
    format!("{:>8}  {trained:<8}{text}{special}", token.id)
}

/// Text that a terminal only shows: what would move its cursor or change its colours is spelt out.
fn harmless(text: &str) -> String {
    let spelt = |c: char| match c {
        '\n' | '\t' => c.to_string(),
        c if c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') => {
            format!("⟨U+{:04X}⟩", c as u32)
        }
        c => c.to_string(),
    };
    text.chars().map(spelt).collect()
}

/// The text of the tokens with what is trained marked: on green where colours are seen, in [[ ]] elsewhere. Colours also
/// change with every token, special tokens are bold and underlined, and line breaks are shown.
fn marked(tokens: &[PreviewToken], colour: bool) -> String {
    let mut text = String::new();
    if !colour {
        for run in tokens.chunk_by(|a, b| a.trained == b.trained) {
            let part: String = run.iter().map(|t| harmless(&t.text)).collect();
            text += &if run[0].trained { format!("[[{part}]]") } else { part };
        }
        return text;
    }
    for (i, token) in tokens.iter().enumerate() {
        let shade = match (token.trained, i % 2 == 1) {
            (true, false) => "30;42",
            (true, true) => "30;102",
            (false, false) => "2",
            (false, true) => "22",
        };
        let special = if token.special { ";1;4" } else { "" };
        // A background that runs over a line break would paint the rest of the line.
        for (j, part) in harmless(&token.text).split('\n').enumerate() {
            if j > 0 {
                text += &format!("\x1b[{shade}m↵\x1b[0m\n");
            }
            if !part.is_empty() {
                text += &format!("\x1b[{shade}{special}m{part}\x1b[0m");
            }
        }
    }
    text
}

#[derive(Serialize)]
struct Stats<'a> {
    #[serde(flatten)]
    report: &'a DataReport,
    #[serde(flatten)]
    figures: &'a DataFigures,
}

fn show_stats(args: &StatsArgs) -> Result<()> {
    let (config, tokenizer, set) = read(&args.data)?;
    let (report, figures) = (&set.report, figures_of(&config, &set));
    let (affected, read, limit) = (report.affected, report.read, config.data.max_affected_share);
    if affected as f64 > limit * read as f64 {
        out::note(format!(
            "warning: {affected} of {read} records are cut or left out, and a run refuses more than the share data.max_affected_share = {limit}"
        ));
    }
    match args.data.json {
        true => out::json(&Stats { report, figures: &figures })?,
        false => out::text(&StatsText { report, figures: &figures, width: out::width() }.to_string())?,
    }
    let examples = if args.data.html.is_some() { shown(&config, &set, &tokenizer, 0, PAGE_ROWS)? } else { Vec::new() };
    write_page(&args.data, &set, &figures, examples)
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
            "\x1b[2;1;4m<s>\x1b[0m\x1b[22mQ\x1b[0m\x1b[30;42man\x1b[0m\x1b[30;102ms\x1b[0m\x1b[30;42;1;4m</s>\x1b[0m"
        );
        let lines = [token("a\n", true, false), token("\x1b[31mb", false, false)];
        assert_eq!(marked(&lines, true), "\x1b[30;42ma\x1b[0m\x1b[30;42m↵\x1b[0m\n\x1b[22m⟨U+001B⟩[31mb\x1b[0m");
        assert_eq!(marked(&lines, false), "[[a\n]]⟨U+001B⟩[31mb");
        let long = token(&"x".repeat(200), true, true);
        assert_eq!(table_line(&long, 60).chars().count(), 60);
    }
}
