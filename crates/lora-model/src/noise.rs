//! Noise on embeddings while a model is trained.

use crate::decoder::{Decoder, Mode};
use crate::error::Result;
use lora_torch::{Segments, manual_seed, mix_seed};
use tch::{Kind, Tensor};

/// Keeps the noise's draws apart from those of dropout, which are keyed by the number of a block.
const KEY: u64 = u64::MAX;

impl Decoder {
    /// NEFTune (Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", 2023, equation 1): uniform in [-1, 1],
    /// times `alpha / sqrt(L d)`, where L is the number of tokens of the example and d the hidden size. It follows from the seed
    /// of the batch; there is none in an evaluation, and none where `neftune_noise_alpha` is 0.
    ///
    /// # Shapes
    /// `[tokens, hidden]`
    pub(crate) fn embedding_noise(&self, segments: &Segments, mode: Mode) -> Result<Option<Tensor>> {
        let (Mode::Train { seed }, alpha) = (mode, self.neftune_noise_alpha) else { return Ok(None) };
        if alpha == 0.0 {
            return Ok(None);
        }
        let (device, d) = (self.device(), self.config.hidden_size);
        let magnitude = |&tokens: &i64| alpha / ((tokens * d) as f64).sqrt();
        let of_each = segments.lens().iter().flat_map(|n| std::iter::repeat_n(magnitude(n) as f32, *n as usize));
        let of_each = Tensor::f_from_slice(&of_each.collect::<Vec<f32>>())?.f_to_device(device)?.f_unsqueeze(1)?;
        let mut noise = Tensor::f_empty([segments.total(), d], (Kind::Float, device))?;
        {
            let _drawing = manual_seed(mix_seed(&[seed, KEY]));
            noise = noise.f_uniform_(-1.0, 1.0)?;
        }
        Ok(Some(noise.f_mul(&of_each)?.f_to_kind(self.kind())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use tch::Device;

    fn model(family: &str, alpha: f64) -> Decoder {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(family);
        let mut model = Decoder::load(&dir, Kind::Float, Device::Cpu, &mut |_, _| {}).unwrap();
        model.neftune_noise_alpha = alpha;
        model
    }

    fn noise(model: &Decoder, lens: &[i64], seed: u64) -> Tensor {
        model.embedding_noise(&Segments::new(lens).unwrap(), Mode::Train { seed }).unwrap().unwrap()
    }

    #[test]
    fn noise_is_uniform_within_the_bound_of_each_example() {
        let model = model("llama", 5.0);
        let lens = [3, 200, 50];
        let all = noise(&model, &lens, 7);
        assert_eq!(all.size(), [253, 32]);
        let mut start = 0;
        for n in lens {
            let part = all.narrow(0, start, n).to_kind(Kind::Double);
            start += n;
            let bound = 5.0 / ((n * 32) as f64).sqrt();
            let most = part.abs().max().double_value(&[]);
            // The largest of at least 96 draws lies in the upper tenth but once in 25,000 seeds; this is one seed.
            assert!(most <= bound * (1.0 + f64::from(f32::EPSILON)) && most > 0.9 * bound, "{n}: {most} of {bound}");
            // The square of a uniform number has the mean 1/3 and the deviation sqrt(4/45).
            let square = (&part * &part).mean(Kind::Double).double_value(&[]) / (bound * bound);
            let four_deviations = 4.0 * (4.0f64 / 45.0).sqrt() / ((n * 32) as f64).sqrt();
            assert!((square - 1.0 / 3.0).abs() < four_deviations, "{n}: {square}");
        }
        assert!(all.equal(&noise(&model, &lens, 7)), "it follows from the seed");
        assert!(!all.equal(&noise(&model, &lens, 8)));
    }

    #[test]
    fn there_is_none_in_an_evaluation_or_where_it_is_not_asked_for() {
        let lens = Segments::new(&[3]).unwrap();
        assert!(model("llama", 5.0).embedding_noise(&lens, Mode::Eval).unwrap().is_none());
        assert!(model("llama", 0.0).embedding_noise(&lens, Mode::Train { seed: 1 }).unwrap().is_none());
    }

    /// The gradients of a step, and its loss.
    fn step(model: &mut Decoder, checkpointing: bool) -> (f64, Vec<Tensor>) {
        let ids: Vec<i64> = (0..12).map(|i| 5 + i * 7 % 40).collect();
        let rows = [0, 1, 2, 5, 6, 7, 8];
        let targets = rows.map(|row| ids[row as usize + 1]);
        let batch = crate::TokenBatch::new(&model.config, &ids, &[4, 8], &rows, &targets, Device::Cpu).unwrap();
        let parameters = model.parameters();
        parameters.iter().for_each(|p| p.tensor.shallow_clone().zero_grad());
        let loss = model.loss_and_backward(&batch, 3, 1.0, checkpointing).unwrap().double_value(&[]);
        (loss, parameters.into_iter().map(|p| p.tensor.grad().copy()).collect())
    }

    #[test]
    fn recomputation_sees_the_same_noise_and_evaluations_see_none() {
        // With positions that are learned, a scale on the table, and an adapter of the table itself.
        for (family, everything) in [("llama", false), ("gpt2", false), ("gemma2", false), ("llama", true)] {
            let (mut noisy, mut plain) = (model(family, 5.0), model(family, 0.0));
            for model in [&mut noisy, &mut plain] {
                match everything {
                    true => model.train_everything().unwrap(),
                    false => {
                        let plan = crate::plan_injection(&model.config, &crate::all_linear(2, 4.0)).unwrap();
                        model.inject(&plan, 7).unwrap();
                    }
                }
                model.lora_dropout = 0.1;
            }
            let (kept, again) = (step(&mut noisy, false), step(&mut noisy, true));
            assert_eq!(kept.0, again.0, "{family}");
            assert!(kept.1.iter().zip(&again.1).all(|(a, b)| a.equal(b)), "{family}: gradients");
            assert_ne!(kept.0, step(&mut plain, false).0, "{family}: noise is seen");
            let batch = crate::TokenBatch::new(&noisy.config, &[5, 6, 7], &[3], &[0, 1], &[6, 7], Device::Cpu).unwrap();
            assert_eq!(noisy.evaluate(&batch).unwrap(), plain.evaluate(&batch).unwrap(), "{family}");
        }
    }
}
