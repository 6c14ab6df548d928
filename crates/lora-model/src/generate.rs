//! Generation with a cache of keys and values.

use crate::cache::KvCache;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::sampler::Sampling;
use tch::{Kind, no_grad};

/// When to stop.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// At most so many tokens after the prompt.
    pub max_new_tokens: usize,
    /// Any of these ends the text; it is part of the result.
    pub stop_ids: Vec<i64>,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

impl Decoder {
    /// Continues a prompt; where positions are learned, up to the last of them. `on_token` sees each new token as it comes; when
    /// it returns false, generation stops.
    ///
    /// # Errors
    /// [`Error::Input`] for an empty prompt, an id outside the vocabulary, or sampling out of range.
    pub fn generate(
        &self,
        prompt: &[i64],
        options: &GenerateOptions,
        mut on_token: impl FnMut(i64) -> bool,
    ) -> Result<Vec<i64>> {
        let mut texts = self.continued(prompt, options, &[options.sampling.seed], &mut on_token)?;
        Ok(texts.pop().unwrap_or_default())
    }

    /// Continues a prompt in several ways at once, each with draws from a seed of its own: the prompt is read once, and every
    /// further pass goes through the weights for all texts together. What becomes of one text does not depend on the others
    /// but for the rounding of products over more rows.
    ///
    /// # Errors
    /// As [`Decoder::generate`].
    pub fn generate_group(&self, prompt: &[i64], options: &GenerateOptions, seeds: &[u64]) -> Result<Vec<Vec<i64>>> {
        self.continued(prompt, options, seeds, &mut |_| true)
    }

    fn continued(
        &self,
        prompt: &[i64],
        options: &GenerateOptions,
        seeds: &[u64],
        on_token: &mut dyn FnMut(i64) -> bool,
    ) -> Result<Vec<Vec<i64>>> {
        let most = self.room_after(prompt, options)?;
        let count = seeds.len() as i64;
        let mut texts = vec![Vec::new(); seeds.len()];
        if most == 0 || texts.is_empty() {
            return Ok(texts);
        }
        // The places of the texts that go on, in the order of the cache.
        let mut going: Vec<usize> = (0..seeds.len()).collect();
        no_grad(|| -> Result<()> {
            let mut cache = KvCache::new(&self.config, (prompt.len() + most) as i64, self.kind(), self.device())?;
            let mut logits = self.next_logits(prompt, &mut cache)?.f_expand([count, -1], false)?;
            if count > 1 {
                cache = cache.repeated(count)?;
            }
            for position in 0..most {
                let vocab = logits.size()[1] as usize;
                let numbers = Vec::<f32>::try_from(&logits.f_to_kind(Kind::Float)?.f_reshape([-1])?)?;
                let (mut input, mut rows, mut still) = (Vec::new(), Vec::new(), Vec::new());
                for (row, (&text, logits)) in going.iter().zip(numbers.chunks_exact(vocab)).enumerate() {
                    let sampling = Sampling { seed: seeds[text], ..options.sampling };
                    let id = sampling.choose(logits, position as u64) as i64;
                    texts[text].push(id);
                    if on_token(id) && !options.stop_ids.contains(&id) {
                        input.push(id);
                        rows.push(row as i64);
                        still.push(text);
                    }
                }
                if still.is_empty() || position + 1 == most {
                    break;
                }
                if still.len() < going.len() {
                    cache.keep(&rows)?;
                }
                going = still;
                logits = self.next_logits(&input, &mut cache)?;
            }
            Ok(())
        })?;
        Ok(texts)
    }

    /// How many tokens may follow a prompt: as many as are wanted, and where positions are learned no more than there are; the
    /// last new token takes none.
    fn room_after(&self, prompt: &[i64], options: &GenerateOptions) -> Result<usize> {
        options.sampling.check()?;
        if prompt.is_empty() {
            return Err(Error::Input { what: "prompt", expected: "at least one token".into(), got: "none".into() });
        }
        if let Some(id) = prompt.iter().find(|id| !(0..self.config.vocab_size).contains(id)) {
            let expected = format!("in the model's vocabulary [0, {})", self.config.vocab_size);
            return Err(Error::Input { what: "token id", expected, got: id.to_string() });
        }
        let room = match self.config.layout.embed_positions {
            Some(_) => usize::try_from(self.config.max_position_embeddings).unwrap_or(usize::MAX),
            None => usize::MAX,
        };
        Ok(options.max_new_tokens.min((room.saturating_sub(prompt.len())).saturating_add(1)))
    }
}
