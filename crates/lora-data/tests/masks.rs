//! What is trained: exactly the answers and the end token after them, in every format.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{build, chain, copied_tokenizer, tokenizer, write};
use lora_data::{DataOptions, Dataset, DropReason, Example, Source, Tokenizer, Truncation, build_dataset, preview};
use proptest::prelude::*;
use serde_json::json;

/// The trained tokens as text, runs of them apart.
fn trained_runs(example: &Example, tokenizer: &Tokenizer) -> Vec<String> {
    let mut runs: Vec<Vec<u32>> = vec![Vec::new()];
    for (&id, &trained) in example.input_ids.iter().zip(&example.trained) {
        match trained {
            true => runs.last_mut().unwrap().push(id),
            false if !runs.last().unwrap().is_empty() => runs.push(Vec::new()),
            false => {}
        }
    }
    runs.iter().filter(|run| !run.is_empty()).map(|run| tokenizer.decode(run, false).unwrap()).collect()
}

fn one(record: &serde_json::Value, tokenizer: &Tokenizer) -> Vec<String> {
    let dataset = build(&record.to_string(), tokenizer, &DataOptions::default()).unwrap();
    assert_eq!(dataset.examples.len(), 1);
    trained_runs(&dataset.examples[0], tokenizer)
}

/// The fixture's tokenizer with another chat template.
fn with_template(source: &str) -> (tempfile::TempDir, Tokenizer) {
    let (folder, tokenizer) = copied_tokenizer(|dir| std::fs::write(dir.join("chat_template.jinja"), source).unwrap());
    (folder, tokenizer.unwrap())
}

const TALK: &str = r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
    {"role": "assistant", "content": "one"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "two"}]}"#;

fn talk() -> serde_json::Value {
    serde_json::from_str(TALK).unwrap()
}

#[test]
fn every_format_trains_the_answer_and_its_end() {
    let t = tokenizer();
    assert_eq!(one(&talk(), &t), ["one<|im_end|>", "two<|im_end|>"]);
    let alpaca = json!({"instruction": "Add", "input": "1 2", "output": "3", "history": [["x", "y"]]});
    assert_eq!(one(&alpaca, &t), ["y<|im_end|>", "3<|im_end|>"]);
    assert_eq!(one(&json!({"prompt": "Q: ", "completion": "A"}), &t), ["A<|im_end|>"]);
    assert_eq!(one(&json!({"prompt": "", "completion": "AB"}), &t), ["B<|im_end|>"]);
    assert_eq!(one(&json!({"text": "abc"}), &t), ["bc<|im_end|>"], "the first token has no predecessor");
    assert_eq!(
        one(&json!({"input_ids": [40, 41, 42], "labels": [-100, -100, 42]}), &t),
        [t.decode(&[42], false).unwrap()]
    );
    let lists = json!({
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        "completion": [{"role": "assistant", "content": "d"}],
    });
    assert_eq!(one(&lists, &t), ["d<|im_end|>"]);
}

#[test]
fn flags_choose_turns() {
    let mut record = talk();
    record["messages"][2]["train"] = json!(false);
    assert_eq!(one(&record, &tokenizer()), ["two<|im_end|>"]);
    record["messages"][2]["train"] = json!(true);
    record["messages"][4]["weight"] = json!(0);
    let t = tokenizer();
    let dataset = build(&record.to_string(), &t, &DataOptions::default()).unwrap();
    assert_eq!(trained_runs(&dataset.examples[0], &t), ["one<|im_end|>"]);
    // What follows the last trained turn is cut off.
    assert!(!t.decode(&dataset.examples[0].input_ids, false).unwrap().contains("two"));

    let marked = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}";
    let (_folder, t) = with_template(marked);
    assert_eq!(one(&talk(), &t), ["one<|im_end|>", "two<|im_end|>"]);
    assert_eq!(one(&record, &t), ["one<|im_end|>"]);
    record["messages"][2]["train"] = json!(false);
    record["messages"][4]["weight"] = json!(1);
    assert_eq!(one(&record, &t), ["two<|im_end|>"]);
}

/// A template that drops the thoughts of earlier turns, as reasoning models do.
const THINKING: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

