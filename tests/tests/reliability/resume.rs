//! R16, R17: going on with another run, and from any step.

use crate::lab::{Lab, SAVE, contents, copy};
use crate::report::{Row, long};
use e2e::{fixtures, small_dataset};
use lora_format::{TensorFile, write_tensors};

#[test]
fn r16_another_configuration_base_or_dataset() {
    let row = Row::new("R16");
    let lab = Lab::new();
    let fields = [
        ("seed", "3", "4"),
        ("model.dtype", "\"auto\"", "float32"),
        ("lora.r", "2", "4"),
        ("lora.lora_alpha", "", "7"),
        ("lora.lora_dropout", "0.1", "0.2"),
        ("lora.target_modules", "", "[\"q_proj\"]"),
        ("lora.use_rslora", "false", "true"),
        ("data.max_length", "96", "80"),
        ("data.shuffle", "true", "false"),
        ("data.packing", "false", "true"),
        ("train.per_device_train_batch_size", "2", "1"),
        ("train.gradient_accumulation_steps", "2", "1"),
        ("train.learning_rate", "0.02", "0.01"),
        ("train.lr_scheduler_type", "\"cosine\"", "linear"),
        ("train.warmup_steps", "3", "2"),
        ("train.weight_decay", "", "0.5"),
        ("train.max_grad_norm", "", "0.5"),
        ("train.adam_beta1", "", "0.8"),
        ("threads", "1", "2"),
    ];
    let (mut refused, mut sets) = (0, Vec::new());
    for (field, old, new) in fields {
        lab.interrupted("run");
        let before = contents(&lab.checkpoint("run", 2 * SAVE));
        let key = if field == "threads" { "model.threads" } else { field };
        sets.push(format!("{key}={new}"));
        let done = lab.train("run", &["--resume", "--set", sets.last().unwrap()]).exits(2);
        let told = format!("{field} was {old}");
        done.says(&["not the run that the checkpoint belongs to", &told, new.trim_matches(['[', ']'])]);
        assert!(contents(&lab.checkpoint("run", 2 * SAVE)) == before, "{field}");
        refused += 1;
    }
    // All at once: each is listed.
    let mut all = vec!["--resume"];
    sets.iter().for_each(|set| all.extend(["--set", set.as_str()]));
    let done = lab.train("run", &all).exits(2);
    for (field, ..) in fields {
        assert!(done.stderr.contains(&format!("{field} was ")), "{field}: {}", done.stderr);
    }

    // Other data under the same name, of a row that is held out and of all; and another base: a single weight of it.
    lab.interrupted("run");
    std::fs::write(lab.path("train.jsonl"), small_dataset().replace("adds two 0", "adds two 9")).unwrap();
    lab.train("run", &["--resume"]).exits(2).says(&["the sha256 of the eval data* was "]);
    std::fs::write(lab.path("train.jsonl"), small_dataset().replace("the ", "his ")).unwrap();
    lab.train("run", &["--resume"]).exits(2).says(&["the sha256 of the data was "]);
    std::fs::write(lab.path("train.jsonl"), small_dataset()).unwrap();
    copy(&fixtures().join("llama"), &lab.path("model"));
    let file = TensorFile::open(&lab.path("model/model.safetensors")).unwrap();
    let tensors: Vec<_> = file.names().map(|name| (name.to_string(), file.read(name).unwrap())).collect();
    let _one = tensors[0].1.view(-1).get(0).fill_(0.5);
    write_tensors(&lab.path("model/model.safetensors"), &tensors, file.metadata()).unwrap();
    let model = lab.path("model").display().to_string();
    lab.train("run", &["--resume", "--model", &model]).exits(2).says(&["the sha256 of the base was "]);
    refused += 3;

    // What does not change what was done is taken when it is asked for, told, and gives the same bits.
    lab.interrupted("run");
    lab.train("run", &["--resume", "--set", "train.save_steps=4"]).exits(0).says(&["train.save_steps* was 5 and is 4"]);
    let (run, whole) = (lab.path("run"), lab.path("whole"));
    for (settings, told) in [
        (&["train.gradient_checkpointing=true"][..], "train.gradient_checkpointing* was false and is true"),
        (&["train.recompute_layers=1"], "train.recompute_layers* was nothing and is 1"),
        (
            &["train.gradient_checkpointing=true", "train.accumulate_by_block=true"],
            "train.accumulate_by_block* was nothing and is true",
        ),
    ] {
        lab.interrupted("run");
        let more = settings.iter().flat_map(|setting| ["--set", setting]);
        lab.train("run", &["--resume"].into_iter().chain(more).collect::<Vec<_>>()).exits(0).says(&[told]);
        for file in ["adapter_model.safetensors", "checkpoints/step-15/trainer_state.safetensors"] {
            assert!(std::fs::read(run.join(file)).unwrap() == std::fs::read(whole.join(file)).unwrap(), "{file}");
        }
    }
    row.held(&format!(
        "{refused} changes refused, each named with old and new, all of them at once too; 4 harmless ones taken"
    ));
}

#[test]
fn r17_from_every_step_of_three_epochs() {
    let row = Row::new("R17");
    // Fourteen rows, two a micro-batch, two of those a step: the fourth step of an epoch has three rows less.
    let orders: &[&str] = &["", "packing = true", "group_by_length = true", "shuffle = false"];
    let (mut resumed, kinds) = (0, if long() { orders } else { &orders[..1] });
    for data in kinds {
        let lab = Lab::with(data, "num_train_epochs = 3\nsave_steps = 1\nsave_total_limit = 100");
        let steps = lab.checkpoints("whole");
        assert!(steps.len() >= 3, "{data}: {steps:?}");
        let every = if long() { 1 } else { 2 };
        for &from in steps.iter().rev().skip(1).step_by(every) {
            let _ = std::fs::remove_dir_all(lab.path("run"));
            copy(&lab.path("whole"), &lab.path("run"));
            for &later in steps.iter().filter(|step| **step > from) {
                std::fs::remove_dir_all(lab.checkpoint("run", later)).unwrap();
            }
            std::fs::remove_file(lab.path("run/adapter_model.safetensors")).unwrap();
            // Loss, tokens and learning rate of each step to the last bit: the same rows in the same order.
            lab.ends_as_if_nothing_had_happened("run", &format!("{data} from step {from}"));
            resumed += 1;
        }
    }
    row.held(&format!(
        "{resumed} resumes in {} orders of the data, mid-epoch and at its end; 0 differences",
        kinds.len()
    ));
}
