//! Model folders that bitsandbytes packed, through the binary: trained on, resumed, evaluated, run, merged, exported.
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

mod common;

use common::{Place, fixture};
use lora_format::Checkpoint;

/// Sums of float32 in another order: of the adapter beside the codes, and of one product.
const MERGED_TOLERANCE: f64 = 1e-4;

/// A folder with a packed model and the tokenizer of another fixture, whose vocabulary is the same.
fn place(form: &str) -> (Place, std::path::PathBuf) {
    let place = Place::new();
    let model = place.copy_of(&format!("packed/{form}"));
    for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        std::fs::copy(fixture("llama").join(file), model.join(file)).unwrap();
    }
    (place, model)
}

#[test]
fn a_packed_base_is_planned_trained_resumed_evaluated_and_merged() {
    for (form, name) in [("nf4", "nf4"), ("nf4_double", "nf4-double"), ("int8", "int8")] {
        let (place, model) = place(form);
        place.config(
            "c.toml",
            &model,
            "train.jsonl",
            "lora_dropout = 0.1",
            "max_steps = 6\nlearning_rate = 1e-2\nsave_steps = 3",
        );
        let weights = place.lora("plan c.toml --json").exits(0).json()["memory_bytes"]["weights"].as_u64().unwrap();
        let file = model.join("model.safetensors").metadata().unwrap().len();
        // The file has a header, names and settings besides.
        assert!(weights < file && weights > file * 7 / 10, "{form}: {weights} of {file}");

        place.lora("train c.toml --quiet").exits(0);
        let adapter = || std::fs::read(place.path("run/adapter_model.safetensors")).unwrap();
        let whole = adapter();
        std::fs::remove_dir_all(place.path("run/checkpoints/step-6")).unwrap();
        place.lora("train c.toml --resume --quiet").exits(0);
        assert!(adapter() == whole, "{form}: a resumed run has other bits");

        let eval = |words: &str| {
            let done = place.lora(&format!("eval --data train.jsonl --device cpu --json {words}"));
            done.exits(0).json()["loss"].as_f64().unwrap()
        };
        let (alone, beside) = (eval("--model model"), eval("--model model --adapter run"));
        assert!(beside < alone, "{form}: {beside} against {alone}");
        place.lora("generate --model model --adapter run --prompt say --max-new-tokens 4 --device cpu").exits(0);

        let done = place.lora("merge --model model --adapter run --output merged --verify").exits(0);
        assert!(done.stdout.contains("14 matrices") && done.stdout.contains("logits: largest"), "{done:#?}");
        let config = std::fs::read_to_string(place.path("merged/config.json")).unwrap();
        assert!(!config.contains("quantization_config"), "{config}");
        let merged = eval("--model merged");
        assert!((merged - beside).abs() < MERGED_TOLERANCE * beside, "{form}: {merged} against {beside}");
        let shown = place.lora("inspect merged --json").exits(0).json();
        assert_eq!(shown["dtypes"].as_object().unwrap().keys().collect::<Vec<_>>(), ["float32"]);

        let shown = place.lora("inspect model --json").exits(0).json();
        assert_eq!(shown["dtypes"][name].as_u64(), Some(73_728), "{shown}");
        assert_eq!(shown["parameters"].as_u64(), Some(73_728 + 320 * 64 + 5 * 64), "{shown}");
        assert!(shown.get("not_trainable").is_none(), "{shown}");
        // GGUF has its own forms: the weights are unpacked for it.
        place.lora("export gguf --model model --adapter run --output m.gguf --type f32").exits(0);

        // The base is part of what a run goes on from.
        let path = model.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let codes = Checkpoint::open(&model).unwrap().bytes("model.layers.1.mlp.up_proj.weight").unwrap().to_vec();
        let at = bytes.windows(codes.len()).position(|part| part == codes).unwrap();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        place.lora("train c.toml --set train.max_steps=8 --resume --quiet").exits(2).says(&["base"]);
    }
}

#[test]
fn what_changes_packed_weights_is_refused_with_a_remedy() {
    let (place, model) = place("nf4");
    place.config("c.toml", &model, "train.jsonl", "", "max_steps = 2");
    for (set, key) in [
        ("train.finetuning_type=full", "train.finetuning_type = full"),
        ("lora.init_lora_weights=pissa", "lora.init_lora_weights = pissa"),
        ("lora.init_lora_weights=loftq", "lora.init_lora_weights = loftq"),
    ] {
        let done = place.lora(&format!("train c.toml --set {set}"));
        done.exits(2).says(&[key, "14 are packed", "unpacked checkpoint"]);
    }
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    std::fs::write(model.join("config.json"), config.replace("\"nf4\"", "\"fp4\"")).unwrap();
    place.lora("train c.toml").exits(2).says(&["config.json", "bnb_4bit_quant_type", "fp4", "bfloat16"]);
}
