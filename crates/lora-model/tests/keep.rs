//! A base that is stored, mapped or packed against one that is dense: logits, losses, gradients.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

mod common;

use common::{distance, fixtures, load, unpadded};
use lora_format::{Checkpoint, TensorFile, write_tensors};
use lora_model::{Decoder, Keeping, Mode, ModelConfig, ModuleMut, Packing, Storage, all_linear, plan_injection};
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// fp32 on both sides, sums over tiles in another order.
const TOLERANCE: f64 = 1e-5;
const GRADIENT_TOLERANCE: f64 = 1e-4;

const FAMILIES: [&str; 6] = ["llama", "llama_tied_rope3", "qwen3", "mixtral", "gemma2", "gpt2"];

fn load_as(dir: &Path, storage: Storage) -> Decoder {
    let keeping = Keeping { kind: Kind::Float, device: Device::Cpu, storage };
    Decoder::load_as(dir, ModelConfig::read(dir).unwrap(), 0, keeping, &mut |_, _| {}).unwrap()
}

/// Logits of every token, the summed loss, and the gradient of each trained parameter.
fn results(model: &Decoder, family: &str, checkpointing: bool) -> (Tensor, f64, BTreeMap<String, Tensor>) {
    let file = TensorFile::open(&fixtures().join(family).join("reference.safetensors")).unwrap();
    let (batch, _) = unpadded(model, &file);
    let logits = tch::no_grad(|| model.logits(&model.hidden(&batch, Mode::Eval, None).unwrap()).unwrap());
    let parameters = model.parameters();
    parameters.iter().for_each(|p| p.tensor.shallow_clone().zero_grad());
    let loss = model.loss_and_backward(&batch, 1, 1.0, checkpointing).unwrap().double_value(&[]);
    (logits, loss, parameters.into_iter().map(|p| (p.name, p.tensor.grad())).collect())
}

fn inject(model: &mut Decoder) {
    let plan = plan_injection(&model.config, &all_linear(2, 4.0)).unwrap();
    model.inject(&plan, 7).unwrap();
}

fn agree(name: &str, got: &Decoder, wanted: &Decoder, family: &str) {
    let (logits, loss, gradients) = results(wanted, family, false);
    for checkpointing in [false, true] {
        let ours = results(got, family, checkpointing);
        assert!(distance(&ours.0, &logits) < TOLERANCE, "{name}: logits {}", distance(&ours.0, &logits));
        assert!((ours.1 - loss).abs() / loss < TOLERANCE, "{name}: loss {} {loss}", ours.1);
        assert_eq!(ours.2.keys().collect::<Vec<_>>(), gradients.keys().collect::<Vec<_>>());
        for (parameter, wanted) in &gradients {
            let far = distance(&ours.2[parameter], wanted);
            assert!(
                far < GRADIENT_TOLERANCE || wanted.abs().max().double_value(&[]) == 0.0,
                "{name} {parameter}: {far}"
            );
        }
    }
}

