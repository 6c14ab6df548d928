//! Several adapters at once: mixed on files, weighted at run time, switched from prompt to prompt; every method trained.
#![allow(clippy::unwrap_used)] // a helper that fails is a failed test

mod common;

use common::{Place, fixture};
use lora_format::TensorFile;
use serde_json::Value;
use tch::Tensor;

/// One adapter of the sum of the ranks on both sides, in another order of the same fp32 sums.
const LOGITS_TOLERANCE: f64 = 1e-5;
/// Rounding of A and B to fp32 in a product that is compared in fp64.
const EXACT_TOLERANCE: f64 = 1e-6;
/// A loss over some hundred tokens, whose logits come from a pair of twice the rank.
const LOSS_TOLERANCE: f64 = 1e-4;

fn logits(place: &Place, file: &str) -> Tensor {
    TensorFile::open(&place.path(file)).unwrap().read("logits").unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[]) / b.abs().max().double_value(&[])
}

#[test]
fn weights_on_the_command_line_are_what_mix_writes() {
    let place = Place::new();
    let model = fixture("llama");
    let [a, wide] = ["mix/a", "mix/wide"].map(|name| model.join(name).display().to_string());
    let (model, input) = (model.display(), model.join("reference.safetensors").display().to_string());
    let both = format!("--adapter {a} --weight=0.7 --adapter {wide} --weight -0.3");
    let mixed = place.lora(&format!("mix {both} --output mixed --json")).exits(0).json();
    assert_eq!(
        (mixed["type"].as_str(), mixed["rank"].as_i64(), mixed["modules"].as_u64()),
        (Some("cat"), Some(12), Some(4))
    );
    assert!(mixed["error"].as_f64().unwrap() < EXACT_TOLERANCE, "{mixed}");
    place.lora(&format!("logits --model {model} {both} --input {input} --output one.safetensors")).exits(0);
    place.lora(&format!("logits --model {model} --adapter mixed --input {input} --output two.safetensors")).exits(0);
    let d = distance(&logits(&place, "one.safetensors"), &logits(&place, "two.safetensors"));
    assert!(d < LOGITS_TOLERANCE, "{d}");

    let said =
        place.lora(&format!("mix --adapter {a} --adapter {wide} --type svd --rank 2 --output cut")).exits(0).stdout;
    assert!(
        said.contains("svd of 2 adapters, rank 2, 4 modules") && said.contains("off the exact weighted sum"),
        "{said}"
    );
    // Merged in order, and run side by side: the same logits.
    let line = format!("merge --model {model} --adapter {a} --adapter {wide} --output merged --verify");
    assert!(place.lora(&line).exits(0).stdout.contains("logits: largest difference"));

    for (line, part) in [
        (format!("mix {both} --output mixed"), "new or empty"),
        (format!("mix --adapter {a} --weight 1 --weight 2 --output x"), "2 times for 1 adapter"),
        (format!("mix --adapter {a} --rank 3 --output x"), "use svd"),
        (format!("mix --adapter {a} --adapter {wide} --type linear --output x"), "use cat or svd"),
        (format!("mix --adapter {a} --adapter {wide} --type ties_svd --density 0 --output x"), "--density 0"),
        (
            format!("mix --adapter {a} --adapter {} --output x", fixture("mistral/adapters/lora").display()),
            "different models",
        ),
        (format!("logits --model {model} --adapter {a} --weight nan --input {input} --output x"), "finite"),
    ] {
        let done = place.lora(&line).exits(2);
        assert!(done.stderr.contains(part), "{line}: {done:#?}");
        assert!(!place.path("x").exists());
    }
}

