//! What the verbs share about classifiers: their labels before anything is loaded, and their evaluation.

use crate::load::{ModelArgs, Wanted};
use crate::out;
use crate::progress::CountBar;
use anyhow::Result;
use lora_data::{DataOptions, Format, Source, Tokenizer, build_labelled};
use lora_format::{Labels, read_adapter};
use lora_model::ModelConfig;
use lora_train::{ClassReport, Event, evaluate_classes, known_labels, split_texts};

/// The labels of model and adapters, by their configurations alone; `None` for a language model.
///
/// # Errors
/// What is wrong with the folders.
pub(crate) fn labels_of_folders(args: &ModelArgs) -> Result<Option<Labels>> {
    let mut labels = ModelConfig::read(&args.model)?.labels;
    for dir in &args.adapter {
        let folder = read_adapter(dir)?;
        labels = Labels::of_adapter(dir, &folder, labels.as_ref())?.or(labels);
    }
    Ok(labels)
}

/// Evaluates a classifier on labelled texts and prints what was found.
///
/// # Errors
/// What is wrong with model, adapter or data.
pub(crate) fn eval(
    args: &ModelArgs,
    labels: &Labels,
    source: Source,
    tokenizer: &Tokenizer,
    options: &DataOptions,
    batch_size: usize,
    json: bool,
) -> Result<()> {
    let config = ModelConfig::read(&args.model)?;
    let mut options = options.clone();
    if config.layout.embed_positions.is_some() {
        let positions = usize::try_from(config.max_position_embeddings).unwrap_or(usize::MAX);
        options.max_length = options.max_length.min(positions);
    }
    let source = Source { format: source.format.or(Some(Format::Classification)), ..source };
    let mut bar = CountBar::new("tokenising");
    let set = build_labelled(&[source], tokenizer, &options, &known_labels(labels), &mut |done, of| bar.set(done, of))?;
    bar.finish();
    if set.report.truncated > 0 {
        out::note(format!("note: {} of {} texts were cut", set.report.truncated, set.report.read));
    }
    let model = args.load(Wanted::Classes)?.model;
    let mut bar = CountBar::new("evaluating");
    let mut show = |event| {
        if let Event::Evaluating { done, of } = event {
            bar.set(done, of);
        }
    };
    let (texts, targets) = split_texts(set.texts);
    let report = evaluate_classes(&model, &texts, &targets, batch_size, &mut show)?;
    bar.finish();
    if json { out::json(&report) } else { print(&report) }
}

fn print(report: &ClassReport) -> Result<()> {
    out::line(format!("loss        {:.6}", report.loss))?;
    let scores = &report.scores;
    let named = [
        ("accuracy  ", scores.accuracy),
        ("macro F1  ", scores.macro_f1),
        ("mse       ", scores.mse),
        ("pearson r ", scores.pearson),
    ];
    for (name, value) in named {
        if let Some(value) = value {
            out::line(format!("{name}  {value:.4}"))?;
        }
    }
    let width = report.labels.iter().map(|l| l.label.chars().count()).max().unwrap_or(0);
    for l in &report.labels {
        let (name, numbers) = (&l.label, [l.precision, l.recall, l.f1].map(|x| format!("{x:.4}")));
        let [precision, recall, f1] = numbers;
        out::line(format!("  {name:<width$}  precision {precision}  recall {recall}  F1 {f1}  of {}", l.support))?;
    }
    out::line(format!("texts       {}, {} tokens", out::count(report.examples as u64), out::count(report.tokens)))
}
