//! The fixtures' checkpoints and batch.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test file uses a part; a helper that fails is a failed test

use lora_format::TensorFile;
use lora_model::{Decoder, TokenBatch};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

pub fn load(dir: &Path) -> Decoder {
    Decoder::load(dir, Kind::Float, Device::Cpu, &mut |_, _| {}).unwrap()
}

/// The largest difference, relative to the largest reference value.
pub fn distance(got: &Tensor, wanted: &Tensor) -> f64 {
    assert_eq!(got.size(), wanted.size());
    (got - wanted).abs().max().double_value(&[]) / wanted.abs().max().double_value(&[]).max(1e-30)
}

/// The rows of a padded batch end to end, and where each token stood in the flattened padded batch.
pub fn unpadded(model: &Decoder, file: &TensorFile) -> (TokenBatch, Tensor) {
    let read = |name: &str| Vec::<Vec<i64>>::try_from(&file.read(name).unwrap()).unwrap();
    let (ids, mask, labels) = (read("input_ids"), read("attention_mask"), read("labels"));
    let width = ids[0].len();
    let (mut flat, mut lens, mut rows, mut targets, mut places) = (vec![], vec![], vec![], vec![], vec![]);
    for (i, row) in ids.iter().enumerate() {
        let n = mask[i].iter().sum::<i64>() as usize;
        for t in 0..n {
            if t + 1 < n && labels[i][t + 1] != -100 {
                rows.push(flat.len() as i64);
                targets.push(labels[i][t + 1]);
            }
            places.push((i * width + t) as i64);
            flat.push(row[t]);
        }
        lens.push(n as i64);
    }
    let batch = TokenBatch::new(&model.config, &flat, &lens, &rows, &targets, Device::Cpu).unwrap();
    (batch, Tensor::from_slice(&places))
}
