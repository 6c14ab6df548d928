//! N3, N6: too little memory, and how well it is foreseen.

use crate::lab::{LORA, Lab};
use crate::report::{Row, extent, long};
use e2e::{Done, fixtures, run};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Rows of so many tokens that are all trained.
fn rows(rows: usize, tokens: usize) -> String {
    let ids = |row: usize| (0..tokens).map(|t| 10 + (row * 7 + t * (3 + row % 5)) % 90).collect::<Vec<_>>();
    (0..rows).map(|row| format!("{}\n", serde_json::json!({"input_ids": ids(row), "labels": ids(row)}))).collect()
}

/// A run of this lab in at most so much address space, in KiB.
fn within(lab: &Lab, output: &str, kib: u64, more: &[&str]) -> Done {
    let started = Command::new("bash")
        .args(["-c", "ulimit -v \"$1\"; shift; exec \"$@\"", "bash"])
        .arg(kib.to_string())
        .arg(LORA)
        .args(lab.args(output, more))
        .stdin(Stdio::null())
        .output();
    Done::of(started.unwrap())
}

#[test]
fn n03_no_memory_for_a_tensor() {
    let row = Row::new("N3");
    // Three steps of short rows, of which the second is saved, and one of long ones.
    let train = "max_steps = 4\nsave_steps = 2\nlearning_rate = 1e-3\ngradient_accumulation_steps = 1";
    let dataset = format!("{}{}", rows(6, 6), rows(2, 8000));
    let mut lab = Lab::bare(&fixtures().join("llama"), &dataset, "shuffle = false", train);
    lab.after = &["--set", "data.max_length=8192"];
    lab.run_whole();
    // From where hardly the program fits to where everything does; how much that is depends on the machine.
    let mut limits: Vec<u64> = (430_000..1_200_000).step_by(30_000).collect();
    if !long() {
        // In the quick form the likeliest first, until one has shown it.
        limits.sort_by_key(|limit| limit.abs_diff(610_000));
    }
    let (mut step, mut nameless, mut early, mut enough) = (0, 0, 0, 0);
    for limit in &limits {
        let (run, what) = (format!("run-{limit}"), format!("{limit} KiB"));
        let done = within(&lab, &run, *limit, lab.after);
        lab.all_whole(&run, &what);
        if done.code == Some(0) {
            enough += 1;
        } else if done.stderr.contains("stopped at step 3") {
            let knobs = ["train.per_device_train_batch_size", "data.max_length", "train.gradient_checkpointing"];
            let done = done.exits(1).says(&["memory", "step-3 is whole", "--resume"]).says(&knobs);
            assert_eq!(lab.checkpoints(&run), [2, 3], "the last whole step was saved: {done:#?}");
            // Nobody knows the size of what C++ asked for behind a `new`: it says only that there was nothing left.
            match done.stderr.contains("bad_alloc") {
                true => nameless += 1,
                false => {
                    done.says(&["you tried to allocate", "bytes"]);
                    step += 1;
                }
            }
        } else {
            // Too little to come that far: libtorch does not load, or a small allocation ends the process as a kill would.
            assert!(!done.stderr.contains("panicked"), "{what}: {done:#?}");
            early += 1;
        }
        lab.ends_as_if_nothing_had_happened(&run, &what);
        if if long() { enough == 2 } else { step == 1 } {
            break;
        }
    }
    assert!(step > 0, "no step ran out of memory for a tensor");
    row.held(&format!(
        "{} limits of address space: {step} runs out of memory in the long step told bytes and settings and saved the step \
         before, {nameless} for something without a size, {early} could not come that far, {enough} had enough; with more \
         memory 0 differences",
        step + nameless + early + enough
    ));
}

/// A base with fresh weights by the fixtures' config with some sizes changed.
fn base(dir: &Path, sizes: &serde_json::Value) -> PathBuf {
    let from = fixtures().join("llama");
    let config = dir.join("config");
    std::fs::create_dir(&config).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(name), config.join(name)).unwrap();
    }
    let mut fields: serde_json::Value =
        serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    sizes.as_object().unwrap().iter().for_each(|(key, value)| fields[key] = value.clone());
    std::fs::write(config.join("config.json"), fields.to_string()).unwrap();
    let text = |path: &Path| path.display().to_string();
    run(LORA, &["init-model", "--config", &text(&config.join("config.json")), "--output", &text(&dir.join("model"))])
        .exits(0);
    dir.join("model")
}