#[test]
fn a_template_that_rewrites_earlier_turns_gives_a_row_per_turn() {
    let (_folder, t) = with_template(THINKING);
    let mut record = talk();
    record["messages"][2]["content"] = json!("hm</think>one");
    record["messages"][4]["content"] = json!("so</think>two");
    let dataset = build(&record.to_string(), &t, &DataOptions::default()).unwrap();
    let runs: Vec<_> = dataset.examples.iter().map(|example| trained_runs(example, &t)).collect();
    assert_eq!(runs, [["hm</think>one<|im_end|>"], ["so</think>two<|im_end|>"]]);
    assert!(!t.decode(&dataset.examples[1].input_ids, false).unwrap().contains("hm"));
    assert_eq!(dataset.report.split_conversations, 1);

    // A generation prompt that the answer does not begin with.
    let (_folder, t) =
        with_template(&THINKING.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}"));
    let message = build(TALK.replace('\n', " ").as_str(), &t, &DataOptions::default()).unwrap_err().to_string();
    assert!(message.contains("chat_template.jinja") && message.contains("{% generation %}"), "{message}");
}

#[test]
fn an_end_token_after_everything_does_not_split_the_talk() {
    let source = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}";
    let (_folder, t) = with_template(source);
    assert_eq!(one(&talk(), &t), ["one</s>", "two</s>\n<|im_end|>"]);
}

#[test]
fn prompts_can_be_trained_too() {
    let t = tokenizer();
    let options = DataOptions { train_on_prompt: true, ..DataOptions::default() };
    let dataset = build(&json!({"prompt": "Q: ", "completion": "A"}).to_string(), &t, &options).unwrap();
    assert_eq!(trained_runs(&dataset.examples[0], &t), [": A<|im_end|>"]);
    let dataset = build(&talk().to_string(), &t, &options).unwrap();
    let text = t.decode(&dataset.examples[0].input_ids, false).unwrap();
    let after_first = text.strip_prefix("<|im_start|>").unwrap();
    // But never the line break after the last end token.
    assert_eq!(trained_runs(&dataset.examples[0], &t), [after_first.strip_suffix('\n').unwrap()]);
}

#[test]
fn without_a_template_instructions_are_plain_text() {
    let (_folder, t) = copied_tokenizer(|dir| std::fs::remove_file(dir.join("chat_template.jinja")).unwrap());
    let t = t.unwrap();
    let record = json!({"instruction": "Add", "input": "1 2", "output": "3", "system": "S"}).to_string();
    let dataset = build(&record, &t, &DataOptions::default()).unwrap();
    let text = t.decode(&dataset.examples[0].input_ids, false).unwrap();
    assert_eq!(text, "S\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>");
    assert_eq!(trained_runs(&dataset.examples[0], &t), ["3<|im_end|>"]);
    assert_eq!(dataset.report.classic_prompts, 1);
    let message = build(&talk().to_string(), &t, &DataOptions::default()).unwrap_err().to_string();
    assert!(message.contains("no chat template") && message.contains("data.template"), "{message}");

    let (_folder, mut source) = write(talk().to_string(), "jsonl");
    source.max_samples = Some(1);
    let own = common::fixture().join("chat_template.jinja");
    let options = DataOptions { template: Some(own), ..DataOptions::default() };
    let dataset = build_dataset(&[source], &t, &options, &mut |_, _| {}).unwrap();
    assert_eq!(trained_runs(&dataset.examples[0], &t), ["one<|im_end|>", "two<|im_end|>"]);
}

fn lines(records: &[serde_json::Value]) -> String {
    records.iter().map(|record| record.to_string() + "\n").collect()
}

fn with(truncation: Truncation, max_affected_share: f64) -> DataOptions {
    DataOptions { max_length: 16, truncation, max_affected_share, ..DataOptions::default() }
}

