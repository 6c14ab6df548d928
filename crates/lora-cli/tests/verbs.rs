//! The verbs on fixtures: what they print, and what they leave.
#![allow(clippy::unwrap_used)] // a helper that fails is a failed test

mod common;

use common::{Done, Place, fixture};
use std::path::Path;
use std::time::{Duration, Instant};

const FILES: [&str; 7] = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "config.resolved.toml",
    "metrics.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
];

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn a_run_leaves_the_documented_files_and_says_what_to_type_next() {
    let place = Place::new();
    let model = fixture("llama");
    place.config("c.toml", &model, "train.jsonl", "", "max_steps = 4\nlearning_rate = 1e-2");
    let done = place.lora("train c.toml --set data.eval_split=4").exits(0);
    for file in FILES {
        assert!(place.path("run").join(file).is_file(), "{file}");
    }
    assert!(place.path("run/checkpoints/step-4/manifest.json").is_file());
    for word in ["finished", "4 of 4", "held-out loss", "lora generate", "--raw", "lora merge", "--adapter run"] {
        assert!(done.stdout.contains(word), "{word}: {done:#?}");
    }
    for word in ["42 144 parameters", "r = 4", "48 examples".replace("48", "44").as_str(), "step 4/4", "saved"] {
        assert!(done.stderr.contains(word), "{word}: {done:#?}");
    }

    let found = place.lora("inspect run --json").exits(0).json();
    assert_eq!((found["kind"].as_str(), found["last_step"]["step"].as_u64()), (Some("run"), Some(4)));
    assert_eq!(found["checkpoints"][0]["whole"], true);
    assert_eq!((found["adapter"]["modules"].as_u64(), found["adapter"]["parameters"].as_u64()), (Some(14), Some(4480)));
    // A byte of a checkpoint that changed is seen.
    let state = place.path("run/checkpoints/step-4/adapter_model.safetensors");
    let mut bytes = read(&state);
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&state, bytes).unwrap();
    assert_eq!(place.lora("inspect run --json").exits(0).json()["checkpoints"][0]["whole"], false);
}

#[test]
fn every_so_many_th_step_and_the_last_are_written() {
    let place = Place::new();
    place.config("c.toml", &fixture("llama"), "train.jsonl", "", "max_steps = 7\nlogging_steps = 3");
    place.lora("train c.toml").exits(0);
    let text = std::fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    let steps: Vec<u64> = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|line| line.get("loss").is_some())
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [3, 6, 7]);
}

#[test]
fn nothing_is_written_by_looking_ahead() {
    let place = Place::new();
    place.config("c.toml", &fixture("llama"), "train.jsonl", "", "max_steps = 4");
    let summary = place.lora("train c.toml --dry-run --json").exits(0).json();
    assert_eq!((summary["steps"]["total"].as_u64(), summary["trained"]["parameters"].as_u64()), (Some(4), Some(4480)));
    let config = place.lora("train c.toml --print-config --set lora.r=2").exits(0).stdout;
    assert!(config.contains("r = 2") && config.contains("weight_decay = 0.0"), "{config}");
    let plan = place.lora("plan c.toml --json").exits(0).json();
    // Trained parameters, gradients and two moments, four bytes each.
    assert_eq!(plan["memory_bytes"]["trained"].as_u64(), Some(16 * 4480));
    assert_eq!(plan["memory_bytes"]["weights"].as_u64(), Some(4 * 42_144));
    assert!(plan["operations_per_step"].as_f64().unwrap() > 0.0);
    assert!(!place.path("run").exists());
}

