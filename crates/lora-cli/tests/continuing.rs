//! Training that goes on: files that arrive, versions, going back, an old set replayed; through the binary.
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

mod common;

use common::{Done, Place, fixture};
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// Nothing here takes nearly as long on any machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// Rows in the way of the held-out set, other ones for each `kind`.
fn rows(kind: usize, count: usize) -> String {
    let row = |i: usize| {
        let letter = char::from(b'a' + ((i * 5 + kind * 7) % 26) as u8);
        format!("{{\"prompt\": \"say {letter} {i}.{kind}: \", \"completion\": \"{letter}{letter}{letter}\"}}\n")
    };
    (0..count).map(row).collect()
}

/// A folder with a held-out set, the folder `in`, and a configuration for rounds of some steps.
fn place(more: &str, train: &str) -> Place {
    let place = Place::new();
    place.write("eval.jsonl", &rows(50, 12));
    std::fs::create_dir(place.path("in")).unwrap();
    let text = format!(
        "output_dir = \"out\"\nseed = 3\n[model]\npath = {:?}\ndevice = \"cpu\"\nthreads = 1\n[data]\neval = \"eval.jsonl\"\nmax_length = 64\n\
         [lora]\nr = 4\nlora_dropout = 0.1\n[watch]\ninterval = \"1s\"\n{more}\n[train]\nper_device_train_batch_size = 4\n\
         learning_rate = 1e-2\nsample_count = 0\nsave_steps = 2\n{train}\n",
        fixture("llama")
    );
    place.write("c.toml", &text);
    place
}

fn once(place: &Place) -> Value {
    place.lora("train c.toml --watch in --once --quiet --json").exits(0).json()
}

