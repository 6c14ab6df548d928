//! `lora export`: what it writes, what it says, and what it refuses.
#![allow(clippy::unwrap_used)] // a helper that fails is a failed test

mod common;

use common::{Place, fixture};

#[test]
fn files_for_other_programs_are_written_once() {
    let place = Place::new();
    let model = fixture("llama");
    let adapter = model.join("adapters/lora");
    let (model, adapter) = (model.display(), adapter.display());
    let done =
        place.lora(&format!("export gguf --model {model} --adapter {adapter} --output m.gguf --type q8_0")).exits(0);
    assert!(
        done.stdout.contains("21 tensors") && done.stderr.contains("stored as f16, as their rows have no q8_0 form"),
        "{done:#?}"
    );
    assert!(std::fs::read(place.path("m.gguf")).unwrap().starts_with(b"GGUF"));
    let mixed = place.lora(&format!("export gguf --model {model} --output k.gguf --type q4_k_m")).exits(0);
    assert!(
        mixed.stdout.contains("as q4_k_m (")
            && mixed.stderr.contains("stored as q5_0, as their rows have no q4_k form")
    );
    let neox = fixture("gpt_neox");
    let neox = place.lora(&format!("export gguf --model {} --output n.gguf", neox.display())).exits(0);
    assert!(neox.stderr.contains("GELU"), "{neox:#?}");
    let again = place.lora(&format!("export gguf --model {model} --output m.gguf")).exits(2);
    assert!(again.stderr.contains("is there already"), "{again:#?}");

    let beside = place.lora(&format!("export gguf-lora --model {model} --adapter {adapter} --output a.gguf")).exits(0);
    assert!(beside.stdout.contains("8 tensors"), "{beside:#?}");
    place.lora(&format!("export ollama --model {model} --output o")).exits(0);
    assert_eq!(std::fs::read_to_string(place.path("o/Modelfile")).unwrap(), "FROM ./model.gguf\n");
    assert!(place.path("o/model.gguf").is_file());
}

#[test]
fn what_has_no_form_there_is_refused_and_leaves_nothing() {
    let place = Place::new();
    let at = |name: &str| fixture(name).display().to_string();
    for (line, part) in [
        (format!("export gguf --model {} --output x.gguf", at("qwen3_moe")), "decoder_sparse_step"),
        (format!("export gguf --model {} --output x.gguf --type q2", at("llama")), "q8_0"),
        (format!("export gguf --model {} --output x.gguf", at("llama/adapters/lora")), "--adapter"),
        (
            format!("export gguf-lora --model {} --adapter {} --output x.gguf", at("llama"), at("llama/adapters/dora")),
            "merge it",
        ),
        (format!("export ollama --model {} --output x.gguf", at("llama_longrope")), "longrope"),
        (format!("export gguf-lora --model {} --adapter nowhere --output x.gguf", at("llama")), "nowhere"),
    ] {
        let done = place.lora(&line).exits(2);
        assert!(done.stderr.contains(part), "{line}: {done:#?}");
        assert!(!place.path("x.gguf").exists(), "{line}");
    }
}
