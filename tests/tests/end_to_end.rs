//! The way of a user through the binary: train, go on with new data, generate, merge. What happens when it is killed is in
//! `reliability`.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use e2e::{Done, fixtures, run, small_dataset};
use lora_format::{TensorFile, read_adapter};
use std::path::{Path, PathBuf};

const LORA: &str = env!("CARGO_BIN_EXE_lora-e2e");

fn lora(args: &[&str]) -> Done {
    run(LORA, args)
}

/// A folder with a dataset and a configuration over a fixture model.
struct Run {
    dir: tempfile::TempDir,
}

impl Run {
    fn new(family: &str, more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("train.jsonl"), small_dataset()).unwrap();
        let text = format!(
            "seed = 3\n[model]\npath = {:?}\ndevice = \"cpu\"\nthreads = 1\n[lora]\nr = 4\nlora_dropout = 0.1\n[data]\ntrain = {:?}\neval_split = 4\n\
             max_length = 96\n[train]\nmax_steps = 30\nper_device_train_batch_size = 2\ngradient_accumulation_steps = 2\n\
             learning_rate = 2e-2\nlr_scheduler_type = \"cosine\"\nwarmup_steps = 3\neval_steps = 10\n{more}\n",
            fixtures().join(family),
            dir.path().join("train.jsonl"),
        );
        std::fs::write(dir.path().join("run.toml"), text).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn train(&self, output: &str, more: &[&str]) -> Done {
        let (config, output) = (self.text("run.toml"), self.text(output));
        let mut args = vec!["train", &config, "--output", &output];
        args.extend(more);
        lora(&args)
    }
}

/// The lines of `metrics.jsonl` without what depends on the clock and the machine.
fn metrics(run: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let clean = |line: &str| {
        let mut v: serde_json::Value = serde_json::from_str(line).unwrap();
        for key in ["seconds", "data_seconds", "tokens_per_second", "peak_memory_bytes"] {
            v.as_object_mut().unwrap().remove(key);
        }
        v
    };
    text.lines().map(clean).collect()
}

#[test]
fn a_run_leaves_an_adapter_that_evaluates_generates_and_merges() {
    let r = Run::new("qwen2", "");
    let report = r.train("run", &["--json"]).exits(0);
    let report: serde_json::Value = serde_json::from_str(&report.stdout).unwrap();
    assert_eq!((report["status"].as_str(), report["steps"].as_u64()), (Some("finished"), Some(30)));
    let (before, after) =
        (report["eval_before"]["loss"].as_f64().unwrap(), report["eval_after"]["loss"].as_f64().unwrap());
    assert!(after < 0.8 * before, "evaluation loss {before} -> {after}");

    for file in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "config.resolved.toml",
        "metrics.jsonl",
    ] {
        assert!(r.path("run").join(file).is_file(), "{file}");
    }
    assert!(!r.path("run/config.json").exists(), "an adapter's folder must not look like a model");
    let steps: Vec<_> =
        metrics(&r.path("run")).into_iter().filter_map(|m| m.get("loss").and_then(|_| m["step"].as_u64())).collect();
    assert_eq!(steps, (1..=30).collect::<Vec<_>>());

    let (model, adapter) = (fixtures().join("qwen2").display().to_string(), r.text("run"));
    let (data, merged) = (r.text("train.jsonl"), r.text("merged"));
    let eval = |args: &[&str]| -> f64 {
        let done = lora(&[&["eval", "--data", &data, "--json"], args].concat()).exits(0);
        serde_json::from_str::<serde_json::Value>(&done.stdout).unwrap()["loss"].as_f64().unwrap()
    };
    lora(&["merge", "--model", &model, "--adapter", &adapter, "--output", &merged, "--verify"]).exits(0);
    let (base, tuned, whole) =
        (eval(&["--model", &model]), eval(&["--model", &model, "--adapter", &adapter]), eval(&["--model", &merged]));
    assert!(tuned < base, "{base} -> {tuned}");
    // Two orders of summation in fp32, through two blocks and a softmax.
    const MERGED_TOLERANCE: f64 = 1e-4;
    assert!((tuned - whole).abs() < MERGED_TOLERANCE * tuned, "adapter {tuned}, merged {whole}");
    let prompt = ["--prompt", "adds two 0: ", "--raw", "--max-new-tokens", "8"];
    let speak = |args: &[&str]| lora(&[&["generate"], args, &prompt[..]].concat()).exits(0).stdout;
    assert_eq!(speak(&["--model", &model, "--adapter", &adapter]), speak(&["--model", &merged]));

    // A run's folder is not written over, and a merged model neither.
    r.train("run", &[]).exits(2).says(&["--resume"]);
    lora(&["merge", "--model", &model, "--adapter", &adapter, "--output", &merged]).exits(2).says(&["merged"]);
}