/// The same checkpoint with its numbers rounded to bfloat16, stored so.
fn halved(family: &str) -> tempfile::TempDir {
    let (from, to) = (fixtures().join(family), tempfile::tempdir().unwrap());
    std::fs::copy(from.join("config.json"), to.path().join("config.json")).unwrap();
    let file = Checkpoint::open(&from).unwrap();
    let tensors: Vec<(String, Tensor)> =
        file.names().map(|name| (name.to_string(), file.read(name).unwrap().to_kind(Kind::BFloat16))).collect();
    write_tensors(&to.path().join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    to
}

#[test]
fn stored_and_mapped_bases_compute_what_a_converted_one_does() {
    for family in FAMILIES {
        let half = halved(family);
        for dir in [fixtures().join(family), half.path().to_path_buf()] {
            let mut wanted = load_as(&dir, Storage::Converted);
            inject(&mut wanted);
            for storage in [Storage::Stored, Storage::Mapped] {
                let mut model = load_as(&dir, storage);
                inject(&mut model);
                agree(&format!("{family} {storage:?}"), &model, &wanted, family);
            }
        }
    }
}

#[test]
fn a_packed_base_computes_what_its_unpacked_weights_do() {
    let forms = [Packing::Nf4 { double: false }, Packing::Nf4 { double: true }, Packing::Int8];
    for family in FAMILIES {
        for packing in forms {
            let mut model = load_as(&fixtures().join(family), Storage::Mapped);
            inject(&mut model);
            model.pack(packing, &mut |_, _| {}).unwrap();
            let mut wanted = load(&fixtures().join(family));
            inject(&mut wanted);
            let mut packed = 0;
            for ((_, from), (path, to)) in model.modules_mut().into_iter().zip(wanted.modules_mut()) {
                if let (ModuleMut::Linear(from), ModuleMut::Linear(to)) = (from, to) {
                    packed += usize::from(from.weight.plain().is_none());
                    assert_eq!(
                        from.weight.plain().is_some(),
                        path.ends_with("lm_head")
                            || path.ends_with("embed_out")
                            || path.ends_with("gate") && family == "mixtral",
                        "{path}"
                    );
                    to.weight = from.weight.dense().unwrap().to_kind(Kind::Float).copy().into();
                }
            }
            assert!(packed > 0);
            agree(&format!("{family} {packing:?}"), &model, &wanted, family);
        }
    }
}

#[test]
fn bytes_are_predicted() {
    let dir = fixtures().join("llama");
    let config = ModelConfig::read(&dir).unwrap();
    for (storage, packing) in [
        (Storage::Converted, None),
        (Storage::Stored, None),
        (Storage::Mapped, None),
        (Storage::Mapped, Some(Packing::Nf4 { double: true })),
        (Storage::Mapped, Some(Packing::Int8)),
    ] {
        let mut model = load_as(&dir, storage);
        if let Some(packing) = packing {
            model.pack(packing, &mut |_, _| {}).unwrap();
        }
        let predicted = lora_model::base_bytes(&config, storage, packing, Kind::Float, Kind::Float, &BTreeMap::new());
        assert_eq!(model.base_bytes() as i64, predicted, "{storage:?} {packing:?}");
    }
}

#[test]
fn a_base_on_the_host_computes_the_bits_of_one_that_stays() {
    for family in FAMILIES {
        let mut wanted = load_as(&fixtures().join(family), Storage::Stored);
        inject(&mut wanted);
        let (logits, loss, gradients) = results(&wanted, family, true);
        for offload in [false, true] {
            let mut model = load_as(&fixtures().join(family), Storage::Host);
            inject(&mut model);
            model.keep_on_host().unwrap();
            model.offload = offload;
            // Once more, from where the first way ended.
            for way in 0..2 {
                let ours = results(&model, family, true);
                assert!(ours.0.equal(&logits) && ours.1 == loss, "{family}, way {way}");
                assert!(gradients.iter().all(|(name, wanted)| ours.2[name].equal(wanted)), "{family}, way {way}");
            }
            let file = TensorFile::open(&fixtures().join(family).join("reference.safetensors")).unwrap();
            let (batch, _) = unpadded(&model, &file);
            let refused = model.loss_and_backward(&batch, 1, 1.0, false).unwrap_err().to_string();
            assert!(refused.contains("gradient_checkpointing") && refused.contains("host"), "{refused}");
        }
    }
}

#[test]
fn a_base_on_the_host_takes_two_blocks_of_the_device() {
    let config = ModelConfig::read(&fixtures().join("llama")).unwrap();
    let of = |storage| lora_model::base_bytes(&config, storage, None, Kind::Float, Kind::Float, &BTreeMap::new());
    // 2 layers, hidden 32, 4 heads and 2 kv heads of 8, intermediate 80.
    let block = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 80 * 32);
    assert_eq!(of(Storage::Host), of(Storage::Converted) - config.windows.len() as i64 * block + 2 * block);
}