/// Waits until a run has done some steps, so that an interrupt comes in the middle.
fn wait_for_steps(place: &Place, lines: usize) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(60) {
        let text = std::fs::read_to_string(place.path("run/metrics.jsonl")).unwrap_or_default();
        if text.lines().count() >= lines {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("no step was done");
}

fn interrupt(pid: u32) {
    let done = std::process::Command::new("kill").args(["-INT", &pid.to_string()]).status().unwrap();
    assert!(done.success());
}

#[test]
fn an_interrupted_run_stops_in_order_and_resumes_to_the_same_bits() {
    let model = fixture("llama");
    let train = "max_steps = 300\nlearning_rate = 1e-2\nsave_steps = 50";
    let (whole, parts) = (Place::new(), Place::new());
    for place in [&whole, &parts] {
        place.config("c.toml", &model, "train.jsonl", "lora_dropout = 0.1", train);
    }
    whole.lora("train c.toml --quiet").exits(0);

    let child = parts.spawn("train c.toml --json");
    wait_for_steps(&parts, 3);
    interrupt(child.id());
    let stopped = Done::of(child.wait_with_output().unwrap()).exits(0).says(&["finishing the step", "Ctrl-C again"]);
    let report = stopped.json();
    assert_eq!(report["status"], "stopped", "{report}");
    assert!(report["steps"].as_u64().unwrap() < 300);
    assert!(!parts.path("run/adapter_model.safetensors").exists(), "the result of a run that has not ended");

    // Without a configuration: the run's own.
    let done = parts.lora("train --resume --output run").exits(0);
    assert!(done.stdout.contains("finished after step 300 of 300"), "{done:#?}");
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        assert_eq!(read(&whole.path("run").join(file)), read(&parts.path("run").join(file)), "{file}");
    }
}

#[test]
fn a_second_interrupt_leaves_at_once() {
    const ATTEMPTS: usize = 5;
    for _ in 0..ATTEMPTS {
        let place = Place::new();
        let train = "max_steps = 100000\ngradient_accumulation_steps = 48";
        place.config("c.toml", &fixture("llama"), "train.jsonl", "", train);
        let child = place.spawn("train c.toml --quiet --set train.per_device_train_batch_size=1");
        wait_for_steps(&place, 1);
        interrupt(child.id());
        std::thread::sleep(Duration::from_millis(20));
        interrupt(child.id());
        let start = Instant::now();
        let done = Done::of(child.wait_with_output().unwrap());
        assert!(start.elapsed() < Duration::from_secs(5));
        if done.code == Some(130) {
            return;
        }
        // The step ended between the two signals, so that the run was saved and left in order.
        assert!(done.code == Some(0) && done.stdout.contains("stopped"), "{done:#?}");
    }
    panic!("no second signal came before the end of a step");
}

#[test]
fn text_is_the_same_for_the_same_seed_and_ends_at_a_stop() {
    let place = Place::new();
    let model = fixture("llama");
    let base = format!("generate --model {} --max-new-tokens 12 --threads 1", model.display());
    let greedy = place.lora(&format!("{base} --prompt hello --json")).exits(0).json();
    assert_eq!(greedy["prompt"], "hello");
    assert!(
        greedy["prompt_tokens"].as_u64().unwrap()
            > place.lora(&format!("{base} --prompt hello --raw --json")).json()["prompt_tokens"].as_u64().unwrap()
    );
    let drawn = |seed: u32| {
        place.lora(&format!("{base} --prompt hello --temperature 1.5 --seed {seed} --json")).exits(0).json()
    };
    assert_eq!(drawn(1)["text"], drawn(1)["text"]);
    assert_ne!(drawn(1)["text"], drawn(2)["text"]);

    let text = greedy["text"].as_str().unwrap();
    let streamed = place.lora(&format!("{base} --prompt hello")).exits(0).stdout;
    assert_eq!(streamed, format!("{text}\n"));
    let stop: String = text.chars().skip(3).take(2).collect();
    let cut = place.lora_words(
        &[base.split(' ').collect::<Vec<_>>().as_slice(), &["--prompt", "hello", "--stop", &stop, "--json"]].concat(),
    );
    let cut = cut.exits(0).json();
    assert_eq!(cut["text"].as_str().unwrap(), &text[..text.find(&stop).unwrap()]);
    assert_eq!(cut["finish_reason"], "stop");

    place.write("p.jsonl", "{\"prompt\": \"hello\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"hello\"}, {\"role\": \"assistant\", \"content\": \"x\"}]}\n");
    let many = place.lora(&format!("{base} --prompts p.jsonl --json")).exits(0).json();
    // A prompt is a user message; an answer at the end of a conversation is left out.
    assert_eq!((&many[0]["text"], &many[1]["text"]), (&greedy["text"], &greedy["text"]));
}