#[test]
fn an_adapter_goes_on_learning_on_new_data() {
    let r = Run::new("llama", "");
    r.train("first", &[]).exits(0);
    let init = format!("lora.init_adapter={}", r.text("first"));
    let report = r.train("second", &["--set", &init, "--set", "seed=9", "--json"]).exits(0);
    let report: serde_json::Value = serde_json::from_str(&report.stdout).unwrap();
    let first: serde_json::Value =
        metrics(&r.path("first")).into_iter().rfind(|m| m.get("eval_loss").is_some()).unwrap();
    let start = report["eval_before"]["loss"].as_f64().unwrap();
    assert!(
        start < 1.5 * first["eval_loss"].as_f64().unwrap(),
        "it starts from {start}, the first run ended at {first}"
    );
    assert_eq!(read_adapter(&r.path("second")).unwrap().config.r, 4);
}

#[test]
fn logits_equal_transformers_and_peft_through_the_binary() {
    // The reach that the fixtures' README names.
    const LOGITS_TOLERANCE: f64 = 1e-5;
    let cases = [
        ("llama", None),
        ("llama", Some("all_linear")),
        ("mistral", Some("lora")),
        ("qwen2", Some("lora")),
        ("qwen3", None),
        ("llama_tied_rope3", Some("lora")),
    ];
    for (family, adapter) in cases {
        let dir = tempfile::tempdir().unwrap();
        let model = fixtures().join(family);
        let reference = model.join("reference.safetensors");
        let out = dir.path().join("out.safetensors");
        let mut args = vec![
            "logits".to_string(),
            "--model".into(),
            model.display().to_string(),
            "--input".into(),
            reference.display().to_string(),
            "--output".into(),
            out.display().to_string(),
        ];
        let mut wanted = reference.clone();
        if let Some(a) = adapter {
            let folder = model.join("adapters").join(a);
            args.extend(["--adapter".into(), folder.display().to_string()]);
            wanted = folder.join("reference.safetensors");
        }
        lora(&args.iter().map(String::as_str).collect::<Vec<_>>()).exits(0);
        let (got, wanted) = (
            TensorFile::open(&out).unwrap().read("logits").unwrap(),
            TensorFile::open(&wanted).unwrap().read("logits").unwrap(),
        );
        let mask = TensorFile::open(&reference)
            .unwrap()
            .read("attention_mask")
            .unwrap()
            .unsqueeze(-1)
            .to_kind(tch::Kind::Float);
        let d = ((&got - &wanted) * &mask).abs().max().double_value(&[]) / wanted.abs().max().double_value(&[]);
        assert!(d < LOGITS_TOLERANCE, "{family} {adapter:?}: {d}");
        assert_eq!(((mask - 1.0) * got).abs().max().double_value(&[]), 0.0, "padding has no logits");
    }
}

#[cfg(unix)]
#[test]
fn answers_are_rewarded_by_a_program() {
    // Any program will do that writes a number for each line: here the longer the answer is, the less it is worth.
    let reward =
        "while read -r line; do rest=${line#*\\\"completion\\\":\\\"}; text=${rest%%\\\"*}; echo \"-${#text}\"; done";
    let run = Run::new("llama", "");
    let rewarded = |output: &str, script: &str| {
        let command = format!("objective.reward_command={}", serde_json::json!(["sh", "-c", script]));
        let mut args = Vec::new();
        let length =
            ["objective.max_completion_length=8", "train.max_steps=12", "train.save_steps=5", "train.eval_steps=6"];
        let fixed = ["objective.name=grpo", "objective.reward=command", "objective.num_generations=4", &command];
        for set in fixed.iter().chain(&length) {
            args.extend(["--set", set]);
        }
        run.train(output, &args)
    };
    rewarded("rewarded", reward).exits(0).says(&["grpo, 4 answers of at most 8 tokens", "held-out reward -"]);
    let lines = metrics(&run.path("rewarded"));
    let of = |name: &str| -> Vec<f64> { lines.iter().filter_map(|line| line[name].as_f64()).collect() };
    assert_eq!((of("eval_reward").len(), of("reward").len()), (3, 12));
    let (first, last) = (of("eval_reward")[0], of("eval_reward")[2]);
    assert!(last > first, "{first} -> {last}");
    // One that breaks down ends the run, which goes on when it is mended.
    let dying =
        "n=0; while read -r line; do n=$((n+1)); [ $n -gt 150 ] && { echo 'no more' >&2; exit 7; }; echo $n; done";
    run.train(
        "none",
        &[
            "--set",
            "objective.name=grpo",
            "--set",
            "objective.reward=command",
            "--set",
            "objective.reward_command=[\"/no/such\"]",
        ],
    )
    .exits(2)
    .says(&["objective.reward_command", "/no/such", "reward.py"]);
    rewarded("broken", dying).exits(1).says(&["exit status: 7", "no more", "step-5", "--resume"]);
}
