//! Chat templates of the field render as transformers renders them, and mark the same text as generated.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use lora_data::{ChatTemplate, Clock};
use serde_json::{Map, Value, json};

struct Case {
    messages: Vec<Value>,
    tools: Option<Value>,
    add_generation_prompt: bool,
}

fn cases(folder: &Path) -> (BTreeMap<String, Value>, BTreeMap<String, Case>) {
    let file: Value = serde_json::from_slice(&std::fs::read(folder.join("cases.json")).unwrap()).unwrap();
    let tokens = ["bos_token", "eos_token"].map(|name| (name.to_owned(), file[name].clone()));
    let case = |value: &Value| Case {
        messages: value["messages"].as_array().unwrap().clone(),
        tools: Some(value["tools"].clone()).filter(|tools| !tools.is_null()),
        add_generation_prompt: value["add_generation_prompt"].as_bool().unwrap(),
    };
    let cases = file["cases"].as_object().unwrap().iter().map(|(name, value)| (name.clone(), case(value)));
    (tokens.into(), cases.collect())
}

/// The day on which the reference wrote a row that shows the date, in seconds: found by trying every day.
fn clock_of(rendered: &str) -> Clock {
    const DAY: i64 = 86_400;
    let noon = |day: i64| Clock::Fixed(day * DAY + DAY / 2);
    let date = |clock: Clock, format: &str| {
        let source = format!("{{{{ strftime_now('{format}') }}}}");
        let template = ChatTemplate::new(&source, "date", BTreeMap::new()).unwrap().with_clock(clock);
        template.render(&[], None, false, &Map::new()).unwrap()
    };
    let shows =
        |clock: Clock| rendered.contains(&date(clock, "%Y-%m-%d")) || rendered.contains(&date(clock, "%d %b %Y"));
    // 2024-01-01 to 2030-01-01. A template may also show a fixed date, so the latest one counts.
    (19_723..21_915).rev().map(noon).find(|&clock| shows(clock)).unwrap_or_default()
}

/// Spans of characters as spans of bytes.
fn byte_spans(text: &str, spans: &Value) -> Vec<std::ops::Range<usize>> {
    let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let at = |value: &Value| starts[value.as_u64().unwrap() as usize];
    spans.as_array().unwrap().iter().map(|span| at(&span[0])..at(&span[1])).collect()
}

#[test]
fn golden() {
    let Some(folder) = e2e::material("chat-templates") else { return };
    let (tokens, cases) = cases(&folder);
    let (mut rendered, mut refused, mut marked) = (0, 0, 0);
    let mut wrong = Vec::new();
    for line in std::fs::read_to_string(folder.join("golden.jsonl")).unwrap().lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        let path = row["template"].as_str().unwrap();
        let name = format!("{path} on {}", row["case"].as_str().unwrap());
        let source = std::fs::read_to_string(folder.join(path)).unwrap();
        let case = &cases[row["case"].as_str().unwrap()];
        let mut template = ChatTemplate::new(&source, path, tokens.clone()).unwrap();
        if row["uses_strftime_now"] == true {
            template = template.with_clock(clock_of(row["rendered"].as_str().unwrap()));
        }
        let ours = template.render_spans(&case.messages, case.tools.as_ref(), case.add_generation_prompt, &Map::new());
        match (ours, row["rendered"].as_str()) {
            (Ok(ours), Some(text)) if ours.text == text => {
                rendered += 1;
                if let Some(spans) = row.get("assistant_char_spans") {
                    marked += 1;
                    if ours.spans != byte_spans(text, spans) {
                        wrong.push(format!("{name}: spans {:?}, wanted {:?}", ours.spans, byte_spans(text, spans)));
                    }
                }
            }
            (Err(_), None) => refused += 1,
            (Ok(ours), Some(text)) => {
                let at = ours.text.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
                let around = |text: &str| {
                    String::from_utf8_lossy(&text.as_bytes()[at.saturating_sub(20)..(at + 60).min(text.len())])
                        .into_owned()
                };
                wrong.push(format!("{name}: from byte {at} {:?}, wanted {:?}", around(&ours.text), around(text)));
            }
            (Ok(_), None) => wrong.push(format!("{name}: renders, but should be refused: {}", row["error"])),
            (Err(error), Some(_)) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                wrong.push(format!("{name}: {error}: {cause:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} rows differ\n{}", wrong.len(), wrong.join("\n"));
    assert!(rendered > 300 && refused > 30 && marked > 50, "{rendered} rendered, {refused} refused, {marked} marked");
}

/// For templates that exist twice, stock and with generation blocks, both ways to find the trained text agree.
#[test]
fn prefixes_and_generation_blocks_train_the_same_answer() {
    let Some(folder) = e2e::material("chat-templates") else { return };
    let tokens: BTreeMap<String, Value> =
        [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, token)| (name.to_owned(), json!(token))).into();
    let messages =
        [json!({"role": "user", "content": "What is 2 + 2?"}), json!({"role": "assistant", "content": "2 + 2 = 4."})];
    let mut compared = 0;
    for name in ["llama3", "gemma", "qwen2_5", "qwen3_instruct_2507", "phi3", "cohere"] {
        let template = |file: String| {
            let source = std::fs::read_to_string(folder.join("trl").join(&file)).unwrap();
            ChatTemplate::new(&source, &file, tokens.clone()).unwrap()
        };
        let (stock, training) = (template(format!("{name}.jinja")), template(format!("{name}_training.jinja")));
        let prompt = stock.render(&messages[..1], None, true, &Map::new()).unwrap();
        let whole = stock.render(&messages, None, false, &Map::new()).unwrap();
        let marked = training.render_spans(&messages, None, false, &Map::new()).unwrap();
        let by_prefix = whole.strip_prefix(prompt.as_str()).unwrap();
        // A template may mark the answer and its end token one after the other.
        let (Some(first), Some(last)) = (marked.spans.first(), marked.spans.last()) else { panic!("{name}: no span") };
        assert!(marked.spans.windows(2).all(|pair| pair[0].end == pair[1].start), "{name}: {:?}", marked.spans);
        let by_block = &marked.text[first.start..last.end];
        // Some blocks also hold the line break before the answer; the one after the end token is trained in neither.
        assert_eq!(by_prefix.trim(), by_block.trim(), "{name}");
        compared += 1;
    }
    assert_eq!(compared, 6);
}
