//! From what the user typed to the tokens that the model continues.

use crate::failure::usage;
use crate::serve::Mix;
use anyhow::{Context, Result};
use lora_data::Tokenizer;
use serde_json::{Map, Value, json};
use std::path::Path;

/// What is to be continued.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Prompt {
    /// A text; a user message where there is a chat template.
    Text(String),
    /// A conversation.
    Messages(Vec<Value>),
}

impl Prompt {
    /// The tokens of the prompt. Text is rendered as a user message unless it is `raw` or the tokenizer has no template.
    ///
    /// # Errors
    /// A conversation without a template, or what template and tokenizer report.
    pub(crate) fn encode(&self, tokenizer: &Tokenizer, raw: bool) -> Result<Vec<i64>> {
        let messages = match self {
            Self::Text(text) if raw || tokenizer.template().is_none() => return encode_raw(tokenizer, text),
            Self::Text(text) => vec![json!({"role": "user", "content": text})],
            Self::Messages(messages) => messages.clone(),
        };
        let template = tokenizer.template().ok_or_else(|| {
            usage(format!(
                "{}: the tokenizer has no chat template, so messages cannot be rendered; give text",
                tokenizer.dir().display()
            ))
        })?;
        let text = template.render(&messages, None, true, &Map::new())?;
        Ok(wide(tokenizer.encode(&text, false)?))
    }
}

/// The text as training has it before a completion: with what the tokenizer puts in front, without an end token.
fn encode_raw(tokenizer: &Tokenizer, text: &str) -> Result<Vec<i64>> {
    let mut ids = tokenizer.encode(text, true)?;
    let eos = tokenizer.eos_token_id();
    if eos.is_some() && ids.last().copied() == eos && tokenizer.encode("", true)?.last().copied() == eos {
        ids.pop();
    }
    Ok(wide(ids))
}

fn wide(ids: Vec<u32>) -> Vec<i64> {
    ids.into_iter().map(i64::from).collect()
}

/// A prompt, and the adapters that are to answer it where those are not all.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Request {
    pub(crate) prompt: Prompt,
    pub(crate) adapters: Option<Mix>,
}

/// Reads prompts: of a `.jsonl` file each record's `prompt` (text or messages) or `messages`, of any other file the lines.
/// Assistant messages at the end of a conversation are the answer, and left out.
///
/// # Errors
/// A file that cannot be read or holds no prompt, and a record that has none, by its line.
pub(crate) fn read_prompts(path: &Path) -> Result<Vec<Request>> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| usage(format!("--prompts {}: cannot be read: {e}", path.display())))?;
    let json = path.extension().is_some_and(|e| e == "jsonl" || e == "ndjson");
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompts: Vec<Request> = lines
        .map(|(i, line)| match json {
            true => record(line).with_context(|| format!("{}:{}", path.display(), i + 1)),
            false => Ok(Request { prompt: Prompt::Text(line.to_string()), adapters: None }),
        })
        .collect::<Result<_>>()?;
    if prompts.is_empty() {
        return Err(usage(format!("--prompts {}: holds no prompt", path.display())));
    }
    Ok(prompts)
}

fn record(line: &str) -> Result<Request> {
    let record: Value = serde_json::from_str(line).map_err(|e| usage(format!("broken JSON: {e}")))?;
    Ok(Request { prompt: prompt_of(&record)?, adapters: adapters_of(&record)? })
}

/// `"adapter": "poet"`, `"adapter": {"poet": 0.7, "lawyer": 0.3}`, or `"adapter": null` for the base alone.
fn adapters_of(record: &Value) -> Result<Option<Mix>> {
    let wrong = || usage("`adapter` must be a name, a table of names and weights, or null");
    match record.get("adapter") {
        None => Ok(None),
        Some(Value::Null) => Ok(Some(Vec::new())),
        Some(Value::String(name)) => Ok(Some(vec![(name.clone(), 1.0)])),
        Some(Value::Object(table)) => {
            let one = |(name, weight): (&String, &Value)| Ok((name.clone(), weight.as_f64().ok_or_else(wrong)?));
            table.iter().map(one).collect::<Result<Mix>>().map(Some)
        }
        Some(_) => Err(wrong()),
    }
}

fn prompt_of(record: &Value) -> Result<Prompt> {
    match record.get("prompt").or_else(|| record.get("messages")) {
        Some(Value::String(text)) => Ok(Prompt::Text(text.clone())),
        Some(Value::Array(messages)) => {
            let mut messages = messages.clone();
            while messages.last().and_then(|m| m.get("role")).is_some_and(|role| role == "assistant") {
                messages.pop();
            }
            if messages.is_empty() {
                return Err(usage("the conversation has no message before the assistant's"));
            }
            Ok(Prompt::Messages(messages))
        }
        _ => Err(usage("a record needs `prompt` (text or messages) or `messages`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_every_kind_are_read_and_others_are_named() {
        assert_eq!(record(r#"{"prompt": "a"}"#).unwrap().prompt, Prompt::Text("a".into()));
        let mix = record(r#"{"prompt": "a", "adapter": {"x": 0.5, "y": -1}}"#).unwrap().adapters;
        assert_eq!(mix, Some(vec![("x".to_string(), 0.5), ("y".to_string(), -1.0)]));
        assert_eq!(record(r#"{"prompt": "a", "adapter": null}"#).unwrap().adapters, Some(Vec::new()));
        assert_eq!(record(r#"{"prompt": "a", "adapter": "x"}"#).unwrap().adapters, Some(vec![("x".to_string(), 1.0)]));
        let asked =
            record(r#"{"messages": [{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#).unwrap();
        assert_eq!(asked.prompt, Prompt::Messages(vec![json!({"role":"user","content":"a"})]));
        for wrong in [
            r#"{"prompt": "a", "adapter": 3}"#,
            r#"{"prompt": "a", "adapter": {"x": "y"}}"#,
            r#"{"text": "a"}"#,
            "{",
            r#"{"messages": []}"#,
        ] {
            assert!(record(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_broken_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.jsonl");
        std::fs::write(&path, "{\"prompt\": \"a\"}\n\n{\"prompt\": 3}\n").unwrap();
        let message = format!("{:#}", read_prompts(&path).unwrap_err());
        assert!(message.contains("p.jsonl:3"), "{message}");
        let plain = dir.path().join("p.txt");
        std::fs::write(&plain, "one\n\ntwo\n").unwrap();
        assert_eq!(read_prompts(&plain).unwrap().len(), 2);
    }
}
