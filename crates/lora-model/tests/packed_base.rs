//! Model folders that bitsandbytes packed (`tests/fixtures/packed`, made by `tests/reference/make_packed_bases.py`): kept as they
//! are, and they compute what transformers and PEFT compute with them.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

mod common;

use common::{distance, fixtures, load, unpadded};
use lora_format::{Checkpoint, TensorFile, read_adapter, write_tensors};
use lora_model::{Decoder, Keeping, Mode, ModelConfig, ModuleRef, Packing, Storage, check_weights, packed_already};
use lora_torch::Weight;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

// fp32 on both sides, sums in another order, as of the other fixtures.
const TOLERANCE: f64 = 1e-5;
const GRADIENT_TOLERANCE: f64 = 1e-4;

const FORMS: [&str; 3] = ["nf4", "nf4_double", "int8"];

fn folder(form: &str) -> PathBuf {
    fixtures().join("packed").join(form)
}

#[test]
fn packed_bases_and_adapters_over_them_compute_what_peft_does() {
    for form in FORMS {
        let mut model = load(&folder(form));
        for adapted in [false, true] {
            let dir = if adapted { folder(form).join("adapter") } else { folder(form) };
            if adapted {
                model.load_adapter(&read_adapter(&dir).unwrap()).unwrap();
            }
            let reference = TensorFile::open(&dir.join("reference.safetensors")).unwrap();
            let (batch, places) =
                unpadded(&model, &TensorFile::open(&folder(form).join("reference.safetensors")).unwrap());
            let logits = tch::no_grad(|| model.logits(&model.hidden(&batch, Mode::Eval, None).unwrap()).unwrap());
            let wanted = reference.read("logits").unwrap().flatten(0, 1).index_select(0, &places);
            assert!(distance(&logits, &wanted) < TOLERANCE, "{form}: logits {}", distance(&logits, &wanted));
            let loss = model.loss(&batch, Mode::Eval).unwrap().double_value(&[]) / batch.trained() as f64;
            let wanted = reference.read("loss").unwrap().double_value(&[0]);
            assert!((loss - wanted).abs() < TOLERANCE * wanted, "{form}: loss {loss} against {wanted}");
            for checkpointing in [false, true] {
                let parameters = model.parameters();
                assert_eq!(parameters.is_empty(), !adapted);
                if !adapted {
                    continue;
                }
                parameters.iter().for_each(|p| p.tensor.shallow_clone().zero_grad());
                let _loss = model.loss_and_backward(&batch, 0, 1.0 / batch.trained() as f64, checkpointing).unwrap();
                for p in parameters {
                    let name = p.name.strip_suffix(".weight").unwrap();
                    let wanted = reference.read(&format!("grad.base_model.model.{name}.default.weight")).unwrap();
                    let far = distance(&p.tensor.grad(), &wanted);
                    assert!(far < GRADIENT_TOLERANCE, "{form}: gradient of {} differs by {far}", p.name);
                }
            }
        }
    }
}

#[test]
fn what_is_packed_stays_as_it_is_stored() {
    for form in FORMS {
        let dir = folder(form);
        let (file, reference) =
            (Checkpoint::open(&dir).unwrap(), TensorFile::open(&dir.join("reference.safetensors")).unwrap());
        for storage in [Storage::Converted, Storage::Stored, Storage::Mapped] {
            let keeping = Keeping { kind: Kind::Float, device: Device::Cpu, storage };
            let config = ModelConfig::read(&dir).unwrap();
            let mut model = Decoder::load_as(&dir, config.clone(), 0, keeping, &mut |_, _| {}).unwrap();
            // What is packed already is not packed again.
            model.pack(Packing::Int8, &mut |_, _| {}).unwrap();
            let mut packed = 0;
            for (path, module) in model.modules() {
                let ModuleRef::Linear(layer) = module else { continue };
                let stored = file.read(&format!("{path}.weight"));
                let codes = match &layer.weight {
                    Weight::Plain(_) => {
                        assert_eq!(path, "lm_head");
                        continue;
                    }
                    Weight::Nf4(w) => w.codes.unsqueeze(1),
                    Weight::Int8(w) => w.codes.shallow_clone(),
                };
                assert!(codes.equal(&stored.unwrap()), "{form} {path}");
                packed += 1;
                if let Ok(dense) = reference.read(&format!("dense.{path}.weight")) {
                    assert!(layer.weight.dense().unwrap().equal(&dense), "{form} {path}: other numbers");
                    let rows = layer.weight.dense_rows(16, 16).unwrap();
                    assert!(rows.equal(&dense.narrow(0, 16, 16)), "{form} {path}: other numbers in rows");
                }
            }
            assert_eq!(packed, 14);
            let already = packed_already(&dir, &config).unwrap();
            assert_eq!(already.len(), packed);
            let predicted = lora_model::base_bytes(&config, storage, None, Kind::Float, Kind::Float, &already);
            assert_eq!(model.base_bytes() as i64, predicted, "{form} {storage:?}");
        }
        // As the model that it would be unpacked.
        let whole = Checkpoint::open_unpacked(&dir).unwrap();
        assert_eq!(whole.unpacked(), 14);
        assert!(whole.names().all(|name| name.ends_with(".weight")), "{:?}", whole.names().collect::<Vec<_>>());
        let name = "model.layers.1.mlp.down_proj.weight";
        assert_eq!(
            (whole.info(name).unwrap().kind, whole.info(name).unwrap().shape.clone()),
            (Kind::Float, vec![64, 128])
        );
        assert!(whole.read(name).unwrap().equal(&reference.read(&format!("dense.{name}")).unwrap()), "{form}");
        assert!(whole.read_rows(name, 62, 3).is_err());
    }
}