#[test]
fn long_rows_are_cut_dropped_or_refused() {
    let t = tokenizer();
    let long = json!({"prompt": "abc", "completion": "0123456789012345678901234567890123456789"});
    let text =
        lines(&[json!({"prompt": "p", "completion": "c"}), long.clone(), json!({"prompt": "p", "completion": "c"})]);
    let full = build(&text, &t, &DataOptions::default()).unwrap();
    assert!(full.examples[1].input_ids.len() > 16);
    assert_eq!(full.report.duplicates, 1);

    let message = build(&text, &t, &with(Truncation::Refuse, 1.0)).unwrap_err().to_string();
    assert!(message.contains("data.jsonl:2:") && message.contains("`data.max_length` = 16"), "{message}");
    let dropped = build(&text, &t, &with(Truncation::Drop, 1.0)).unwrap();
    assert_eq!(dropped.examples.len(), 2);
    assert_eq!(dropped.report.dropped[&DropReason::TooLong].first[0].line, 2);
    let right = build(&text, &t, &with(Truncation::Right, 1.0)).unwrap();
    assert_eq!(right.examples[1].input_ids, full.examples[1].input_ids[..16]);
    let left = build(&text, &t, &with(Truncation::Left, 1.0)).unwrap();
    assert_eq!(left.examples[1].input_ids, full.examples[1].input_ids[full.examples[1].input_ids.len() - 16..]);
    assert!(!left.examples[1].trained[0] && left.examples[1].trained[1]);
    assert_eq!((left.report.truncated, left.report.affected), (1, 1));

    let message = build(&text, &t, &with(Truncation::Left, 0.3)).unwrap_err().to_string();
    assert!(message.contains("1 of 3") && message.contains("1 truncated") && message.contains(":2"), "{message}");

    // Nothing of the answer is left: not kept as a row without loss.
    let prompt = json!({"prompt": "0123456789012345678901234567890123456789", "completion": "c"});
    let text = lines(&[json!({"prompt": "p", "completion": "c"}), prompt]);
    let cut = build(&text, &t, &with(Truncation::Right, 1.0)).unwrap();
    assert_eq!(cut.report.dropped[&DropReason::NoTrainedToken].count, 1);
}

#[test]
fn useless_sets_are_refused() {
    let t = tokenizer();
    let refusal = |text: &str, options: &DataOptions| chain(&build(text, &t, options).unwrap_err());
    let defaults = DataOptions::default();
    let any = DataOptions { max_affected_share: 1.0, ..DataOptions::default() };

    let silent = lines(&[json!({"messages": [{"role": "user", "content": "a"}]})]);
    assert!(refusal(&silent, &any).contains("1 no assistant message"));
    let empty = lines(&[json!({"instruction": "a", "output": ""})]);
    assert!(refusal(&empty, &any).contains("1 empty answer"));
    let mut many = vec![json!({"instruction": "a", "output": "b"}); 18];
    many.extend([json!({"instruction": "a", "output": ""}), json!({"instruction": "a", "output": ""})]);
    let message = refusal(&lines(&many), &defaults);
    assert!(message.contains("2 of 20") && message.contains("2 empty answer") && message.contains(":19"), "{message}");
    assert_eq!(
        build(&lines(&many[..19]), &t, &DataOptions { max_affected_share: 0.06, ..defaults.clone() })
            .unwrap()
            .examples
            .len(),
        18
    );

    let table = [
        (json!({"input_ids": [5, 100_000]}), "`input_ids` holds 100000 at position 1"),
        (json!({"input_ids": [5, -1]}), "holds -1 at position 1"),
        (json!({"input_ids": [5, 6], "labels": [6, 6]}), "`labels` holds 6 at position 0"),
        (json!({"input_ids": [5, 6], "labels": [-100, -100]}), "1 no trained token"),
    ];
    for (record, wanted) in table {
        let message = refusal(&lines(&[record]), &any);
        assert!(message.contains(wanted), "{message}");
    }
    let short = DataOptions { max_length: 1, ..defaults.clone() };
    assert!(refusal(&silent, &short).contains("`data.max_length` is 1"));
    let share = DataOptions { max_affected_share: f64::NAN, ..defaults.clone() };
    assert!(refusal(&silent, &share).contains("max_affected_share"));
    assert!(build_dataset(&[], &t, &defaults, &mut |_, _| {}).is_err());
    assert_eq!(build(&lines(&[json!({"text": "a"})]), &t, &defaults).unwrap().examples.len(), 1);
}

#[test]
fn templates_that_lose_something_are_refused() {
    let refusal = |source: &str, record: &serde_json::Value| {
        let (_folder, t) = with_template(source);
        chain(&build(&record.to_string(), &t, &DataOptions::default()).unwrap_err())
    };
    let chatml = "{% for m in messages %}{% if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let message = refusal(chatml, &talk());
    assert!(message.contains("role `system`") && message.contains("data.jsonl:1"), "{message}");

    let mut tools = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    tools["tools"] = json!([{"name": "f"}]);
    assert!(refusal(chatml, &tools).contains("leaves out the tools"));

    let endless = chatml.replace("<|im_end|>", "");
    tools.as_object_mut().unwrap().shift_remove("tools");
    assert!(refusal(&endless, &tools).contains("never learn to stop"));

    let strict = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}";
    let message = refusal(strict, &talk());
    assert!(message.contains("no system here") && message.contains("data.jsonl:1"), "{message}");
}

