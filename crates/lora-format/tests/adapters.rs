//! PEFT's adapter folders, and damaged ones.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use lora_format::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder, AdapterModule, Error, LoraTensors, TensorFile, read_adapter,
    write_adapter, write_tensors,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};
use tempfile::TempDir;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// Every folder below that holds an adapter.
fn adapter_folders(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            adapter_folders(&path, found);
        }
    }
    if dir.join(ADAPTER_CONFIG).is_file() {
        found.push(dir.to_path_buf());
    }
}

fn count_tensors(folder: &AdapterFolder) -> usize {
    let count = |module: &AdapterModule| match module {
        AdapterModule::Linear(lora) | AdapterModule::Embedding(lora) => {
            let optional = [&lora.bias, &lora.magnitude, &lora.base_weight, &lora.base_bias];
            2 + optional.into_iter().flatten().count()
        }
        AdapterModule::Vera(vera) => 2 + usize::from(vera.base_weight.is_some()),
        AdapterModule::AdaLora(triplets) => 3 + usize::from(triplets.base_weight.is_some()),
        AdapterModule::Saved { tensors } => tensors.len(),
        AdapterModule::Tokens(_) => 1,
        AdapterModule::Stacked(_) => 2,
    };
    let shared = folder.modules.values().any(|m| matches!(m, AdapterModule::Vera(v) if v.projection.is_some()));
    folder.modules.values().map(count).sum::<usize>() + if shared { 2 } else { 0 }
}

#[test]
fn every_fixture_reads_whole_and_writes_back_as_peft_wrote_it() {
    let mut folders = Vec::new();
    adapter_folders(&fixtures(), &mut folders);
    let mut read = 0;
    for dir in folders {
        let folder = read_adapter(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        read += 1;
        // What was read in the layout of PEFT before 0.19 is written in today's.
        let dir = PathBuf::from(dir.to_string_lossy().replace("experts_before_0_19", "experts"));
        let theirs = TensorFile::open(&dir.join(ADAPTER_WEIGHTS)).unwrap();
        // With `bias = "all"` PEFT writes the biases of a module of modules_to_save again, under the names of its wrapper.
        let again = [".modules_to_save.bias", ".original_module.bias"];
        // Of tokens alone PEFT writes those of a tied head again, which follows its embedding.
        let table = "base_model.model.model.embed_tokens.trainable_tokens_delta";
        let follows = |name: &str| {
            let is = folder.config.is_tokens_alone() && name == "base_model.model.lm_head.trainable_tokens_delta";
            is && theirs.bytes(name).unwrap() == theirs.bytes(table).unwrap()
        };
        let is_again = |name: &str| again.iter().any(|end| name.ends_with(end)) || follows(name);
        let names: Vec<&str> = theirs.names().filter(|name| !is_again(name)).collect();
        assert_eq!(count_tensors(&folder), names.len(), "{}", dir.display());

        let temp = tempfile::tempdir().unwrap();
        let out = temp.path().join("new/adapter");
        write_adapter(&out, &folder.config, &folder.modules).unwrap();
        let ours = TensorFile::open(&out.join(ADAPTER_WEIGHTS)).unwrap();
        assert_eq!(ours.names().collect::<Vec<_>>(), names);
        assert_eq!(ours.metadata(), theirs.metadata());
        for name in names {
            assert_eq!(ours.info(name).unwrap().shape, theirs.info(name).unwrap().shape);
            assert_eq!(ours.bytes(name).unwrap(), theirs.bytes(name).unwrap(), "{name}");
        }
        let config =
            |dir: &Path| -> Value { serde_json::from_slice(&fs::read(dir.join(ADAPTER_CONFIG)).unwrap()).unwrap() };
        assert_eq!(config(&out), config(&dir));
        let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&config(&out)), keys(&config(&dir)), "the order of the keys");
    }
    assert!(read >= 83, "{read}");
}

#[test]
fn the_kinds_of_modules_are_told_apart() {
    let read = |variant: &str| read_adapter(&fixtures().join("llama/adapters").join(variant)).unwrap();
    let embedding = read("embedding");
    match &embedding.modules["model.embed_tokens"] {
        AdapterModule::Embedding(LoraTensors { a, b, base_weight: Some(w), .. }) => {
            assert_eq!((a.size(), b.size(), w.size()), (vec![4, 320], vec![32, 4], vec![320, 32]));
        }
        other => panic!("{other:?}"),
    }
    match &read("head_saved").modules["lm_head"] {
        AdapterModule::Saved { tensors } => assert_eq!(tensors["weight"].size(), [320, 32]),
        other => panic!("{other:?}"),
    }
    match &read("patterns").modules["model.layers.1.self_attn.q_proj"] {
        AdapterModule::Linear(LoraTensors { a, base_weight: None, .. }) => assert_eq!(a.size(), [6, 32]),
        other => panic!("{other:?}"),
    }
}