/// The folder with its tensors changed.
fn damaged(form: &str, change: impl Fn(&str, &Tensor) -> Option<Tensor>) -> tempfile::TempDir {
    let (from, to) = (folder(form), tempfile::tempdir().unwrap());
    std::fs::copy(from.join("config.json"), to.path().join("config.json")).unwrap();
    let file = Checkpoint::open(&from).unwrap();
    let tensors: Vec<(String, Tensor)> = file
        .names()
        .filter_map(|name| {
            let t = file.read(name).unwrap();
            let t = if name.starts_with("model.layers.1.mlp.down_proj") { change(name, &t)? } else { t };
            Some((name.to_string(), t))
        })
        .collect();
    write_tensors(&to.path().join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    to
}

fn told(dir: &Path) -> String {
    let text = check_weights(dir, &ModelConfig::read(dir).unwrap()).unwrap_err().to_string();
    assert!(text.contains("model.layers.1.mlp.down_proj") && !text.contains("layers.0"), "{text}");
    text
}

#[test]
fn a_damaged_packed_form_is_refused_before_anything_is_read() {
    let state = |text: &'static [u8]| {
        move |name: &str, t: &Tensor| {
            Some(if name.contains("quant_state") { Tensor::from_slice(text) } else { t.copy() })
        }
    };
    let without = |part: &'static str| move |name: &str, t: &Tensor| (!name.ends_with(part)).then(|| t.copy());
    let cut = |part: &'static str| {
        move |name: &str, t: &Tensor| {
            Some(if name.ends_with(part) { t.narrow(0, 0, t.size()[0] - 1).copy() } else { t.copy() })
        }
    };
    for part in ["quant_state.bitsandbytes__nf4", "absmax", "quant_map"] {
        let text = told(damaged("nf4", without(part)).path());
        assert!(text.contains(part) && text.contains("missing"), "{part}: {text}");
    }
    for part in ["nested_absmax", "nested_quant_map"] {
        let text = told(damaged("nf4_double", without(part)).path());
        assert!(text.contains(part) && text.contains("missing"), "{part}: {text}");
    }
    let text = told(damaged("int8", without("SCB")).path());
    assert!(text.contains("SCB") && text.contains("missing"), "{text}");

    let text = told(damaged("nf4", cut("weight")).path());
    assert!(text.contains("4095 bytes of codes") && text.contains("4096"), "{text}");
    let text = told(damaged("nf4", cut("absmax")).path());
    assert!(text.contains("[127]") && text.contains("128 of"), "{text}");
    let text = told(damaged("int8", cut("SCB")).path());
    assert!(text.contains("[63]") && text.contains("64 of"), "{text}");
    let text = told(damaged("int8", cut("weight")).path());
    assert!(text.contains("63 of float32 are needed"), "{text}");

    let other = br#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [128, 64]}"#;
    let text = told(damaged("nf4", state(other)).path());
    assert!(text.contains("[128, 64] packed") && text.contains("[64, 128]"), "{text}");
    let text = told(damaged("nf4", state(b"{\"quant_type\": \"fp4\"}")).path());
    assert!(text.contains("fp4"), "{text}");
    let text = told(damaged("nf4", state(b"not json")).path());
    assert!(text.contains("JSON"), "{text}");
    let text = told(damaged("nf4", state(br#"{"quant_type": "nf4", "blocksize": 0, "shape": [64, 128]}"#)).path());
    assert!(text.contains("blocksize"), "{text}");

    // A file that ends early.
    let dir = damaged("nf4", |_, t| Some(t.copy()));
    let file = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 100]).unwrap();
    let text = check_weights(dir.path(), &ModelConfig::read(dir.path()).unwrap()).unwrap_err().to_string();
    assert!(text.contains("model.safetensors"), "{text}");
}
