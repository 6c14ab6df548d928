//! Packing on models and on real sets: no loss changes, and rows are full.
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use std::path::Path;

use e2e::{fixtures, material};
use lora_data::{Batch, DataOptions, Example, Format, Origin, Source, Tokenizer, Truncation, build_dataset, pack};
use lora_model::{Decoder, Mode, TokenBatch};
use tch::{Device, Kind};

/// Sums of the same products in another order, in fp32: a loss of about 5 moves in its last two digits.
const SAME_LOSS: f64 = 2e-5;
/// The share of positions that packing must fill on real sets.
const FILLED: f64 = 0.98;

fn examples(vocab: u32) -> Vec<Example> {
    let example = |i: u32| {
        let length = 2 + (i * 7) % 19;
        let input_ids: Vec<u32> = (0..length).map(|t| (i * 31 + t * t * 5 + 3) % vocab).collect();
        // The first token of an example is never a target; the last of the one before must not become its context.
        let trained = (0..length).map(|t| t > 0 && !(t + i).is_multiple_of(3) || t + 1 == length).collect();
        Example { input_ids, trained, origin: Origin { file: Path::new("x").into(), record: 1, line: 1 } }
    };
    (0..17).map(example).collect()
}

/// The loss of every target.
fn losses(model: &Decoder, batch: &Batch) -> Vec<f64> {
    let tokens = TokenBatch::new(
        &model.config,
        &batch.input_ids,
        &batch.segment_lens,
        &batch.target_rows,
        &batch.targets,
        Device::Cpu,
    )
    .unwrap();
    tch::no_grad(|| {
        let hidden = model.hidden(&tokens, Mode::Eval, Some(&tokens.target_rows)).unwrap();
        let scores = model.logits(&hidden).unwrap().log_softmax(-1, Kind::Double);
        Vec::try_from(scores.gather(1, &tokens.targets.unsqueeze(1), false).flatten(0, 1).neg()).unwrap()
    })
}

/// Every family, so with windows, learned positions, caps and experts too.
#[test]
fn packed_losses_are_those_of_each_example_alone() {
    let mut families = 0;
    for entry in std::fs::read_dir(fixtures()).unwrap() {
        let folder = entry.unwrap().path();
        // These stretch their positions by the longest text of a batch, as transformers does for a padded batch, too: there
        // the company of an example counts, packed or not.
        let by_longest = ["llama_longrope", "llama_dynamic"].iter().any(|name| folder.ends_with(name));
        if by_longest || !folder.join("model.safetensors").is_file() {
            continue;
        }
        let model = Decoder::load(&folder, Kind::Float, Device::Cpu, &mut |_, _| {}).unwrap();
        let examples = examples(u32::try_from(model.config.vocab_size).unwrap());
        let lengths: Vec<usize> = examples.iter().map(|e| e.input_ids.len()).collect();
        let rows = pack(&lengths, 32);
        assert!(rows.len() < examples.len());
        for row in rows {
            let alone: Vec<f64> =
                row.iter().flat_map(|&i| losses(&model, &Batch::from_examples([&examples[i]]))).collect();
            let packed = losses(&model, &Batch::from_examples(row.iter().map(|&i| &examples[i])));
            assert_eq!(alone.len(), packed.len());
            for (t, (a, b)) in alone.iter().zip(&packed).enumerate() {
                assert!(
                    (a - b).abs() < SAME_LOSS,
                    "{}, target {t} of {row:?}: {a} alone, {b} packed",
                    folder.display()
                );
            }
        }
        families += 1;
    }
    assert!(families >= 10, "{families}");
}

/// The sets of the field at 2,048 tokens, with two tokenizers.
#[test]
fn real_sets_fill_their_rows() {
    let sets = [
        (
            "gsm8k",
            "train.jsonl",
            Some(Format::PromptCompletion),
            &[("prompt", "question"), ("completion", "answer")][..],
        ),
        ("llamafactory-demo", "alpaca_en_demo.json", Some(Format::Alpaca), &[]),
        ("e2e-nlg", "train.txt", None, &[]),
    ];
    for tokenizer in ["tok-gpt2", "tok-qwen2"] {
        let Some(folder) = material(tokenizer) else { return };
        let tokenizer_of_set = Tokenizer::load(&folder).unwrap();
        for (set, file, format, columns) in sets {
            let Some(folder) = material(set) else { return };
            let place = tempfile::tempdir().unwrap();
            let mut path = folder.join(file);
            if file.ends_with(".txt") {
                let lines: String = std::fs::read_to_string(&path)
                    .unwrap()
                    .lines()
                    .filter_map(|line| line.split_once("||"))
                    .map(|(record, said)| {
                        serde_json::json!({"prompt": format!("{record}\n"), "completion": said}).to_string() + "\n"
                    })
                    .collect();
                path = place.path().join("e2e.jsonl");
                std::fs::write(&path, lines).unwrap();
            }
            let columns = columns.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
            let source = Source { path, format, columns, ..Source::default() };
            let options =
                DataOptions { truncation: Truncation::Right, max_affected_share: 1.0, ..DataOptions::default() };
            let data = build_dataset(&[source], &tokenizer_of_set, &options, &mut |_, _| {}).unwrap();
            let lengths: Vec<usize> = data.examples.iter().map(|e| e.input_ids.len()).collect();
            let rows = pack(&lengths, 2048);
            let filled = data.report.tokens as f64 / (2048 * rows.len()) as f64;
            #[allow(clippy::print_stderr)]
            {
                eprintln!(
                    "{set} with {tokenizer}: {} examples, {} tokens, {} rows, {:.3} % filled",
                    lengths.len(),
                    data.report.tokens,
                    rows.len(),
                    100.0 * filled
                );
            }
            assert!(filled >= FILLED, "{set} with {tokenizer}: {filled}");
            let mut seen: Vec<usize> = rows.concat();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..lengths.len()), "nothing lost, nothing twice");
        }
    }
}