/// An adapter of one module, its tensors and config changed by `change` before it is read.
fn read_changed(change: impl FnOnce(&mut BTreeMap<String, Tensor>, &mut Value)) -> Result<AdapterFolder, Error> {
    let (dir, mut config) = (
        tempfile::tempdir().unwrap(),
        json!({
            "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens", "lm_head"],
            "modules_to_save": ["norm"]
        }),
    );
    let tensor = |shape: [i64; 2]| Tensor::ones(shape, (Kind::Float, tch::Device::Cpu));
    let mut tensors = BTreeMap::from([(a(), tensor([2, 3])), (b(), tensor([5, 2]))]);
    change(&mut tensors, &mut config);
    save(&dir, tensors, &config);
    read_adapter(dir.path())
}

fn save(dir: &TempDir, tensors: BTreeMap<String, Tensor>, config: &Value) {
    let tensors: Vec<_> = tensors.into_iter().collect();
    write_tensors(&dir.path().join(ADAPTER_WEIGHTS), &tensors, &BTreeMap::new()).unwrap();
    fs::write(dir.path().join(ADAPTER_CONFIG), config.to_string()).unwrap();
}

fn key(suffix: &str) -> String {
    format!("base_model.model.model.layers.0.self_attn.q_proj.{suffix}")
}

fn a() -> String {
    key("lora_A.weight")
}

fn b() -> String {
    key("lora_B.weight")
}

#[test]
fn half_precision_is_read_as_float32() {
    let folder = read_changed(|t, _| {
        t.insert(a(), Tensor::from_slice(&[1.5f32, -2.0, 0.25, 1.0, 2.0, 3.0]).view([2, 3]).to_kind(Kind::BFloat16));
        t.insert(b(), Tensor::ones([5, 2], (Kind::Half, tch::Device::Cpu)));
    });
    match &folder.unwrap().modules["model.layers.0.self_attn.q_proj"] {
        AdapterModule::Linear(LoraTensors { a, b, .. }) => {
            assert_eq!((a.kind(), b.kind()), (Kind::Float, Kind::Float));
            assert_eq!(a.double_value(&[0, 1]), -2.0);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn damaged_adapters_are_refused_by_tensor() {
    type Change = fn(&mut BTreeMap<String, Tensor>, &mut Value);
    let cases: [(&str, Change, &str); 22] = [
        ("no B", |t, _| drop(t.remove(&b())), "q_proj.lora_B.weight`: missing"),
        ("no A", |t, _| drop(t.remove(&a())), "q_proj.lora_A.weight`: missing"),
        ("nothing", |t, _| t.clear(), "holds no adapter tensors"),
        (
            "wrong prefix",
            |t, _| rename(t, &a(), "model.layers.0.self_attn.q_proj.lora_A.weight"),
            "does not begin with",
        ),
        (
            "old adapter name",
            |t, _| rename(t, &a(), &key("lora_A.default.weight")),
            "no known tensor of a LoRA adapter",
        ),
        ("magnitude", |t, _| copy(t, &key("lora_magnitude_vector")), "does not ask for it"),
        ("bias of B", |t, _| copy(t, &key("lora_B.bias")), "does not ask for it"),
        ("no magnitude", |_, c| c["use_dora"] = json!(true), "lora_magnitude_vector`: missing"),
        ("no bias of B", |_, c| c["lora_bias"] = json!(true), "lora_B.bias`: missing"),
        ("extra tensor", |t, _| copy(t, &key("weight")), "neither of a LoRA adapter nor of modules_to_save"),
        ("no module", |t, _| copy(t, "base_model.model.weight"), "no module"),
        ("not a target", |_, c| c["target_modules"] = json!(["k_proj"]), "not among target_modules"),
        ("not matched", |_, c| c["target_modules"] = json!(r".*\.1\..*q_proj"), "not among target_modules"),
        ("rank", |_, c| c["r"] = json!(3), "q_proj.lora_A.weight`: shape [2, 3], but must be [3, inputs]"),
        ("rank by pattern", |_, c| c["rank_pattern"] = json!({"q_proj": 4}), "must be [4, inputs]"),
        ("rank of B", |t, _| shape(t, &b(), &[5, 3]), "q_proj.lora_B.weight`: shape [5, 3], but must be [outputs, 2]"),
        ("dimensions", |t, _| shape(t, &a(), &[2, 3, 1]), "shape [2, 3, 1]"),
        ("no inputs", |t, _| shape(t, &a(), &[2, 0]), "shape [2, 0]"),
        (
            "NaN",
            |t, _| drop(t.get_mut(&b()).unwrap().get(0).fill_(f64::NAN)),
            "lora_B.weight`: 2 elements are not finite",
        ),
        ("infinity", |t, _| drop(t.get_mut(&a()).unwrap().get(0).fill_(f64::INFINITY)), "3 elements are not finite"),
        ("dtype", |t, _| drop(t.insert(a(), Tensor::ones([2, 3], (Kind::Int, tch::Device::Cpu)))), "dtype int32"),
        ("base weight", |t, _| copy(t, &key("base_layer.weight")), "but must be [5, 3], as A and B say"),
    ];
    for (what, change, wanted) in cases {
        let text = read_changed(change).expect_err(what).to_string();
        assert!(text.contains(wanted), "{what}: {text}");
        assert!(text.contains("adapter_model.safetensors"), "{what}: {text}");
    }
}

fn rename(tensors: &mut BTreeMap<String, Tensor>, from: &str, to: &str) {
    let tensor = tensors.remove(from).unwrap();
    tensors.insert(to.into(), tensor);
}

fn copy(tensors: &mut BTreeMap<String, Tensor>, to: &str) {
    let tensor = tensors[&a()].copy();
    tensors.insert(to.into(), tensor);
}

fn shape(tensors: &mut BTreeMap<String, Tensor>, name: &str, shape: &[i64]) {
    tensors.insert(name.into(), Tensor::ones(shape, (Kind::Float, tch::Device::Cpu)));
}

#[test]
fn a_pickled_adapter_is_refused_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]});
    fs::write(dir.path().join(ADAPTER_CONFIG), config.to_string()).unwrap();
    assert!(matches!(read_adapter(dir.path()), Err(Error::Io { .. })));
    fs::write(dir.path().join("adapter_model.bin"), b"PK\x03\x04").unwrap();
    assert!(matches!(read_adapter(dir.path()), Err(Error::Pickle { .. })));
}

