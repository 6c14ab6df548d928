//! What is written is read back, by us and by the `safetensors` crate; what one of the two accepts, so does the other.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use lora_format::{TensorFile, TensorWriter, write_tensors};
use proptest::prelude::*;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

const KINDS: [Kind; 10] = [
    Kind::Float,
    Kind::Double,
    Kind::BFloat16,
    Kind::Half,
    Kind::Int64,
    Kind::Int,
    Kind::Int16,
    Kind::Int8,
    Kind::Uint8,
    Kind::Bool,
];

fn tensor(kind: Kind, shape: &[i64], seed: i64) -> Tensor {
    let n: i64 = shape.iter().product();
    ((Tensor::arange(n, (Kind::Int64, Device::Cpu)) * 7 + seed).remainder(23) - 11).to_kind(kind).view(shape)
}

fn tensors() -> impl Strategy<Value = BTreeMap<String, (usize, Vec<i64>, i64)>> {
    let one = (0..KINDS.len(), prop::collection::vec(0i64..5, 0..4), 0i64..1000);
    prop::collection::btree_map("[a-zé\"\\\\./ ]{1,12}", one, 0..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn files_come_back_equal(specs in tensors(), metadata in prop::collection::btree_map("[a-z]{1,5}", ".{0,8}", 0..3)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let written: Vec<(String, Tensor)> =
            specs.iter().map(|(name, (k, shape, seed))| (name.clone(), tensor(KINDS[*k], shape, *seed))).collect();
        write_tensors(&path, &written, &metadata).unwrap();
        prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

        let file = TensorFile::open(&path).unwrap();
        prop_assert_eq!(file.metadata(), &metadata);
        prop_assert_eq!(file.names().count(), written.len());
        let bytes = std::fs::read(&path).unwrap();
        let other = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (name, t) in &written {
            let read = file.read(name).unwrap();
            prop_assert_eq!((read.kind(), read.size()), (t.kind(), t.size()));
            prop_assert!(read.equal(t));
            prop_assert_eq!(other.tensor(name).unwrap().data(), file.bytes(name).unwrap());
            // Aligned for readers that map without copying.
            let width = lora_torch::kind_bytes(t.kind());
            prop_assert_eq!(file.bytes(name).unwrap().as_ptr().align_offset(width), 0);
        }
    }

    #[test]
    fn a_damaged_header_is_judged_as_by_the_safetensors_crate(at in 0usize..400, byte in any::<u8>(), cut in 0usize..40) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let whole = [("a".to_string(), tensor(Kind::Float, &[2, 3], 1)), ("b".to_string(), tensor(Kind::Uint8, &[5], 2))];
        write_tensors(&path, &whole, &BTreeMap::new()).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at % bytes.len();
        bytes[at] = byte;
        bytes.truncate(bytes.len() - cut.saturating_sub(30));
        std::fs::write(&path, &bytes).unwrap();
        let ours = TensorFile::open(&path);
        match safetensors::SafeTensors::deserialize(&bytes) {
            Err(_) => prop_assert!(ours.is_err(), "accepted what the safetensors crate refuses"),
            // Names that differ by one byte may collide; the crate then keeps the last.
            Ok(theirs) => if let Ok(ours) = ours {
                prop_assert_eq!(ours.names().count(), theirs.len());
            } else {
                let text = ours.unwrap_err().to_string();
                prop_assert!(["twice", "begin with", "dtype"].iter().any(|t| text.contains(t)), "{}", text);
            },
        }
    }
}

#[test]
fn a_writer_keeps_the_announced_order_and_refuses_anything_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    let plan = vec![("z".to_string(), Kind::Uint8, vec![3]), ("a".to_string(), Kind::Float, vec![1, 2])];
    let none = BTreeMap::new();
    let z = tensor(Kind::Uint8, &[3], 0);
    let a = tensor(Kind::Float, &[1, 2], 0);

    let mut writer = TensorWriter::create(&path, &plan, &none).unwrap();
    assert!(writer.put("a", &a).unwrap_err().to_string().contains("tensor `a`: written where `z` was announced"));
    assert!(writer.put("z", &a).unwrap_err().to_string().contains("announced [3]"));
    assert!(writer.put("z", &z.to_kind(Kind::Int)).unwrap_err().to_string().contains("dtype int32"));
    assert!(writer.put_bytes("z", &[1, 2]).unwrap_err().to_string().contains("2 bytes"));
    writer.put_bytes("z", &[1, 2, 3]).unwrap();
    assert!(!path.exists());
    assert!(writer.finish().unwrap_err().to_string().contains("tensor `a`: missing"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "an unfinished file leaves nothing");

    let mut writer = TensorWriter::create(&path, &plan, &none).unwrap();
    writer.put("z", &z).unwrap();
    writer.put("a", &a).unwrap();
    assert!(writer.put("a", &a).unwrap_err().to_string().contains("the end"));
    writer.finish().unwrap();
    let file = TensorFile::open(&path).unwrap();
    assert_eq!((file.info("z").unwrap().bytes.clone(), file.info("a").unwrap().bytes.clone()), (0..3, 3..11));
    assert!(file.read("a").unwrap().equal(&a));

    let twice = vec![plan[0].clone(), plan[0].clone()];
    assert!(TensorWriter::create(&path, &twice, &none).unwrap_err().to_string().contains("taken"));
    assert!(file.read("z").unwrap().equal(&z), "the old file is untouched");
}

#[test]
fn a_strided_tensor_is_written_by_its_values() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    let t = tensor(Kind::Float, &[3, 4], 5).transpose(0, 1).narrow(0, 1, 2);
    write_tensors(&path, &[("t".to_string(), t.shallow_clone())], &BTreeMap::new()).unwrap();
    assert!(TensorFile::open(&path).unwrap().read("t").unwrap().equal(&t));
}

#[test]
fn rows_are_those_of_the_whole_and_no_others_exist() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    let t = tensor(Kind::BFloat16, &[5, 2, 3], 9);
    let scalar = tensor(Kind::Float, &[], 1);
    write_tensors(
        &path,
        &[("t".to_string(), t.shallow_clone()), ("s".to_string(), scalar.shallow_clone())],
        &BTreeMap::new(),
    )
    .unwrap();
    let file = TensorFile::open(&path).unwrap();
    for first in 0..=5 {
        for count in 0..=(5 - first) {
            assert!(file.read_rows("t", first, count).unwrap().equal(&t.narrow(0, first, count)));
        }
    }
    for (first, count) in [(0, 6), (5, 1), (-1, 2), (2, -1), (i64::MAX, i64::MAX)] {
        let text = file.read_rows("t", first, count).unwrap_err().to_string();
        assert!(text.contains("has shape [5, 2, 3]"), "{text}");
    }
    assert!(file.read_rows("s", 0, 1).unwrap().equal(&scalar.view([1])));
}