#[test]
fn prompts_are_answered_each_by_its_adapter() {
    let place = Place::new();
    let model = fixture("llama");
    let [lora, dora] = ["lora", "dora"].map(|name| model.join("adapters").join(name).display().to_string());
    let model = model.display();
    let prompts = [
        r#"{"prompt": "a b c", "adapter": "lora"}"#,
        r#"{"prompt": "a b c", "adapter": null}"#,
        r#"{"prompt": "a b c", "adapter": "dora"}"#,
        r#"{"prompt": "a b c", "adapter": {"lora": 0.5}}"#,
        r#"{"prompt": "a b c", "adapter": "lora"}"#,
    ];
    place.write("p.jsonl", &prompts.join("\n"));
    let ask = |more: &str| -> Vec<Vec<i64>> {
        let done =
            place.lora(&format!("generate --model {model} --raw --max-new-tokens 12 --json {more}")).exits(0).json();
        let ids =
            |answer: &Value| answer["token_ids"].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect();
        match done {
            Value::Array(all) => all.iter().map(ids).collect(),
            one => vec![ids(&one)],
        }
    };
    // DoRA cannot be weighted beside another, so neither is active at the start but by a weight that makes it the base.
    let done = place.lora(&format!("generate --model {model} --adapter {lora} --adapter {dora} --prompt x"));
    assert!(done.exits(2).stderr.contains("DoRA cannot be weighted"));

    let [embedding] = [model.to_string() + "/adapters/embedding"];
    place.write("q.jsonl", &prompts.join("\n").replace("dora", "embedding"));
    let mixed = ask(&format!("--adapter {lora} --adapter {embedding} --prompts q.jsonl"));
    place.write("one.txt", "a b c\n");
    let (first, base, third) = (
        ask(&format!("--adapter {lora} --prompts one.txt")),
        ask("--prompts one.txt"),
        ask(&format!("--adapter {embedding} --prompts one.txt")),
    );
    assert_eq!([&mixed[0], &mixed[1], &mixed[2], &mixed[4]], [&first[0], &base[0], &third[0], &first[0]]);
    let half = ask(&format!("--adapter {lora} --weight 0.5 --prompts one.txt"));
    assert_eq!(mixed[3], half[0]);

    place.write("wrong.jsonl", r#"{"prompt": "a", "adapter": "nobody"}"#);
    let done = place.lora(&format!("generate --model {model} --adapter {lora} --prompts wrong.jsonl")).exits(2);
    assert!(done.stderr.contains("nobody") && done.stderr.contains("lora"), "{done:#?}");
}

#[test]
fn every_method_trains_resumes_and_is_used() {
    for (name, lora) in [
        ("dora", "use_dora = true"),
        ("bias", "lora_bias = true\nbias = \"all\"\ntarget_modules = [\"q_proj\", \"v_proj\"]"),
        ("pissa", "init_lora_weights = \"pissa\""),
        ("fast", "init_lora_weights = \"pissa_niter_4\"\nuse_rslora = true"),
        ("loftq", "init_lora_weights = \"loftq\"\nloftq_iter = 2\nuse_rslora = true"),
        ("olora", "init_lora_weights = \"olora\"\nrank_pattern = { up_proj = 2 }"),
        ("tokens", "trainable_token_indices = [3, 4]"),
        ("tokens apart", "trainable_token_indices = { embed_tokens = [3, 4], lm_head = [4, 9] }"),
        ("tokens alone", "trainable_token_indices = [3, 4]\ntarget_modules = []"),
        ("experts", "target_parameters = [\"experts.gate_up_proj\", \"experts.down_proj\"]\nuse_rslora = true"),
        ("experts alone", "target_parameters = [\"experts.down_proj\"]\ntarget_modules = []"),
    ] {
        let place = Place::new();
        let model = fixture(if name.starts_with("experts") { "mixtral" } else { "qwen2" });
        let train = "max_steps = 6\nlearning_rate = 1e-2\nsave_steps = 3\nlogging_steps = 1";
        let config = place.config("c.toml", &model, "train.jsonl", lora, train);
        let done = place.lora("train c.toml --set data.eval_split=8 --json").exits(0).json();
        let (before, after) =
            (done["eval_before"]["loss"].as_f64().unwrap(), done["eval_after"]["loss"].as_f64().unwrap());
        assert!(after < before, "{name}: {before} -> {after}");
        // From the middle again, to the same bits: a start out of the base must be found again.
        let whole = std::fs::read(place.path("run/adapter_model.safetensors")).unwrap();
        std::fs::remove_dir_all(place.path("run/checkpoints/step-6")).unwrap();
        std::fs::remove_file(place.path("run/adapter_model.safetensors")).unwrap();
        place.lora("train c.toml --set data.eval_split=8 --resume").exits(0);
        assert!(std::fs::read(place.path("run/adapter_model.safetensors")).unwrap() == whole, "{name}");
        // What was saved gives the loss that the run ended with, over the unchanged base.
        let text = std::fs::read_to_string(config).unwrap().replace("\"run\"", "\"next\"");
        place.write(
            "next.toml",
            &text.replace(lora, "init_adapter = \"run\"").replace("max_steps = 6", "max_steps = 1"),
        );
        let next = place.lora("train next.toml --set data.eval_split=8 --json").exits(0).json();
        let resumed = next["eval_before"]["loss"].as_f64().unwrap();
        assert!((resumed - after).abs() < LOSS_TOLERANCE * after, "{name}: {after} and then {resumed}");
        let line = format!("merge --model {} --adapter run --output merged --verify", model.display());
        assert!(place.lora(&line).exits(0).stdout.contains("weights:"), "{name}");
    }
}

#[test]
fn other_types_train_resume_and_are_used() {
    let targets = "target_modules = [\"q_proj\", \"v_proj\"]";
    for (peft_type, own) in [
        ("VERA", "r = 32\nd_initial = 0.5"),
        ("VERA", "r = 32\nd_initial = 0.5\nsave_projection = false\nprojection_prng_key = 7"),
        ("ADALORA", "init_r = 6\ntarget_r = 3\ntinit = 1\ntfinal = 1\nlora_alpha = 64"),
    ] {
        let name = format!("{peft_type} {own}");
        let place = Place::new();
        let model = fixture("qwen2");
        let train = "max_steps = 6\nlearning_rate = 1e-2\nsave_steps = 3\nlogging_steps = 1";
        let lora = format!("peft_type = \"{peft_type}\"\n{own}\n{targets}");
        let config = place.config("c.toml", &model, "train.jsonl", &lora, train);
        let text = std::fs::read_to_string(config).unwrap().replace("r = 4\n", "");
        place.write("c.toml", &text);
        let shown = place.lora("train c.toml --dry-run --json").exits(0).json();
        let done = place.lora("train c.toml --set data.eval_split=8 --json").exits(0).json();
        let (before, after) =
            (done["eval_before"]["loss"].as_f64().unwrap(), done["eval_after"]["loss"].as_f64().unwrap());
        assert!(after < before, "{name}: {before} -> {after}");
        assert_eq!(shown["trained"]["parameters"], done["trained_parameters"], "{name}");
        let lines = std::fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
        assert_eq!(lines.contains("\"rank_budget\":12"), peft_type == "ADALORA", "{lines}");

        let whole = std::fs::read(place.path("run/adapter_model.safetensors")).unwrap();
        std::fs::remove_dir_all(place.path("run/checkpoints/step-6")).unwrap();
        std::fs::remove_file(place.path("run/adapter_model.safetensors")).unwrap();
        place.lora("train c.toml --set data.eval_split=8 --resume").exits(0);
        assert!(std::fs::read(place.path("run/adapter_model.safetensors")).unwrap() == whole, "{name}");

        let found = place.lora("inspect run/checkpoints/step-6 --json").exits(0).json();
        assert_eq!((found["peft_type"].as_str(), found["modules"].as_u64()), (Some(peft_type), Some(4)), "{found}");
        assert!(found["loads_in"][2]["note"].as_str().unwrap().contains("peft_type"), "{found}");
        assert!(place.lora("inspect run/checkpoints/step-6").exits(0).stdout.contains(&format!("{peft_type}, r = ")));

        let next = text.replace("\"run\"", "\"next\"").replace(&lora, "init_adapter = \"run\"");
        place.write("next.toml", &next.replace("max_steps = 6", "max_steps = 1"));
        let next = place.lora("train next.toml --set data.eval_split=8 --json").exits(0).json();
        let resumed = next["eval_before"]["loss"].as_f64().unwrap();
        assert!((resumed - after).abs() < LOSS_TOLERANCE * after, "{name}: {after} and then {resumed}");

        // Merged, mixed into a plain adapter, and used as it is: the same logits.
        let model = model.display();
        let line = format!("merge --model {model} --adapter run --output merged --verify");
        assert!(place.lora(&line).exits(0).stdout.contains("weights:"), "{name}");
        place.lora(&format!("mix --model {model} --adapter run --output plain")).exits(0);
        let input = fixture("qwen2").join("reference.safetensors");
        for (line, file) in [("--adapter run", "own"), ("--adapter plain", "mixed")] {
            let line = format!("logits --model {model} {line} --input {} --output {file}", input.display());
            place.lora(&line).exits(0);
        }
        let line = format!("logits --model merged --input {} --output merged.safetensors", input.display());
        place.lora(&line).exits(0);
        for file in ["mixed", "merged.safetensors"] {
            let d = distance(&logits(&place, file), &logits(&place, "own"));
            assert!(d < LOGITS_TOLERANCE, "{name}: {file} {d}");
        }
        place.lora(&format!("generate --model {model} --adapter run --raw --max-new-tokens 4 --prompt x")).exits(0);
        if peft_type == "VERA" {
            let done = place.lora("mix --adapter run --output x").exits(2);
            assert!(done.stderr.contains("give the base with --model"), "{done:#?}");
        }
    }
}

#[test]
fn methods_that_exclude_each_other_are_refused_before_anything_is_loaded() {
    let place = Place::new();
    for (lora, part) in [
        ("use_dora = true\nlora_bias = true", "lora_bias"),
        ("use_dora = true\ninit_lora_weights = \"pissa\"", "use_dora"),
        ("init_lora_weights = \"corda\"", "pissa"),
        ("target_modules = \"peft-default\"", "phi3"),
        ("trainable_token_indices = [4, 320]", "320"),
        ("trainable_token_indices = [4, 4]", "token 4 is there twice"),
        ("trainable_token_indices = [4]\nmodules_to_save = [\"embed_tokens\"]", "model.embed_tokens"),
        ("target_parameters = [\"experts.down_proj\"]", "no stacked experts"),
        ("target_parameters = [\"experts.down_proj\"]\nlora_dropout = 0.1", "lora_dropout"),
        ("layer_replication = [[0, 2], [1, 2]]", "repeats layers"),
    ] {
        let family = match part {
            "phi3" => "phi3",
            // Of a family without stacked experts it would be the experts that are missing.
            "lora_dropout" => "mixtral",
            _ => "llama",
        };
        let model = fixture(family);
        place.config("c.toml", &model, "train.jsonl", lora, "max_steps = 1");
        let done = place.lora("train c.toml").exits(2);
        assert!(done.stderr.contains(part), "{lora}: {done:#?}");
        assert!(!place.path("run").exists(), "{lora}");
    }
}

#[test]
fn inspect_tells_tokens_and_experts_and_replicated_layers_are_refused() {
    let place = Place::new();
    let inspect = |path: &std::path::Path| place.lora(&format!("inspect {} --json", path.display())).exits(0).json();
    let tokens = inspect(&fixture("qwen2").join("adapters/tokens_apart"));
    assert_eq!((tokens["trained_tokens"].as_u64(), tokens["loads_in"][0]["loads"].as_bool()), (Some(5), Some(true)));
    assert_eq!(tokens["loads_in"][2]["loads"].as_bool(), Some(false));
    let experts = inspect(&fixture("mixtral").join("adapters/experts"));
    assert_eq!(experts["ranks"], serde_json::json!([2, 4]));
    assert_eq!(experts["target_parameters"].as_array().map(Vec::len), Some(2));

    let source = fixture("llama").join("adapters/lora");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::create_dir_all(place.path("replicated")).unwrap();
        std::fs::copy(source.join(file), place.path("replicated").join(file)).unwrap();
    }
    let text = std::fs::read_to_string(source.join("adapter_config.json")).unwrap();
    let text = text.replace("\"layer_replication\": null", "\"layer_replication\": [[0, 2], [1, 2]]");
    place.write("replicated/adapter_config.json", &text);
    let model = fixture("llama").display().to_string();
    let done = place.lora(&format!("merge --model {model} --adapter replicated --output merged"));
    assert!(done.stderr.contains("layer_replication") && done.stderr.contains("share the weights"), "{done:#?}");
    assert!(!place.path("merged").exists());
}
