//! NF4 and int8 against bitsandbytes: the same codes from the same weights, the same numbers from the same codes.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_format::{Checkpoint, nf4_tensors, read_packed, write_tensors};
use lora_torch::{Int8, Nf4, Scales, Weight, dynamic_table};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// bitsandbytes finds the nearest entry of the scales' table on the CPU by a coarse search that can miss by one entry, of a
/// width of at most 1/64 of the largest deviation; so its scales and ours may differ by that, and their numbers with them.
const SCALE_TOLERANCE: f64 = 1.0 / 64.0;

/// A checkpoint folder over the file that `tests/reference/make_bnb.py` made.
fn reference() -> (tempfile::TempDir, Checkpoint) {
    let file: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/bnb/reference.safetensors");
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(file, dir.path().join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

fn read_nf4(checkpoint: &Checkpoint, name: &str) -> lora_format::Result<Nf4> {
    match read_packed(checkpoint, name)? {
        Weight::Nf4(weight) => Ok(weight),
        other => panic!("{name} is {other:?}"),
    }
}

#[test]
fn the_numbers_of_bitsandbytes_come_out_bit_for_bit() {
    let (_dir, checkpoint) = reference();
    for name in ["whole.plain", "whole.double", "ragged.plain", "ragged.double"] {
        let packed = read_nf4(&checkpoint, &format!("{name}.weight")).unwrap();
        let wanted = checkpoint.read(&format!("{name}.dense")).unwrap();
        assert!(Weight::Nf4(packed).dense().unwrap().equal(&wanted), "{name}");
    }
    let part = |name: &str| checkpoint.read(&format!("int8.{name}")).unwrap();
    let int8 = Int8 { codes: part("codes"), scales: part("scale") };
    assert!(Weight::Int8(int8).dense().unwrap().equal(&part("dense")));
    assert!(dynamic_table().unwrap().equal(&checkpoint.read("table").unwrap()));
}

#[test]
fn packing_gives_the_codes_of_bitsandbytes() {
    let (_dir, checkpoint) = reference();
    for name in ["whole", "ragged"] {
        let source = checkpoint.read(&format!("{name}.source")).unwrap();
        for (form, double) in [("plain", false), ("double", true)] {
            let ours = Nf4::pack(&source, double).unwrap();
            let theirs = read_nf4(&checkpoint, &format!("{name}.{form}.weight")).unwrap();
            assert!(ours.codes.equal(&theirs.codes), "{name} {form}");
            match (&ours.scales, &theirs.scales) {
                (Scales::Plain(ours), Scales::Plain(theirs)) => assert!(ours.equal(theirs)),
                (Scales::Nested { absmax: a, offset: o, .. }, Scales::Nested { absmax: b, offset: p, .. }) => {
                    assert!(a.equal(b), "{name}: scales of scales");
                    assert_eq!(*o as f32, *p as f32, "{name}: offset");
                }
                _ => panic!("{name} {form}: scales of another form"),
            }
            let (ours, theirs) = (Weight::Nf4(ours).dense().unwrap(), Weight::Nf4(theirs).dense().unwrap());
            let far = (&ours - &theirs).abs().max().double_value(&[]) / theirs.abs().max().double_value(&[]);
            assert!(far <= if double { SCALE_TOLERANCE } else { 0.0 }, "{name} {form}: {far}");
        }
    }
    let ours = Int8::pack(&checkpoint.read("whole.source").unwrap()).unwrap();
    assert!(ours.codes.equal(&checkpoint.read("int8.codes").unwrap()));
}

#[test]
fn a_packed_weight_comes_back_from_its_file_bit_for_bit() {
    let (_dir, checkpoint) = reference();
    let source = checkpoint.read("ragged.source").unwrap();
    for double in [false, true] {
        let packed = Nf4::pack(&source, double).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let tensors = nf4_tensors("layer.weight", &packed).unwrap();
        write_tensors(&dir.path().join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
        let back = read_nf4(&Checkpoint::open(dir.path()).unwrap(), "layer.weight").unwrap();
        assert_eq!(back.shape(), packed.shape());
        assert!(Weight::Nf4(back).dense().unwrap().equal(&Weight::Nf4(packed).dense().unwrap()));
    }
}

#[test]
fn damaged_forms_are_named() {
    let (_dir, checkpoint) = reference();
    let read = |name: &str| checkpoint.read(name).unwrap();
    let parts = ["", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"];
    let all = || parts.map(|part| (format!("w.weight{part}"), read(&format!("whole.plain.weight{part}"))));
    type Tensors = Vec<(String, Tensor)>;
    let fault = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = Vec::from(all());
        change(&mut tensors);
        let dir = tempfile::tempdir().unwrap();
        write_tensors(&dir.path().join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
        read_nf4(&Checkpoint::open(dir.path()).unwrap(), "w.weight").unwrap_err().to_string()
    };
    let told = fault(&|t| t.retain(|(n, _)| !n.ends_with("absmax")));
    assert!(told.contains("absmax") && told.contains("missing"), "{told}");
    let told = fault(&|t| t[1].1 = t[1].1.narrow(0, 0, 5).copy());
    assert!(told.contains("96"), "{told}");
    let told = fault(&|t| t[2].1 = &t[2].1 * 2.0);
    assert!(told.contains("NormalFloat"), "{told}");
    let told = fault(&|t| t[3].1 = Tensor::from_slice(b"{\"quant_type\": \"nf4\", \"shape\": [3]}"));
    assert!(told.contains("matrix"), "{told}");
    let told = fault(&|t| t[3].1 = t[3].1.to_kind(Kind::Float));
    assert!(told.contains("bytes"), "{told}");
}
