//! Datasets that are trained one after the other, through the binary.
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

mod common;

use common::{Place, fixture};

/// Rows of so many tokens, all but the first of them trained.
fn rows(count: usize, tokens: usize) -> String {
    let row = |i: usize| {
        let ids: Vec<usize> = (0..tokens).map(|t| 5 + (i * 7 + t * 3) % 90).collect();
        let labels: Vec<i64> = ids.iter().enumerate().map(|(t, id)| if t == 0 { -100 } else { *id as i64 }).collect();
        format!("{{\"input_ids\": {ids:?}, \"labels\": {labels:?}}}\n")
    };
    (0..count).map(row).collect()
}

/// Trained tokens of each step, which tell where its rows come from.
fn trained(place: &Place) -> Vec<u64> {
    let text = std::fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.filter_map(|line| line["trained_tokens"].as_u64()).collect()
}

fn place(data: &str, train: &str) -> Place {
    let place = Place::new();
    place.write("easy.jsonl", &rows(6, 5));
    place.write("hard.jsonl", &rows(5, 10));
    let text = format!(
        "output_dir = \"run\"\nseed = 4\n[model]\npath = {:?}\ndevice = \"cpu\"\nthreads = 1\n[lora]\nlora_dropout = 0.1\n[data]\n\
         max_length = 32\nmixing = \"sequential\"\n{data}\n[train]\nper_device_train_batch_size = 1\n{train}\n",
        fixture("llama")
    );
    place.write("c.toml", &text);
    place
}

#[test]
fn each_epoch_trains_all_of_one_dataset_before_the_next() {
    let plain = place("train = [\"easy.jsonl\", \"hard.jsonl\"]", "num_train_epochs = 2\nsave_steps = 19");
    plain.lora("train c.toml --quiet").exits(0);
    let epoch = [vec![4; 6], vec![9; 5]].concat();
    assert_eq!(trained(&plain), [epoch.clone(), epoch].concat());
    // Gone on from within the second dataset of the second epoch.
    let (whole, steps) = (std::fs::read(plain.path("run/adapter_model.safetensors")).unwrap(), trained(&plain));
    std::fs::remove_dir_all(plain.path("run/checkpoints/step-22")).unwrap();
    plain.lora("train c.toml --quiet --resume").exits(0);
    assert_eq!(trained(&plain), steps);
    assert!(std::fs::read(plain.path("run/adapter_model.safetensors")).unwrap() == whole, "the adapters differ");
}

#[test]
fn weights_held_out_rows_and_packing_keep_the_stages() {
    // The first twice, the second for the most part.
    let list = "train = [{ path = \"easy.jsonl\", weight = 2 }, { path = \"hard.jsonl\", weight = 0.6 }]";
    let weighted = place(list, "num_train_epochs = 1");
    weighted.lora("train c.toml --quiet").exits(0);
    assert_eq!(trained(&weighted), [vec![4; 12], vec![9; 3]].concat());

    let held = place("train = [\"easy.jsonl\", \"hard.jsonl\"]\neval_split = 3", "num_train_epochs = 1");
    held.lora("train c.toml --quiet").exits(0);
    let steps = trained(&held);
    assert!(steps.len() == 8 && steps.is_sorted(), "{steps:?}");

    // Thirty tokens make a row; fifty two of them, and none of both datasets.
    let packed = place("train = [\"easy.jsonl\", \"hard.jsonl\"]\npacking = true", "num_train_epochs = 1");
    packed.lora("train c.toml --quiet").exits(0);
    let steps = trained(&packed);
    assert_eq!((steps[0], steps[1] + steps[2], steps.len()), (24, 45, 3), "{steps:?}");

    // Without an order of its own a stage has that of the data.
    let fixed = place("train = [\"hard.jsonl\", \"easy.jsonl\"]\nshuffle = false", "num_train_epochs = 1");
    fixed.lora("train c.toml --quiet").exits(0);
    assert_eq!(trained(&fixed), [vec![9; 5], vec![4; 6]].concat());
}

#[test]
fn what_has_no_stages_is_refused() {
    let place = place("train = [\"easy.jsonl\", \"hard.jsonl\"]", "num_train_epochs = 1");
    place.lora("train c.toml --set data.group_by_length=true").exits(2).says(&["data.group_by_length", "sequential"]);
    place.lora("train c.toml --set lora.task_type=SEQ_CLS").exits(2).says(&["data.mixing", "SEQ_CLS"]);
    place.lora("train c.toml --set data.mixing=in_turn").exits(2).says(&["data.mixing", "\"sequential\""]);
}