#[test]
fn a_conversation_ends_with_its_input() {
    let place = Place::new();
    let line = format!("chat --model {} --max-new-tokens 4 --threads 1", fixture("llama").display());
    let done = place.lora_with_stdin(&line, "hi\n/reset\nhi\n").exits(0);
    // The second answer comes from the same history as the first.
    let half = done.stdout.len() / 2;
    assert!(half > 0 && done.stdout[..half] == done.stdout[half..], "{done:#?}");
    assert_eq!(place.lora_with_stdin(&line, "/exit\nhi\n").exits(0).stdout, "");
}

#[test]
fn data_is_shown_as_it_is_trained() {
    let place = Place::new();
    let model = fixture("llama");
    let done = place.lora(&format!("data preview train.jsonl --model {} --n 1", model.display())).exits(0);
    assert!(done.stdout.contains("train.jsonl:1") && done.stdout.contains("say a 0: [[aaa<|im_end|>]]"), "{done:#?}");
    place.config("c.toml", &model, "train.jsonl", "", "");
    let shown = place.lora("data preview c.toml --n 2 --json").exits(0).json();
    let tokens = shown[0]["tokens"].as_array().unwrap();
    let trained: String = tokens.iter().filter(|t| t["trained"] == true).map(|t| t["text"].as_str().unwrap()).collect();
    assert_eq!(trained, "aaa<|im_end|>");
    let stats = place.lora("data stats c.toml --json").exits(0).json();
    assert_eq!((stats["kept"].as_u64(), stats["packing"]["max_length"].as_u64()), (Some(48), Some(64)));
    let (tokens, rows) = (stats["tokens"].as_f64().unwrap(), stats["packing"]["rows"].as_f64().unwrap());
    assert!((stats["packing"]["efficiency"].as_f64().unwrap() - tokens / (64.0 * rows)).abs() < f64::EPSILON);
    // What a run would refuse is still shown, with a warning.
    place.lora("data stats c.toml --set data.max_length=4").exits(2).says(&["no record has a token to train"]);
    place.lora("data stats c.toml --set data.max_length=12").exits(0).says(&["warning", "data.max_affected_share"]);
    // One page with figures and rows, which says no more than it should.
    place.write("evil.jsonl", "{\"prompt\": \"<script>alert(1)</script>\", \"completion\": \"\\u001b[31mred\"}\n");
    let line = format!("data preview evil.jsonl --model {} --html page.html", model.display());
    let done = place.lora(&line).exits(0);
    assert!(!done.stdout.contains('\u{1b}') && done.stdout.contains("⟨U+001B⟩[31mred"), "{done:#?}");
    let page = std::fs::read_to_string(place.path("page.html")).unwrap();
    assert!(
        !page.contains("<script") && page.contains("&lt;") && page.contains("<svg") && page.contains("1 of 1 rows")
    );
    let text = place.lora("data stats c.toml --html stats.html").exits(0).stdout;
    assert!(text.contains("end token") && text.contains("% filled") && text.contains("█"), "{text}");
    assert!(place.path("stats.html").is_file());
    // A run refuses what the figures warn of, before anything is loaded.
    place.lora("train c.toml --set data.max_length=12 --set output_dir=o").exits(2).says(&["max_affected_share"]);
    place.lora("train c.toml --set data.template=chatlm --set output_dir=o").exits(2).says(&["chatlm", "chatml"]);
    place.lora("train c.toml --set data.template_date=tomorrow").exits(2).says(&["data.template_date", "2026-11-24"]);
    place
        .lora("train c.toml --set data.group_by_length=true --set data.packing=true")
        .exits(2)
        .says(&["group_by_length"]);
    assert!(!place.path("o").exists());
}

