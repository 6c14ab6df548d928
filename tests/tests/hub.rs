//! Models and datasets of the hub through the binary, from a hub on this machine.
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

#[path = "../../crates/lora-hub/tests/server/mod.rs"]
mod server;

use e2e::{Done, fixtures, small_dataset};
use server::{Content, Hub, noise, sha256};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const LORA: &str = env!("CARGO_BIN_EXE_lora-e2e");
const PLANTED: &str = "hf_planted0123456789";

/// A folder with a cache, and a hub to fill it from.
struct Place {
    dir: tempfile::TempDir,
    hub: Option<Hub>,
    endpoint: String,
}

impl Place {
    fn new(hub: Hub) -> Self {
        let endpoint = hub.hub.url();
        Self { dir: tempfile::tempdir().unwrap(), hub: Some(hub), endpoint }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(LORA);
        command.args(line.split(' ')).current_dir(self.dir.path()).stdin(Stdio::null());
        for (name, value) in std::env::vars_os() {
            let text = name.to_string_lossy().to_lowercase();
            if text.starts_with("hf_") || text.ends_with("_proxy") || value.is_empty() {
                command.env_remove(name);
            }
        }
        command.env("HF_ENDPOINT", &self.endpoint).env("HF_HUB_CACHE", self.path("hub")).env("HF_TOKEN", PLANTED);
        command.env("XDG_CACHE_HOME", self.path("cache"));
        command
    }

    fn lora(&self, line: &str) -> Done {
        let done = Done::of(self.command(line).output().unwrap());
        assert!(!done.stdout.contains(PLANTED) && !done.stderr.contains(PLANTED), "the token is shown: {done:#?}");
        done
    }

    fn offline(&self, line: &str) -> Done {
        Done::of(self.command(line).env("HF_HUB_OFFLINE", "1").output().unwrap())
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }
}

/// A fixture's model as a repository, among things that nobody needs.
fn model() -> Content {
    let mut content =
        Content::new("models", "own/base", 'a').file("README.md", "# base").large("pytorch_model.bin", "pickle");
    for entry in std::fs::read_dir(fixtures().join("llama")).unwrap().flatten().filter(|e| e.path().is_file()) {
        let name = entry.file_name().into_string().unwrap();
        let bytes = std::fs::read(entry.path()).unwrap();
        let needed = name.ends_with(".json") || name.ends_with(".jinja") || name == "model.safetensors";
        if needed {
            content =
                if name.ends_with(".safetensors") { content.large(&name, bytes) } else { content.file(&name, bytes) };
        }
    }
    content
}

fn dataset() -> Content {
    Content::new("datasets", "own/set", 'b')
        .file("README.md", "# set")
        .large("data/train-00000-of-00001.jsonl", small_dataset())
        .large("data/test-00000-of-00001.jsonl", small_dataset().replace("the ", "a "))
}

/// Every file below a folder.
fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_dir() { found.extend(walk(&entry.path())) } else { found.push(entry.path()) }
    }
    found
}

const TRAIN: &str = "train --model own/base --data hf://own/set --output run --set train.max_steps=4 --set data.max_length=96 \
                     --set lora.r=2 --device cpu --threads 1 --set train.per_device_train_batch_size=2";

#[test]
fn a_run_takes_model_and_data_from_the_hub_and_later_from_the_cache() {
    let mut place = Place::new(Hub::new(vec![model(), dataset()]));
    place.lora(TRAIN).exits(0).says(&["fetching model own/base", "fetching dataset own/set"]);
    let (model_at, data_at) = (format!("hf://own/base@{}", "a".repeat(40)), format!("hf://own/set@{}", "b".repeat(40)));
    let resolved = place.text("run/config.resolved.toml");
    assert!(resolved.contains(&model_at) && resolved.contains(&data_at), "{resolved}");
    assert!(place.text("run/adapter_config.json").contains("\"base_model_name_or_path\": \"own/base\""));
    // Only what is needed came: one split, and nothing that would have to be unpickled.
    let names: Vec<String> = walk(&place.path("hub")).iter().map(|p| p.display().to_string()).collect();
    let has = |part: &str| names.iter().any(|name| name.contains(part));
    assert!(has("model.safetensors") && has("train-00000"), "{names:?}");
    assert!(!has("pytorch_model.bin") && !has("README") && !has("test-00000"), "{names:?}");
    for file in walk(place.dir.path()) {
        let bytes = std::fs::read(&file).unwrap_or_default();
        assert!(!bytes.windows(PLANTED.len()).any(|w| w == PLANTED.as_bytes()), "the token is in {}", file.display());
    }

    // The other split, of the same commit.
    let eval = "eval --model own/base --adapter run --device cpu --data hf://own/set/data/test*.jsonl --json";
    let online = place.lora(eval).exits(0).says(&["fetching dataset own/set"]);
    // The hub is gone.
    place.hub = None;
    let offline = place.offline(eval).exits(0);
    assert_eq!(online.stdout, offline.stdout);
    let weights = std::fs::read(place.path("run/adapter_model.safetensors")).unwrap();
    let again = place.lora(&TRAIN.replace("--output run", "--output again")).exits(0);
    assert!(!again.stderr.contains("fetching"), "{}", again.stderr);
    assert!(weights == std::fs::read(place.path("again/adapter_model.safetensors")).unwrap());
    place.offline("train --resume --output run --set train.max_steps=6").exits(0);
    place
        .offline("generate --model hf://own/base --adapter run --device cpu --raw --prompt adds --max-new-tokens 2")
        .exits(0);
    place.offline("merge --model own/base --adapter run --output merged").exits(0);
    place.offline("data preview hf://own/set --model own/base").exits(0);
    place.offline("train --model own/base --data hf://own/other --output no").exits(2).says(&[
        "dataset own/other is not in the cache",
        "HF_HUB_OFFLINE",
        "lora fetch --dataset hf://own/other",
    ]);
    place
        .offline("generate --model own/none --prompt x")
        .exits(2)
        .says(&["no such folder", "model own/none is not in the cache"]);
    let unreached = place.lora("train --model own/base --data hf://own/other --output no").exits(1);
    unreached.says(&[
        "dataset own/other is not in the cache",
        "was not reached",
        "lora fetch --dataset hf://own/other",
    ]);
    assert!(!place.path("no").exists());
}

