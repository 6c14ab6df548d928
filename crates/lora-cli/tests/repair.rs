//! `lora repair`, and what a full disk leaves of a new adapter.
#![allow(clippy::unwrap_used)] // a helper that fails is a failed test

mod common;

use common::{Place, fixture};
use lora_format::{TensorFile, write_tensors};
use std::collections::BTreeMap;
use std::process::Command;
use tch::Tensor;

#[test]
fn an_adapter_with_wrappers_in_its_names_is_refused_named_and_repaired() {
    let place = Place::new();
    let (model, right) = (fixture("llama"), fixture("llama/adapters/lora"));
    let file = TensorFile::open(&right.join("adapter_model.safetensors")).unwrap();
    let tensors: Vec<(String, Tensor)> = file
        .names()
        .map(|n| (format!("_orig_mod.{}", n.replace("lora_A.", "lora_A.default.")), file.read(n).unwrap()))
        .collect();
    let bad = place.path("bad");
    std::fs::create_dir(&bad).unwrap();
    write_tensors(&bad.join("adapter_model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    std::fs::copy(right.join("adapter_config.json"), bad.join("adapter_config.json")).unwrap();
    let model = model.display();

    place
        .lora(&format!("merge --model {model} --adapter bad --output m"))
        .exits(2)
        .says(&["`lora repair`", "_orig_mod"]);
    let said = place.lora("repair bad --dry-run").exits(0).stdout;
    assert!(said.contains("torch") || said.contains("`_orig_mod.` of a wrapper taken out"), "{said}");
    assert!(said.contains("nothing is written") && !place.path("good").exists(), "{said}");
    let said = place.lora(&format!("repair bad --model {model} --output good --json")).exits(0).json();
    assert_eq!(said["renamed"].as_array().unwrap().len(), tensors.len());
    place.lora(&format!("merge --model {model} --adapter good --output m --verify")).exits(0);
    let again = place.lora("repair good --output better").exits(0).stdout;
    assert!(again.contains("needs no repair") && !place.path("better").exists(), "{again}");
    place.lora("repair nowhere --output x").exits(2).says(&["nowhere"]);
    place.lora("repair bad --output good").exits(2).says(&["new or empty"]);
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_no_part_of_a_new_adapter() {
    let place = Place::new();
    let adapter = fixture("llama/mix/a");
    // No file may be longer than 512 or 1024 bytes; the signal that comes with it is ignored, so that writing fails as on a
    // full disk.
    let line = format!(
        "trap '' XFSZ; ulimit -f 1; exec {} mix --adapter {} --output mixed",
        env!("CARGO_BIN_EXE_lora"),
        adapter.display()
    );
    let done = Command::new("sh").args(["-c", &line]).current_dir(place.path("")).output().unwrap();
    let stderr = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot write"), "{stderr}");
    let left: Vec<_> = std::fs::read_dir(place.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["train.jsonl"]);
}