/// The largest share by which a foreseen peak may miss the measured one.
const FORESEEN: f64 = 0.15;

#[test]
fn n06_the_peak_is_foreseen() {
    let row = Row::new("N6");
    let middle = serde_json::json!({"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32});
    let vocabulary = serde_json::json!({"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 352, "head_dim": 32, "num_key_value_heads": 4, "vocab_size": 32_000});
    let wide = serde_json::json!({"hidden_size": 768, "num_hidden_layers": 8, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64});
    let cases: [(&str, &serde_json::Value, usize, usize, &[&str]); 11] = [
        ("adapters", &middle, 4, 256, &[]),
        ("with checkpointing", &middle, 8, 256, &["train.gradient_checkpointing=true"]),
        ("selectively", &middle, 4, 256, &["train.gradient_checkpointing=selective"]),
        ("half of the blocks again", &middle, 4, 256, &["train.recompute_layers=4"]),
        (
            "block by block",
            &middle,
            4,
            256,
            &[
                "train.gradient_checkpointing=true",
                "train.gradient_accumulation_steps=2",
                "train.accumulate_by_block=true",
            ],
        ),
        ("of queries and values", &middle, 4, 256, &["lora.target_modules=[\"q_proj\", \"v_proj\"]"]),
        ("with dropout", &middle, 4, 256, &["lora.lora_dropout=0.1"]),
        ("every weight", &middle, 4, 256, &["train.finetuning_type=full"]),
        ("32 000 tokens", &vocabulary, 4, 256, &[]),
        ("51 million weights", &wide, 1, 128, &[]),
        ("in 4 bits", &wide, 1, 128, &["model.quantization=nf4"]),
    ];
    let mut told = Vec::new();
    let cases = &cases[..extent(2, cases.len())];
    for (name, sizes, batch, tokens, settings) in cases {
        let dir = tempfile::tempdir().unwrap();
        let model = base(dir.path(), sizes);
        let train = "learning_rate = 1e-3\nmax_steps = 2\nsave_steps = 0";
        let lab = Lab::bare(&model, &rows(2 * batch, *tokens), "", train);
        let batch = format!("train.per_device_train_batch_size={batch}");
        let mut more = vec![
            "--set",
            &batch,
            "--set",
            "data.max_length=512",
            "--set",
            "lora.lora_dropout=0",
            "--set",
            "lora.r=8",
            "--set",
            "lora.target_modules=all-linear",
        ];
        settings.iter().for_each(|setting| more.extend(["--set", *setting]));
        lab.train("run", &more).exits(0);
        let log = std::fs::read_to_string(lab.path("run/metrics.jsonl")).unwrap();
        let peak = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["peak_memory_bytes"].as_f64();
        let measured = log.lines().filter_map(peak).next_back().unwrap();
        let (config, output) =
            (lab.path("run.toml").display().to_string(), format!("output_dir={}", lab.path("plan").display()));
        let mut args = vec!["plan", &config, "--json", "--set", &output];
        args.extend(&more);
        let plan: serde_json::Value = serde_json::from_str(&run(LORA, &args).exits(0).stdout).unwrap();
        let foreseen = plan["memory_bytes"]["total"].as_f64().unwrap();
        let miss = foreseen / measured - 1.0;
        eprintln!(
            "{name}: {:.0} MB foreseen, {:.0} MB measured: {:+.1} %  {}",
            foreseen / 1e6,
            measured / 1e6,
            100.0 * miss,
            plan["memory_bytes"]
        );
        assert!(miss.abs() < FORESEEN, "{name}: {foreseen} foreseen, {measured} measured");
        told.push(format!("{name} {:.0} for {:.0}", foreseen / 1e6, measured / 1e6));
    }
    row.held(&format!("MB foreseen for MB measured: {}", told.join(", ")));
}
