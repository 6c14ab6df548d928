//! Chat templates of the field render as transformers renders them, and mark the same text as generated.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use lora_data::{ChatTemplate, Clock, DataOptions, Source, Tokenizer, build_dataset, builtin_templates};
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
    #[allow(clippy::print_stderr)]
    {
        eprintln!("{rendered} rows rendered equal, {refused} refused in both, {marked} with equal spans");
    }
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

/// Built-in templates say what the field's templates of the same name say, but for white space and the first token,
/// which those differ in among themselves.
#[test]
fn built_in_templates_are_those_of_the_field() {
    let Some(folder) = e2e::material("chat-templates") else { return };
    let (_, cases) = cases(&folder);
    let names: BTreeMap<&str, &str> = [
        ("alpaca", "alpaca"),
        ("chatml", "chatml"),
        ("gemma", "gemma-it"),
        ("llama2", "llama-2-chat"),
        ("llama3", "llama-3-instruct"),
        ("mistral", "mistral-instruct"),
        ("phi3", "phi-3"),
        ("vicuna", "vicuna"),
        ("zephyr", "zephyr"),
    ]
    .into();
    assert!(builtin_templates().eq(names.keys().copied()));
    let place = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "config.json"] {
        std::fs::copy(e2e::fixtures().join("llama").join(file), place.path().join(file)).unwrap();
    }
    let config = json!({"bos_token": "<s>", "eos_token": "</s>"});
    std::fs::write(place.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let tokenizer = Tokenizer::load(place.path()).unwrap();
    let bare = |text: &str| text.replace("<s>", "").split_whitespace().collect::<String>();
    let mut compared = 0;
    for line in std::fs::read_to_string(folder.join("golden.jsonl")).unwrap().lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        let path = row["template"].as_str().unwrap();
        let Some((name, _)) = names.iter().find(|(_, file)| path == format!("chujiezheng/{file}.jinja")) else {
            continue;
        };
        let (case, Some(wanted)) = (row["case"].as_str().unwrap(), row["rendered"].as_str()) else { continue };
        // The field's file writes a system prompt before the first `[INST]`; Mistral's own tokenizer writes it inside.
        if *name == "mistral" && cases[case].messages[0]["role"] == "system" {
            continue;
        }
        let template = tokenizer.template_named(Path::new(name)).unwrap();
        let Case { messages, add_generation_prompt, .. } = &cases[case];
        let ours = template.render(messages, None, *add_generation_prompt, &Map::new()).unwrap();
        assert_eq!(bare(&ours), bare(wanted), "{name} on {case}");
        compared += 1;
    }
    assert!(compared >= 34, "{compared}");
}

/// Real templates with the tokenizers they were made for: decoding what is trained gives back every answer.
#[test]
fn trained_tokens_of_real_tokenizers_are_the_answers() {
    let words = ["4", " a b\n\nc", "\n\nfirst", "é🦀 ok", "x = [1, 2]\n", "Ende."];
    let table = [
        ("tok-qwen2", None, "<|im_end|>"),
        ("tok-qwen2", Some("chatml"), "<|im_end|>"),
        ("tok-phi3-mini", Some("phi3"), "<|end|>"),
        ("tok-llama2-spm", Some("llama2"), "</s>"),
        ("tok-llama2-spm", Some("mistral"), "</s>"),
        ("tok-llama2-spm", Some("zephyr"), "</s>"),
        ("tok-gpt2", Some("vicuna"), "<|endoftext|>"),
    ];
    for (folder, template, end) in table {
        let Some(folder) = e2e::material(folder) else { return };
        let tokenizer = Tokenizer::load(&folder).unwrap();
        let messages: Vec<Value> = words
            .iter()
            .flat_map(|said| {
                [json!({"role": "user", "content": "ask\n"}), json!({"role": "assistant", "content": said})]
            })
            .collect();
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("talk.jsonl");
        std::fs::write(&path, json!({"messages": messages}).to_string()).unwrap();
        let options = DataOptions { template: template.map(Into::into), ..DataOptions::default() };
        let source = Source { path, ..Source::default() };
        let set = build_dataset(&[source], &tokenizer, &options, &mut |_, _| {}).unwrap();
        let example = &set.examples[0];
        let pairs: Vec<(u32, bool)> = example.input_ids.iter().copied().zip(example.trained.iter().copied()).collect();
        let said: Vec<String> = pairs
            .chunk_by(|a, b| a.1 == b.1)
            .filter(|run| run[0].1)
            .map(|run| tokenizer.decode(&run.iter().map(|(id, _)| *id).collect::<Vec<_>>(), false).unwrap())
            .collect();
        let name = format!("{} with {template:?}", folder.display());
        assert_eq!(said.len(), words.len(), "{name}: {said:?}");
        for (said, word) in said.iter().zip(words) {
            // Some layouts have a space before an answer, and before its end token.
            let answer = said.strip_suffix(end).unwrap_or_else(|| panic!("{name}: {said:?}"));
            let exact = answer == word || answer == format!(" {word}") || answer.trim() == word.trim();
            assert!(exact, "{name}: {said:?} for {word:?}");
        }
        assert_eq!(set.report.end_tokens.get(end), Some(&1), "{name}: {:?}", set.report.end_tokens);
    }
}