#[test]
fn a_branch_that_moved_is_fetched_on_request_and_seen_at_a_resume() {
    let mut place = Place::new(Hub::new(vec![model(), dataset()]));
    place.lora(TRAIN).exits(0);
    let mut moved = dataset();
    moved.commit = "c".repeat(40);
    moved.files[1].1 = small_dataset().replace("the ", "an ").into_bytes();
    let hub = Hub::new(vec![model(), moved]);
    (place.endpoint, place.hub) = (hub.hub.url(), Some(hub));
    place.lora(&TRAIN.replace("--output run", "--output again")).exits(0);
    assert!(place.text("again/config.resolved.toml").contains(&"b".repeat(40)));
    let fetched = place.lora("fetch hf://own/set --dataset --split train --json").exits(0);
    let report: serde_json::Value = serde_json::from_str(&fetched.stdout).unwrap();
    assert_eq!((report["commit"].as_str(), report["files"].as_u64()), (Some("c".repeat(40).as_str()), Some(1)));
    let folder = place.lora("fetch datasets/own/set").exits(0);
    assert!(folder.stdout.trim_end().ends_with(&"c".repeat(40)), "{}", folder.stdout);
    // The run that is resumed had another commit, and says so.
    let resumed = place.lora(&format!("{TRAIN} --resume")).exits(2);
    resumed.says(&[&"b".repeat(40), &"c".repeat(40)]);
    place.lora("fetch own/nothing").exits(2).says(&["model own/nothing", "HF_TOKEN"]);
    place.lora("fetch hf://own/set/../x --dataset").exits(2).says(&["not the name of a dataset"]);
}

#[test]
fn a_model_that_is_not_known_is_refused_before_its_weights_are_fetched() {
    let config = std::fs::read_to_string(fixtures().join("llama/config.json")).unwrap();
    let config = config.replace("\"llama\"", "\"unheard_of\"").replace("LlamaForCausalLM", "UnheardOfForCausalLM");
    let content = Content::new("models", "own/strange", 'a')
        .file("config.json", config)
        .large("model.safetensors", noise(1, 1000));
    let place = Place::new(Hub::new(vec![content]));
    place.lora("generate --model own/strange --prompt x").exits(2).says(&["unheard_of"]);
    assert!(place.hub.as_ref().unwrap().store.log().is_empty());
}

/// A dataset that takes its time.
fn slow(bytes: &[u8]) -> Place {
    let content = Content::new("datasets", "own/slow", 'd').large("train.jsonl", bytes);
    Place::new(Hub::spoilt(vec![content], |_, mut reply| {
        reply.pace = Some((10_000, Duration::from_millis(10)));
        reply
    }))
}

fn fetching(place: &Place) -> Child {
    place.command("fetch hf://own/slow --dataset").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_killed_download_is_gone_on_with() {
    let bytes = noise(3, 400_000);
    let place = slow(&bytes);
    let blobs = place.path("hub/datasets--own--slow/blobs");
    let (partial, blob) = (blobs.join(format!("{}.incomplete", sha256(&bytes))), blobs.join(sha256(&bytes)));
    for kill_at in [1, 60_000, 150_000] {
        let mut child = fetching(&place);
        while std::fs::metadata(&partial).map_or(0, |m| m.len()) < kill_at {
            assert!(child.try_wait().unwrap().is_none(), "the download ended before it was killed");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(
            !blob.exists()
                && std::fs::read(&partial).unwrap() == bytes[..std::fs::metadata(&partial).unwrap().len() as usize]
        );
    }
    place.lora("fetch hf://own/slow --dataset").exits(0).says(&["of it here already"]);
    assert!(std::fs::read(&blob).unwrap() == bytes && walk(&blobs).len() == 1);
    let asked = place.hub.as_ref().unwrap().store.log();
    assert_eq!(asked.len(), 4);
    assert!(asked[1..].iter().all(|request| request.range().is_some_and(|from| from > 0)));
}

#[test]
fn two_processes_fetch_a_file_once() {
    let bytes = noise(4, 100_000);
    let place = slow(&bytes);
    for mut child in [fetching(&place), fetching(&place)] {
        assert!(child.wait().unwrap().success());
    }
    let blobs = place.path("hub/datasets--own--slow/blobs");
    assert!(std::fs::read(blobs.join(sha256(&bytes))).unwrap() == bytes && walk(&blobs).len() == 1);
    assert_eq!(place.hub.as_ref().unwrap().store.log().len(), 1);
}
