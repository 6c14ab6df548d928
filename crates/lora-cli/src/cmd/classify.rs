//! `lora classify`: the label of a text, or of many.

use crate::failure::usage;
use crate::load::{ModelArgs, Wanted};
use crate::out;
use crate::progress::CountBar;
use anyhow::{Context, Result};
use lora_data::{DataOptions, EncodedText, Tokenizer, Truncation, encode};
use lora_format::{Labels, ProblemType};
use lora_model::ModelConfig;
use lora_train::{predict, probabilities};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// A label of several is given to a text from this probability on.
const APPLIES: f64 = 0.5;

/// The flags of `lora classify`.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["text", "texts"])))]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Text to classify
    #[arg(long, value_name = "TEXT")]
    text: Option<String>,
    /// The second text of a pair
    #[arg(long, value_name = "TEXT", conflicts_with = "texts")]
    text_pair: Option<String>,
    /// File of texts: a .jsonl with `text` and, for pairs, `text_pair` in each record, or a text a line
    #[arg(long, value_name = "FILE")]
    texts: Option<PathBuf>,
    /// Longer texts are cut on the right; at most the positions that the model has
    #[arg(long, default_value_t = 2048, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(4..))]
    max_length: u32,
    /// Texts of one forward pass
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    batch_size: u16,
    /// Print JSON: an object for --text, an array for --texts
    #[arg(long)]
    json: bool,
}

/// A text and what it was found to be.
#[derive(Debug, Serialize)]
struct Found {
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    text_pair: Option<String>,
    /// The label, or a list of those that apply; a regression has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<Value>,
    /// By label.
    #[serde(skip_serializing_if = "Option::is_none")]
    probabilities: Option<Map<String, Value>>,
    /// What a regression gives: a number, or a list of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Value>,
}

/// Runs the verb.
///
/// # Errors
/// What is wrong with model, adapter or texts.
pub(crate) fn run(args: &Args) -> Result<()> {
    args.model.check()?;
    let texts = match (&args.text, &args.texts) {
        (Some(text), _) => vec![(text.clone(), args.text_pair.clone())],
        (None, Some(path)) => read_texts(path)?,
        (None, None) => Vec::new(),
    };
    let tokenizer = args.model.tokenizer()?;
    let config = ModelConfig::read(args.model.model.as_path())?;
    let encoded = encode_all(&texts, &tokenizer, &config, args.max_length)?;
    let model = args.model.load(Wanted::Classes)?.model;
    let Some(labels) = &model.config.labels else {
        return Err(lora_model::Error::NoClasses { family: model.config.family.clone() }.into());
    };
    let mut bar = CountBar::new("classifying");
    let mut found = Vec::with_capacity(texts.len());
    let rows = usize::from(args.batch_size);
    for (texts, encoded) in texts.chunks(rows).zip(encoded.chunks(rows)) {
        let logits = predict(&model, encoded, rows)?;
        found.extend(texts.iter().zip(&logits).map(|((text, pair), logits)| of(labels, text, pair.as_ref(), logits)));
        bar.set(found.len(), encoded.len().max(found.len()));
    }
    bar.finish();
    match (args.json, found.as_slice()) {
        (true, [one]) if args.text.is_some() => out::json(one),
        (true, all) => out::json(&all),
        (false, all) => all.iter().try_for_each(|f| out::line(f.line(args.text.is_none()))),
    }
}

fn encode_all(
    texts: &[(String, Option<String>)],
    tokenizer: &Tokenizer,
    config: &ModelConfig,
    max_length: u32,
) -> Result<Vec<EncodedText>> {
    let mut max_length = max_length as usize;
    if config.layout.embed_positions.is_some() {
        max_length = max_length.min(usize::try_from(config.max_position_embeddings).unwrap_or(max_length));
    }
    let options = DataOptions { max_length, truncation: Truncation::Right, ..DataOptions::default() };
    let mut cut = 0;
    let mut all = Vec::with_capacity(texts.len());
    for (i, (text, pair)) in texts.iter().enumerate() {
        let place = || format!("text {}", i + 1);
        let (encoded, was_cut) = encode(tokenizer, text, pair.as_deref(), &options).with_context(place)?;
        if encoded.ids.is_empty() {
            return Err(usage("the text is empty, and the tokenizer puts nothing around it")).with_context(place);
        }
        cut += usize::from(was_cut);
        all.push(encoded);
    }
    if cut > 0 {
        out::note(format!("note: {cut} of {} texts were cut to {max_length} tokens", texts.len()));
    }
    Ok(all)
}

