//! The way of a user through the binary: train, resume, generate, merge; and what happens when it is killed.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use e2e::{Done, fixtures, has_program, run, small_dataset};
use lora_format::{TensorFile, read_adapter};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

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

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The lines of `metrics.jsonl` without what depends on the clock and the machine.
fn metrics(run: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let clean = |line: &str| {
        let mut v: serde_json::Value = serde_json::from_str(line).unwrap();
        for key in ["seconds", "tokens_per_second", "peak_memory_bytes"] {
            v.as_object_mut().unwrap().remove(key);
        }
        v
    };
    text.lines().map(clean).collect()
}

/// The newest checkpoint's exact state.
fn last_state(run: &Path) -> Vec<u8> {
    bytes(&run.join("checkpoints/step-30/trainer_state.safetensors"))
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
fn a_run_killed_at_any_time_comes_to_the_same_bits() {
    let whole = Run::new("llama", "save_steps = 5");
    whole.train("run", &["--quiet"]).exits(0);
    let parts = Run::new("llama", "save_steps = 5");
    let (config, output) = (parts.text("run.toml"), parts.text("run"));
    // The dataset's path is part of the configuration: use the same.
    std::fs::copy(whole.path("run.toml"), parts.path("run.toml")).unwrap();
    let mut kills = 0;
    for attempt in 0..60u64 {
        let resume = parts.path("run/checkpoints").is_dir();
        let mut args = vec!["train", &config, "--output", &output, "--quiet"];
        if resume
            && std::fs::read_dir(parts.path("run/checkpoints"))
                .unwrap()
                .flatten()
                .any(|e| e.file_name().to_string_lossy().starts_with("step-"))
        {
            args.push("--resume");
        }
        let mut child = Command::new(LORA).args(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        if attempt < 8 {
            std::thread::sleep(Duration::from_millis(40 + 45 * (attempt * 5 % 8)));
            let _ = child.kill();
            let status = child.wait().unwrap();
            kills += u32::from(status.code().is_none());
            continue;
        }
        assert!(child.wait().unwrap().success());
        break;
    }
    assert!(kills >= 3, "only {kills} of 8 kills hit a living run");
    assert_eq!(last_state(&whole.path("run")), last_state(&parts.path("run")), "parameters or moments differ");
    assert_eq!(
        bytes(&whole.path("run/adapter_model.safetensors")),
        bytes(&parts.path("run/adapter_model.safetensors"))
    );
    assert_eq!(metrics(&whole.path("run")), metrics(&parts.path("run")));
}

#[test]
fn ctrl_c_finishes_the_step_saves_and_exits_0() {
    let whole = Run::new("llama", "max_steps = 400\nsave_steps = 0".replace("max_steps = 400\n", "").as_str());
    whole.train("run", &["--quiet"]).exits(0);
    let stopped = Run::new("llama", "save_steps = 0");
    std::fs::copy(whole.path("run.toml"), stopped.path("run.toml")).unwrap();
    let (config, output) = (stopped.text("run.toml"), stopped.text("run"));
    let child = Command::new(LORA)
        .args(["train", &config, "--output", &output, "--json", "--quiet"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Wait for the first steps, then interrupt.
    let log = stopped.path("run/metrics.jsonl");
    for _ in 0..6000 {
        if std::fs::read_to_string(&log).is_ok_and(|t| t.lines().count() > 3) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    run("kill", &["-INT", &child.id().to_string()]).exits(0);
    let done = Done::of(child.wait_with_output().unwrap()).exits(0);
    let report: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
    let steps = report["steps"].as_u64().unwrap();
    assert!(report["status"] == "stopped" || steps == 30, "{report}");
    if steps < 30 {
        stopped.train("run", &["--resume", "--quiet"]).exits(0);
    }
    assert_eq!(last_state(&whole.path("run")), last_state(&stopped.path("run")));
}

#[test]
fn a_full_disk_is_named_and_the_older_checkpoint_stays() {
    if !has_program("strace") {
        return;
    }
    let r = Run::new("llama", "save_steps = 10");
    let (config, output) = (r.text("run.toml"), r.text("run"));
    r.train("run", &["--set", "train.max_steps=10", "--quiet"]).exits(0);
    let state = r.path("run/checkpoints/step-10/trainer_state.safetensors");
    let before = bytes(&state);
    // Each write of the next checkpoint in turn finds the disk full.
    let mut hits = 0;
    for nth in [1, 4, 9, 14, 18] {
        let inject = format!("inject=write:error=ENOSPC:when={nth}+");
        let trace = r.text("trace");
        let done = run(
            "strace",
            &[
                "-f",
                "-qq",
                "-o",
                &trace,
                "-e",
                "trace=write",
                "-e",
                &inject,
                "-P",
                &r.text("run"),
                LORA,
                "train",
                &config,
                "--output",
                &output,
                "--resume",
                "--quiet",
                "--set",
                "train.max_steps=20",
            ],
        );
        if done.code == Some(0) {
            continue;
        }
        hits += 1;
        assert_eq!(done.code, Some(1), "{done:#?}");
        assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
        assert_eq!(bytes(&state), before, "the older checkpoint changed");
    }
    let _ = hits;
    r.train("run", &["--resume", "--quiet", "--set", "train.max_steps=20"]).exits(0);
    assert!(r.path("run/checkpoints/step-20").is_dir());
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