/// Several faults, many threads: the first one is named every time.
#[test]
fn the_first_fault_is_named_and_order_is_kept() {
    let t = tokenizer();
    let mut records: Vec<_> = (0..3000).map(|i| json!({"input_ids": [5 + i % 90, 6]})).collect();
    let dataset = build(&lines(&records), &t, &DataOptions::default()).unwrap();
    assert!(
        dataset
            .examples
            .iter()
            .enumerate()
            .all(|(i, e)| e.input_ids[0] as usize == 5 + i % 90 && e.origin.line == i + 1)
    );
    for at in [2500, 1100, 1090] {
        records[at] = json!({"input_ids": [5, 99_999]});
    }
    for _ in 0..5 {
        let message = build(&lines(&records), &t, &DataOptions::default()).unwrap_err().to_string();
        assert!(message.contains("data.jsonl:1091:"), "{message}");
    }
}

#[test]
fn the_report_adds_up_and_progress_ends() {
    let t = tokenizer();
    let (_folder, source) = write(lines(&vec![json!({"prompt": "p", "completion": "c", "id": 7}); 2500]), "jsonl");
    let mut heard = Vec::new();
    let Dataset { examples, report, .. } =
        build_dataset(std::slice::from_ref(&source), &t, &DataOptions::default(), &mut |done, of| {
            heard.push((done, of))
        })
        .unwrap();
    // Records are read as they are needed, so their number is known at the end.
    assert_eq!(heard.first(), Some(&(0, 0)));
    assert_eq!(heard.last(), Some(&(2500, 2500)));
    assert_eq!((report.read, report.kept, report.duplicates), (2500, 2500, 2499));
    assert_eq!(report.tokens, examples.iter().map(|e| e.input_ids.len()).sum::<usize>());
    assert_eq!(report.trained_tokens, 2 * 2500);
    assert_eq!(report.sources[0].ignored_columns["id"], 2500);
    assert_eq!(report.length_histogram.iter().map(|bucket| bucket.examples).sum::<usize>(), 2500);
    assert_eq!((report.end_tokens["<|im_end|>"], report.without_end, report.duplicate_tokens), (2500, 0, 2499 * 3));
    assert_eq!(serde_json::to_value(&report).unwrap()["sources"][0]["format"], "prompt_completion");
    let shown = preview(&examples[0], &t).unwrap();
    assert_eq!(shown.iter().map(|token| token.trained).collect::<Vec<_>>(), examples[0].trained);
}

fn words() -> impl Strategy<Value = String> {
    "(\\PC|[ \n\t]|<\\|im_end\\|>|<think>){1,20}"
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Trained tokens say what the assistant says, to the byte, whatever anyone says.
    #[test]
    fn trained_tokens_are_the_answers(turns in prop::collection::vec((words(), words()), 1..5)) {
        let t = tokenizer();
        let messages: Vec<_> = turns
            .iter()
            .flat_map(|(user, answer)| [json!({"role": "user", "content": user}), json!({"role": "assistant", "content": answer})])
            .collect();
        let wanted: Vec<String> = turns.iter().map(|(_, answer)| format!("{answer}<|im_end|>")).collect();
        prop_assert_eq!(one(&json!({"messages": messages}), &t), wanted);
    }

    /// Prompt and completion are tokenised apart: both begin and end where they should.
    #[test]
    fn completions_are_trained_verbatim(prompt in words(), completion in words()) {
        let t = tokenizer();
        let record = json!({"prompt": prompt, "completion": completion});
        let dataset = build(&record.to_string(), &t, &DataOptions::default()).unwrap();
        let mut ids = t.encode(&prompt, true).unwrap();
        let start = ids.len();
        ids.extend(t.encode(&completion, false).unwrap());
        ids.push(t.eos_token_id().unwrap());
        prop_assert_eq!(&dataset.examples[0].input_ids, &ids);
        prop_assert_eq!(&dataset.examples[0].trained, &(0..ids.len()).map(|i| i >= start).collect::<Vec<_>>());
    }
}

/// `Source` is plain data that a configuration can make.
#[test]
fn sources_are_read_in_order() {
    let t = tokenizer();
    let (_a, first) = write("{\"text\": \"one\"}", "jsonl");
    let (_b, second) = write("[{\"prompt\": \"p\", \"completion\": \"two\"}]", "json");
    let sources: Vec<Source> = vec![first, second];
    let dataset = build_dataset(&sources, &t, &DataOptions::default(), &mut |_, _| {}).unwrap();
    assert_eq!(dataset.examples.len(), 2);
    assert_eq!(trained_runs(&dataset.examples[1], &t), ["two<|im_end|>"]);
    assert_eq!(dataset.report.sources.len(), 2);
}