fn of(labels: &Labels, text: &str, pair: Option<&String>, logits: &[f64]) -> Found {
    let p = probabilities(labels.problem, logits);
    let (text, text_pair) = (text.to_string(), pair.cloned());
    if labels.problem == ProblemType::Regression {
        let value = if let [one] = p.as_slice() { json!(one) } else { json!(p) };
        return Found { text, text_pair, label: None, probabilities: None, value: Some(value) };
    }
    let label = match labels.problem {
        ProblemType::SingleLabel => {
            let best = (0..p.len()).fold(0, |best, i| if p[i] > p[best] { i } else { best });
            json!(labels.names.get(best))
        }
        _ => {
            let applies = labels.names.iter().zip(&p).filter(|(_, p)| **p > APPLIES);
            json!(applies.map(|(name, _)| name).collect::<Vec<_>>())
        }
    };
    let by_label = labels.names.iter().zip(&p).map(|(name, p)| (name.clone(), json!(p))).collect();
    Found { text, text_pair, label: Some(label), probabilities: Some(by_label), value: None }
}

impl Found {
    /// `positive  0.98  (negative 0.02)`, with the text behind it where there are many.
    fn line(&self, with_text: bool) -> String {
        let text = if with_text { format!("  {}", self.text) } else { String::new() };
        if let Some(value) = &self.value {
            return format!("{value}{text}");
        }
        let label = match &self.label {
            Some(Value::String(name)) => name.clone(),
            Some(Value::Array(names)) if names.is_empty() => "none".into(),
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
            _ => String::new(),
        };
        let all = self.probabilities.iter().flatten();
        let all: Vec<String> = all.map(|(name, p)| format!("{name} {:.4}", p.as_f64().unwrap_or(f64::NAN))).collect();
        format!("{label}  ({}){text}", all.join(", "))
    }
}

/// Reads texts: of a `.jsonl` file each record's `text` and `text_pair`, of any other file the lines.
fn read_texts(path: &Path) -> Result<Vec<(String, Option<String>)>> {
    let shown = path.display();
    let content = std::fs::read_to_string(path).map_err(|e| usage(format!("--texts {shown}: cannot be read: {e}")))?;
    let json = path.extension().is_some_and(|e| e == "jsonl" || e == "ndjson");
    let lines = content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let texts: Vec<_> = lines
        .map(|(i, line)| match json {
            true => record(line).with_context(|| format!("{shown}:{}", i + 1)),
            false => Ok((line.to_string(), None)),
        })
        .collect::<Result<_>>()?;
    if texts.is_empty() { Err(usage(format!("--texts {shown}: holds no text"))) } else { Ok(texts) }
}

fn record(line: &str) -> Result<(String, Option<String>)> {
    let record: Value = serde_json::from_str(line).map_err(|e| usage(format!("broken JSON: {e}")))?;
    let text = record.get("text").and_then(Value::as_str).ok_or_else(|| usage("a record needs `text`, a string"))?;
    let pair = match record.get("text_pair") {
        None | Some(Value::Null) => None,
        Some(Value::String(pair)) => Some(pair.clone()).filter(|pair| !pair.is_empty()),
        Some(_) => return Err(usage("`text_pair` must be a string")),
    };
    Ok((text.to_string(), pair))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_gets_one_label_several_or_a_value() {
        let labels = |problem| Labels { names: vec!["bad".into(), "good".into()], problem };
        let one = of(&labels(ProblemType::SingleLabel), "t", None, &[0.0, 2.0]);
        assert_eq!(one.label, Some(json!("good")));
        assert!(one.line(true).starts_with("good  (bad 0.1192, good 0.8808)  t"), "{}", one.line(true));
        let several = of(&labels(ProblemType::MultiLabel), "t", None, &[1.0, 2.0]);
        assert_eq!(several.label, Some(json!(["bad", "good"])));
        assert!(of(&labels(ProblemType::MultiLabel), "t", None, &[-1.0, -2.0]).line(false).starts_with("none"));
        let value = of(&Labels { names: vec!["x".into()], problem: ProblemType::Regression }, "t", None, &[1.5]);
        assert_eq!((value.label.clone(), value.line(false)), (None, "1.5".to_string()));
    }

    #[test]
    fn records_without_a_text_are_named() {
        assert_eq!(record(r#"{"text": "a", "text_pair": "b"}"#).unwrap(), ("a".into(), Some("b".into())));
        for wrong in [r#"{"prompt": "a"}"#, r#"{"text": 3}"#, r#"{"text": "a", "text_pair": 3}"#, "{"] {
            assert!(record(wrong).is_err(), "{wrong}");
        }
    }
}