#[test]
fn checkpoints_are_made_measured_merged_and_looked_at() {
    let place = Place::new();
    let model = fixture("llama");
    let config = model.join("config.json");
    let make = |name: &str, seed: u32| {
        let line = format!("init-model --config {} --output {name} --seed {seed} --dtype bfloat16", config.display());
        place.lora(&line).exits(0);
        read(&place.path(name).join("model.safetensors"))
    };
    assert_eq!(make("a", 1), make("b", 1));
    assert_ne!(make("c", 2), read(&place.path("a/model.safetensors")));
    place.lora(&format!("init-model --config {} --output a", config.display())).exits(2).says(&["--output a", "empty"]);
    let found = place.lora("inspect a --json").exits(0).json();
    assert_eq!((found["parameters"].as_u64(), found["dtypes"]["bfloat16"].as_u64()), (Some(42_144), Some(42_144)));

    let adapter = fixture("llama/adapters/all_linear");
    let done = place
        .lora(&format!("merge --model {} --adapter {} --output merged --verify", model.display(), adapter.display()))
        .exits(0);
    assert!(
        done.stdout.contains("weights: 21 tensors agree") && done.stdout.contains("logits: largest difference"),
        "{done:#?}"
    );
    let line = format!(
        "merge --model {} --adapter {} --output half --dtype bfloat16 --verify",
        model.display(),
        adapter.display()
    );
    assert!(place.lora(&line).exits(0).stdout.contains("for bfloat16"));
    let tensors = place.lora("inspect merged/model.safetensors --json").exits(0).json();
    assert_eq!(tensors["tensors"].as_array().unwrap().len(), 21);
    let unknown = place.path("unknown");
    std::fs::create_dir(&unknown).unwrap();
    let config = std::fs::read_to_string(fixture("llama").join("config.json")).unwrap();
    std::fs::write(unknown.join("config.json"), config.replace("\"llama\"", "\"newcomer\"")).unwrap();
    std::fs::copy(fixture("llama").join("model.safetensors"), unknown.join("model.safetensors")).unwrap();
    let foreign = place.lora("inspect unknown --json").exits(0).json();
    assert!(foreign["not_trainable"].is_string() && foreign["parameters"].as_u64().unwrap() > 0, "{foreign}");

    let bench = place.lora(&format!(
        "bench step --model {} --batch 2 --seq 16 --r 4 --steps 2 --targets q_proj,v_proj --threads 1 --json",
        model.display()
    ));
    let bench = bench.exits(0).json();
    // q: 32 -> 32, v: 32 -> 16, two layers of rank 4.
    assert_eq!(bench["trainable"].as_u64(), Some(2 * 4 * (32 + 32 + 32 + 16)));
    assert_eq!(bench["losses"].as_array().unwrap().len(), 4);
    assert!(place.lora("doctor --json").exits(0).json()["cpu_matmul_gflops"].as_f64().unwrap() > 0.0);
}

#[test]
fn the_demo_trains_and_shows_before_and_after() {
    let place = Place::new();
    let model = fixture("llama");
    std::fs::create_dir_all(place.path("demo")).unwrap();
    std::fs::rename(place.copy_of("llama"), place.path("demo/base")).unwrap();
    let records = std::fs::read_to_string(place.path("train.jsonl")).unwrap();
    for name in ["train.jsonl", "eval.jsonl"] {
        place.write(&format!("demo/{name}"), &records);
    }
    let tests: String = (0..3)
        .map(|i| format!("{{\"prompt\": \"say a {i}: \", \"completion\": \"aaa\", \"slots\": [\"aaa\"]}}\n"))
        .collect();
    place.write("demo/test.jsonl", &tests);
    let config = place.config("demo/demo.toml", &model, "elsewhere.jsonl", "", "max_steps = 5");
    assert!(config.is_file());
    let report = place.lora("demo --assets demo --output run --json").exits(0).json();
    assert_eq!((report["run"]["steps"].as_u64(), report["before"]["slots"].as_u64()), (Some(5), Some(3)));
    let loss = |when: &str| report["run"][when]["loss"].as_f64().unwrap();
    assert!(loss("eval_after") < loss("eval_before"));
    let done = place.lora("demo").exits(0);
    for word in [
        "held-out loss",
        "slots named, of 3",
        "before",
        "after",
        "wanted",
        "lora generate --model demo/base --adapter runs/demo",
    ] {
        assert!(done.stdout.contains(word), "{word}: {done:#?}");
    }
    place.lora("demo --assets nowhere").exits(2).says(&["--assets nowhere", "demo.toml"]);
}