#[test]
fn an_adapter_that_is_not_finite_or_disagrees_with_its_config_is_never_written() {
    let good = read_adapter(&fixtures().join("llama/adapters/lora")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    write_adapter(dir.path(), &good.config, &good.modules).unwrap();
    let before = fs::read(dir.path().join(ADAPTER_WEIGHTS)).unwrap();

    let mut config = good.config.clone();
    config.r += 1;
    let text = write_adapter(dir.path(), &config, &good.modules).unwrap_err().to_string();
    assert!(text.contains("for the rank in the config"), "{text}");
    config.lora_alpha = f64::INFINITY;
    assert!(matches!(write_adapter(dir.path(), &config, &good.modules), Err(Error::Field { .. })));
    match good.modules.values().next().unwrap() {
        AdapterModule::Linear(LoraTensors { a, .. }) => drop(a.get(0).fill_(f64::NAN)),
        other => panic!("{other:?}"),
    }
    let text = write_adapter(dir.path(), &good.config, &good.modules).unwrap_err().to_string();
    assert!(text.contains("not finite"), "{text}");
    assert_eq!(fs::read(dir.path().join(ADAPTER_WEIGHTS)).unwrap(), before);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

/// A fixture's adapter, its tensors and config changed before it is read.
fn read_fixture(
    name: &str,
    change: impl FnOnce(&mut BTreeMap<String, Tensor>, &mut Value),
) -> Result<AdapterFolder, Error> {
    let from = fixtures().join("llama/adapters").join(name);
    let file = TensorFile::open(&from.join(ADAPTER_WEIGHTS)).unwrap();
    let mut tensors = file.names().map(|n| (n.to_string(), file.read(n).unwrap())).collect();
    let mut config = serde_json::from_slice(&fs::read(from.join(ADAPTER_CONFIG)).unwrap()).unwrap();
    change(&mut tensors, &mut config);
    let dir = tempfile::tempdir().unwrap();
    save(&dir, tensors, &config);
    read_adapter(dir.path())
}

#[test]
fn damaged_adapters_of_other_types_are_refused_by_tensor_and_by_field() {
    type Change = fn(&mut BTreeMap<String, Tensor>, &mut Value);
    let cases: [(&str, Change, &str); 21] = [
        ("vera", |t, _| drop(t.remove("base_model.vera_A")), "`base_model.vera_A`: missing"),
        ("vera", |t, _| drop(t.remove("base_model.vera_B")), "`base_model.vera_B`: missing"),
        ("vera", |_, c| c["save_projection"] = json!(false), "drawn from projection_prng_key"),
        ("vera_key", |_, c| c["save_projection"] = json!(true), "`base_model.vera_A`: missing"),
        ("vera", |t, _| drop(t.remove(&key("vera_lambda_d"))), "q_proj.vera_lambda_d`: missing"),
        ("vera", |t, _| drop(t.remove(&key("vera_lambda_b"))), "q_proj.vera_lambda_b`: missing"),
        ("vera", |_, c| c["r"] = json!(9), "for the rank in the config"),
        ("vera", |t, _| drop(t.insert(key("vera_lambda_b"), Tensor::ones([99], FLOAT))), "at most the 32 of vera_B"),
        ("vera", |t, _| drop(t.insert(key("lora_A.weight"), Tensor::ones([8, 32], FLOAT))), "neither"),
        ("vera", |t, _| drop(t.get_mut("base_model.vera_A").unwrap().get(0).fill_(f64::NAN)), "not finite"),
        ("vera", |_, c| c["lora_alpha"] = json!(3), "unknown keys `lora_alpha`"),
        ("vera", |_, c| c["projection_prng_key"] = json!(-1), "`projection_prng_key` is -1"),
        ("vera", |_, c| c["bias"] = json!("all"), "not trained under VERA"),
        ("adalora", |t, _| drop(t.remove(&key("lora_E"))), "q_proj.lora_E`: missing"),
        ("adalora", |_, c| c["init_r"] = json!(5), "must be [5, inputs] for init_r"),
        ("adalora", |_, c| c["beta1"] = json!(1.0), "`beta1` is 1, but must be above 0"),
        ("adalora", |_, c| c["use_dora"] = json!(true), "AdaLoRA and DoRA"),
        ("adalora", |_, c| c["tinit"] = json!(7), "no step is left"),
        ("adalora_pruned", |_, c| c["rank_pattern"] = Value::Null, "must be [6, inputs]"),
        ("adalora_pruned", |_, c| c["init_r"] = json!(7), "init_r = 7 truth values"),
        (
            "adalora_pruned",
            |_, c| c["rank_pattern"]["model.layers.0.self_attn.q_proj.lora_E"] = json!([1, 2]),
            "rank_pattern[",
        ),
    ];
    for (name, change, wanted) in cases {
        let text = read_fixture(name, change).expect_err(wanted).to_string();
        assert!(text.contains(wanted), "{name}: {text}, and not {wanted}");
    }
}

#[test]
fn triplets_that_are_all_pruned_are_read_and_written() {
    let none = read_fixture("adalora", |t, c| {
        let mut pattern = serde_json::Map::new();
        for name in t.keys().filter(|n| n.ends_with(".lora_E")) {
            let path = name.strip_prefix("base_model.model.").unwrap();
            let kept = if path.contains("layers.0.self_attn.q_proj") { [false; 6] } else { [true; 6] };
            pattern.insert(path.into(), json!(kept));
        }
        c["rank_pattern"] = pattern.into();
        for (suffix, shape) in [("lora_A", [0, 32]), ("lora_B", [32, 0]), ("lora_E", [0, 1])] {
            t.insert(key(suffix), Tensor::zeros(shape, FLOAT));
        }
    });
    let folder = none.unwrap();
    assert_eq!(folder.config.rank_of("model.layers.0.self_attn.q_proj").unwrap(), 0);
    assert_eq!(folder.config.rank_of("model.layers.1.self_attn.q_proj").unwrap(), 6);
    let dir = tempfile::tempdir().unwrap();
    write_adapter(dir.path(), &folder.config, &folder.modules).unwrap();
    assert_eq!(read_adapter(dir.path()).unwrap().config, folder.config);
}

const FLOAT: (Kind, tch::Device) = (Kind::Float, tch::Device::Cpu);
