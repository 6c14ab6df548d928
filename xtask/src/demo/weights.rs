//! The trained weights in half the bytes.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// A float32 safetensors file as bfloat16.
pub fn to_bfloat16(file: &[u8]) -> Result<Vec<u8>> {
    let mut converted = Vec::new();
    for (name, tensor) in SafeTensors::deserialize(file)?.tensors() {
        ensure!(tensor.dtype() == Dtype::F32, "{name} is {:?}, not float32", tensor.dtype());
        let (values, _) = tensor.data().as_chunks::<4>();
        let values: Vec<f32> = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        ensure!(values.iter().all(|x| x.is_finite()), "{name} holds a value that is not finite");
        let bytes: Vec<u8> = values.into_iter().flat_map(|x| bfloat16(x).to_le_bytes()).collect();
        converted.push((name, tensor.shape().to_vec(), bytes));
    }
    let views = converted
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::BF16, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    Ok(safetensors::serialize(views, Some(metadata))?)
}

/// The nearest bfloat16 of a finite number; of two, the even one.
fn bfloat16(x: f32) -> u16 {
    let bits = x.to_bits();
    let half = 0x7fff + ((bits >> 16) & 1);
    ((bits + half) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_to_the_nearest() {
        for (x, bits) in [(1.0, 0x3f80), (-2.0, 0xc000), (1.003_906_2, 0x3f80), (1.011_718_8, 0x3f82), (0.1, 0x3dcd)] {
            assert_eq!(bfloat16(x), bits, "{x}");
        }
    }

    #[test]
    fn a_file_keeps_its_names_and_shapes() {
        let bytes: Vec<u8> = [1.0f32, -2.0, 0.5, 0.25].iter().flat_map(|x| x.to_le_bytes()).collect();
        let write = |kind, shape: Vec<usize>, data| {
            safetensors::serialize([("a", TensorView::new(kind, shape, data).unwrap())], None).unwrap()
        };
        let converted = to_bfloat16(&write(Dtype::F32, vec![2, 2], &bytes)).unwrap();
        let read = SafeTensors::deserialize(&converted).unwrap();
        let tensor = read.tensor("a").unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::BF16, &[2, 2][..]));
        assert_eq!(tensor.data(), [0x80, 0x3f, 0x00, 0xc0, 0x00, 0x3f, 0x80, 0x3e]);
        assert!(to_bfloat16(&write(Dtype::F16, vec![2, 4], &bytes)).is_err());
    }
}