fn versions(place: &Place) -> Value {
    place.lora("versions out --json").exits(0).json()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn adapter(place: &Place, folder: &str) -> Vec<u8> {
    std::fs::read(place.path(folder).join("adapter_model.safetensors")).unwrap()
}

/// Names of the files of each version.
fn files(listed: &Value) -> Vec<(u64, Vec<&str>)> {
    let names = |version: &Value| version["version"].as_u64().unwrap();
    let list = listed["versions"].as_array().unwrap().iter();
    list.map(|version| {
        let files = version["files"].as_array().unwrap().iter();
        (names(version), files.map(|file| file["name"].as_str().unwrap()).collect())
    })
    .collect()
}

#[track_caller]
fn wait_for(so: impl Fn() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < PATIENCE, "waited in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn signal(name: &str, pid: u32) {
    assert!(
        std::process::Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap().success()
    );
}

#[test]
fn each_file_that_arrives_becomes_a_version_that_goes_on_from_the_one_before() {
    let place = place("replay_share = 0.25", "max_steps = 8");
    assert_eq!(once(&place)["rounds"], Value::Array(vec![]), "nothing is there");
    place.lora("versions out").exits(2).says(&["no versions"]);
    let mut before = f64::INFINITY;
    for (kind, name) in ["a.jsonl", "b.jsonl", "c.jsonl"].into_iter().enumerate() {
        place.write(&format!("in/{name}"), &rows(kind, 24));
        place.write("in/unfinished.jsonl.part", &rows(9, 9));
        let report = once(&place);
        let (number, round) = (kind as u64 + 1, &report["rounds"][0]);
        assert_eq!(report["status"], "done");
        assert_eq!((report["current"].as_u64(), round["version"].as_u64()), (Some(number), Some(number)), "{report}");
        assert_eq!(round["parent"].as_u64(), (number > 1).then_some(number - 1));
        // It begins where the one before ended: the same adapter over the same rows, in the same way.
        let loss = |key: &str| round[key].as_f64().unwrap();
        assert!(loss("eval_loss") <= loss("eval_loss_before"), "{round}");
        assert!(before.is_infinite() || before == loss("eval_loss_before"), "{before}: {round}");
        before = loss("eval_loss");
        assert!(adapter(&place, "out/current") == adapter(&place, &format!("out/versions/{number:04}")));
        // A quarter of a pass is of the files before.
        let replay = &json(&place.path(&format!("out/versions/{number:04}/run.json")))["data"]["train"]["replay"];
        let wanted = (number > 1).then_some(8);
        assert_eq!(replay["drawn"].as_u64(), wanted, "{replay}");
        assert_eq!(replay["old"].as_u64(), (number > 1).then_some(24 * (number - 1)));
    }
    // The same content is not trained again, under whatever name.
    place.write("in/again.jsonl", &rows(1, 24));
    assert_eq!(once(&place)["rounds"], Value::Array(vec![]));
    let listed = versions(&place);
    assert_eq!(files(&listed), [(1, vec!["a.jsonl"]), (2, vec!["b.jsonl"]), (3, vec!["c.jsonl"])]);
    let text = place.lora("versions out").exits(0).stdout;
    assert!(text.lines().any(|line| line.starts_with("* 0003     0002")), "{text}");
    assert!(!place.path("out/rounds/0001").exists() && place.path("in/unfinished.jsonl.part").exists());
    let model = fixture("llama");
    let evaluated =
        format!("eval --model {} --adapter out/current --data eval.jsonl --json --device cpu", model.display());
    let loss = place.lora(&evaluated).exits(0).json()["loss"].as_f64().unwrap();
    /// Of fp32 sums in other batches.
    const LOSS_TOLERANCE: f64 = 1e-5;
    assert!((loss - before).abs() < LOSS_TOLERANCE * before, "{loss} and {before}");
}

#[test]
fn a_bad_file_is_refused_by_name_and_the_others_are_trained() {
    let place = place("", "max_steps = 4");
    place.write("in/a.jsonl", &rows(0, 16));
    place.write("in/broken.jsonl", "{\"prompt\": \"x\", \"completion\": \"y\"}\n{\"prompt\": 3");
    place.write("in/other.jsonl", "{\"colour\": \"red\"}\n");
    place.write("in/z.jsonl", &rows(1, 16));
    let done = place.lora("train c.toml --watch in --once --quiet --json").exits(0);
    let report = done.json();
    assert_eq!(files(&versions(&place)), [(1, vec!["a.jsonl", "z.jsonl"])]);
    let refused: Vec<&str> =
        report["refused"].as_array().unwrap().iter().map(|f| f["name"].as_str().unwrap()).collect();
    assert_eq!(refused, ["broken.jsonl", "other.jsonl"]);
    assert!(report["refused"][0]["reason"].as_str().unwrap().contains("broken.jsonl:2"), "{report}");
    done.says(&["refused broken.jsonl", "refused other.jsonl"]);
    // Neither is looked at again, until it is another file.
    assert_eq!(once(&place)["refused"], Value::Array(vec![]));
    place.write("in/broken.jsonl", &rows(2, 16));
    let report = once(&place);
    assert_eq!(
        (report["current"].as_u64(), &report["rounds"][0]["files"][0]["name"]),
        (Some(2), &"broken.jsonl".into())
    );
}

#[test]
fn a_round_that_is_worse_is_kept_and_not_published() {
    // Long enough that nothing wild can be as good.
    let place = place("", "max_steps = 40");
    place.write("in/a.jsonl", &rows(0, 24));
    once(&place);
    let good = adapter(&place, "out/current");
    let garbage: String =
        (0..24).map(|i| format!("{{\"prompt\": \"say {i}: \", \"completion\": \"@@##{i}!!\"}}\n")).collect();
    place.write("in/b.jsonl", &garbage);
    let wild = "train c.toml --watch in --once --quiet --json --set train.learning_rate=3 --set train.max_grad_norm=0 --set train.max_steps=6";
    let report = place.lora(wild).exits(0).json();
    let round = &report["rounds"][0];
    assert_eq!((report["current"].as_u64(), round["version"].as_u64()), (Some(1), Some(2)), "{report}");
    assert!(round["rejected"].is_string() && adapter(&place, "out/current") == good);
    assert!(place.path("out/rejected/0002/version.json").is_file() && !place.path("out/versions/0002").exists());
    // It is not tried again, and the next round goes on from the one that counts.
    assert_eq!(once(&place)["rounds"], Value::Array(vec![]));
    place.write("in/c.jsonl", &rows(1, 24));
    let round = once(&place)["rounds"][0].clone();
    assert_eq!((round["version"].as_u64(), round["parent"].as_u64()), (Some(3), Some(1)));
    let text = place.lora("versions out").exits(0).stdout;
    assert!(text.contains("not published: "), "{text}");
}

#[test]
fn killed_again_and_again_it_trains_every_file_once_and_the_same() {
    let set = |place: &Place| {
        ["a", "b"].iter().enumerate().for_each(|(kind, name)| {
            place.write(&format!("in/{name}.jsonl"), &rows(kind, 24));
        })
    };
    let (whole, parts) = (place("replay_share = 0.5", "max_steps = 40"), place("replay_share = 0.5", "max_steps = 40"));
    set(&whole);
    once(&whole);
    whole.write("in/c.jsonl", &rows(2, 24));
    once(&whole);
    set(&parts);
    let mut kills = 0;
    for (round, wait) in [
        ("0001", &["watch.json", "rounds/0001/checkpoints/step-6", "rounds/0001/checkpoints/step-30"][..]),
        ("0002", &["rounds/0002/config.resolved.toml", "rounds/0002/checkpoints/step-20"][..]),
    ] {
        for until in wait {
            let mut child = parts.spawn("train c.toml --watch in --once --quiet --json");
            let there = || parts.path("out").join(until).exists() || parts.path("out/versions").join(round).exists();
            wait_for(there);
            signal("KILL", child.id());
            kills += u32::from(!child.wait().unwrap().success());
        }
        once(&parts);
        parts.write("in/c.jsonl", &rows(2, 24));
    }
    assert!(kills >= 3, "only {kills} came before the end");
    // What the kills left is taken away.
    for half in ["versions/.tmp-half/adapter", "rounds/0001/half", "rounds/0009/half"] {
        parts.write(&format!("out/{half}"), "half");
    }
    once(&parts);
    let left = |folder: &str| std::fs::read_dir(parts.path("out").join(folder)).unwrap().count();
    assert_eq!((left("versions"), left("rounds")), (2, 0));
    assert_eq!(files(&versions(&parts)), [(1, vec!["a.jsonl", "b.jsonl"]), (2, vec!["c.jsonl"])]);
    for version in ["out/versions/0001", "out/versions/0002"] {
        assert!(adapter(&whole, version) == adapter(&parts, version), "{version} differs");
    }
    assert_eq!(once(&parts)["rounds"], Value::Array(vec![]));
}

#[test]
fn a_watch_takes_up_what_arrives_goes_on_from_where_it_was_put_back_and_ends_when_told() {
    let place = place("", "max_steps = 6");
    let watch = place.spawn("train c.toml --watch in --quiet --json");
    wait_for(|| place.path("out/.lock").exists());
    let published = |number: u64| place.path(&format!("out/versions/{number:04}")).exists();
    for (kind, name) in ["a", "b"].into_iter().enumerate() {
        // Under another name until it is whole.
        place.write("in/coming.part", &rows(kind, 16));
        std::fs::rename(place.path("in/coming.part"), place.path(&format!("in/{name}.jsonl"))).unwrap();
        wait_for(|| published(kind as u64 + 1));
    }
    place.lora("train c.toml --watch in --once").exits(1).says(&["another run is at work"]);
    wait_for(|| versions(&place)["current"] == 2);
    let said = place.lora("rollback out").exits(0).stdout;
    assert!(said.contains("0001") && said.contains("it was 0002"), "{said}");
    assert!(adapter(&place, "out/current") == adapter(&place, "out/versions/0001"));
    place.lora("rollback out --to 7").exits(2).says(&["0007", "[1, 2]"]);
    place.write("in/c.jsonl", &rows(2, 16));
    wait_for(|| published(3));
    assert_eq!(versions(&place)["versions"][2]["parent"].as_u64(), Some(1));
    wait_for(|| versions(&place)["current"] == 3);
    signal("TERM", watch.id());
    let done = Done::of(watch.wait_with_output().unwrap()).exits(0);
    let report = done.json();
    assert_eq!((&report["status"], report["rounds"].as_array().unwrap().len()), (&"stopped".into(), 3));
}

#[test]
fn asked_to_stop_within_a_round_it_saves_and_goes_on_unless_another_version_counts_by_then() {
    let place = place("", "max_steps = 30");
    place.write("in/a.jsonl", &rows(0, 24));
    once(&place);
    place.write("in/b.jsonl", &rows(1, 24));
    once(&place);
    place.write("in/c.jsonl", &rows(2, 24));
    let stopped = || {
        let watch = place.spawn("train c.toml --watch in --quiet --json");
        wait_for(|| place.path("out/rounds/0003/checkpoints/step-2").exists());
        signal("TERM", watch.id());
        let report = Done::of(watch.wait_with_output().unwrap()).exits(0).json();
        assert_eq!((&report["status"], &report["rounds"]), (&"stopped".into(), &Value::Array(vec![])));
    };
    stopped();
    place.lora("rollback out --to 1").exits(0);
    let said = place.lora("train c.toml --watch in --once --json").exits(0).says(&["trained again from there"]);
    let round = &said.json()["rounds"][0];
    assert_eq!((round["version"].as_u64(), round["parent"].as_u64()), (Some(4), Some(1)));
    assert_eq!(files(&versions(&place))[2], (4, vec!["c.jsonl"]));
}

#[test]
fn no_file_is_blamed_for_a_held_out_set_that_broke_meanwhile() {
    let place = place("", "max_steps = 4");
    let watch = place.spawn("train c.toml --watch in --json");
    // Once it is written, the held-out set was looked at.
    place.write("in/a.jsonl", &rows(0, 16));
    wait_for(|| place.path("out/versions/0001").exists());
    place.write("eval.jsonl", "{\"prompt\": 3");
    place.write("in/b.jsonl", &rows(1, 16));
    Done::of(watch.wait_with_output().unwrap()).exits(2).says(&["eval.jsonl:1"]);
    place.write("eval.jsonl", &rows(50, 12));
    let report = once(&place);
    assert_eq!((report["current"].as_u64(), &report["refused"]), (Some(2), &Value::Array(vec![])));
    assert_eq!(files(&versions(&place))[1], (2, vec!["b.jsonl"]));
}

#[test]
fn what_it_cannot_work_with_is_said_before_anything_is_waited_for() {
    let place = place("", "max_steps = 2");
    let refused = |line: &str, words: &[&str]| {
        place.lora(line).exits(2).says(words);
        assert!(!place.path("out/watch.json").exists());
    };
    refused("train c.toml --watch in --set data.eval=[]", &["data.eval", "held-out"]);
    refused("train c.toml --watch nowhere", &["nowhere", "make it first"]);
    refused("train c.toml --watch in --set train.finetuning_type=full", &["train.finetuning_type"]);
    refused("train c.toml --watch in --set data.eval=missing.jsonl", &["missing.jsonl"]);
    refused("train c.toml --watch in --set watch.interval=soon", &["watch.interval"]);
    refused("train c.toml --watch in --set data.train=[\"a\",\"b\"]", &["data.train", "one entry"]);
    refused("train c.toml --once", &["--watch"]);
    refused("train c.toml --watch in --resume", &["--resume"]);
    place.lora("rollback out").exits(2).says(&["no published version"]);
}

#[test]
fn an_old_set_is_replayed_shown_and_the_same_after_a_resume() {
    let place = Place::new();
    place.write("old.jsonl", &rows(7, 10));
    let text = format!(
        "output_dir = \"run\"\nseed = 3\n[model]\npath = {:?}\ndevice = \"cpu\"\nthreads = 1\n[data]\ntrain = \"train.jsonl\"\n\
         replay = [\"old.jsonl\"]\nreplay_share = 0.2\nmax_length = 64\n[lora]\nr = 4\nlora_dropout = 0.1\n[train]\n\
         per_device_train_batch_size = 4\nnum_train_epochs = 2\nsave_steps = 20\nsample_count = 0\n",
        fixture("llama")
    );
    place.write("c.toml", &text);
    // 48 new rows and a quarter of that: a fifth of 60.
    let stats = place.lora("data stats c.toml").exits(0).stdout;
    assert!(
        stats.contains("old.jsonl") && stats.contains("of 60 rows of a pass (20.0 %), from an old set of 10"),
        "{stats}"
    );
    let preview = place
        .lora("data preview c.toml --skip 47 --n 2")
        .exits(0)
        .says(&["a pass has 60 of them, 12 of those from the old set of 10"]);
    assert_eq!(preview.stdout.matches("replayed,").count(), 1, "{preview:?}");
    place.lora("train c.toml --dry-run").exits(0);
    let plan = place.lora("train c.toml --dry-run --json").exits(0).json();
    assert_eq!((plan["data"]["rows"].as_u64(), plan["steps"]["total"].as_u64()), (Some(60), Some(30)));
    let plan = place.lora("train c.toml --dry-run").exits(0).stdout;
    assert!(plan.contains("replay   12 of 60 rows a pass (20.0 %), from an old set of 10"), "{plan}");

    place.lora("train c.toml --quiet").exits(0);
    let whole = adapter(&place, "run");
    std::fs::remove_dir_all(place.path("run/checkpoints/step-30")).unwrap();
    place.lora("train c.toml --quiet --resume").exits(0);
    assert!(adapter(&place, "run") == whole, "the adapters differ");
    // Another old set, and another share, is another run.
    std::fs::remove_dir_all(place.path("run/checkpoints/step-30")).unwrap();
    place.lora("train c.toml --resume --set data.replay_share=0.3").exits(2).says(&["data.replay_share"]);
    place.write("old.jsonl", &rows(8, 10));
    place.lora("train c.toml --resume").exits(2).says(&["the sha256 of the data"]);

    for (set, words) in [
        ("data.replay_share=1.0", &["data.replay_share", "to below 1"][..]),
        ("data.replay_share=-0.1", &["data.replay_share"]),
        ("data.replay_share=0.0", &["data.replay_share is missing"]),
        ("data.replay=[]", &["data.replay is missing"]),
        ("data.mixing=sequential", &["data.replay", "sequential"]),
        ("lora.task_type=SEQ_CLS", &["data.replay", "SEQ_CLS"]),
    ] {
        place.lora_words(&["train", "c.toml", "--output", "other", "--set", set]).exits(2).says(words);
    }
}
