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
    /// Continues a prompt; where positions are learned, up to the last of them. `on_token` sees each new token as it comes; when it returns false, generation stops.
    ///
    /// # Errors
    /// [`Error::Input`] for an empty prompt, an id outside the vocabulary, or sampling out of range.
    pub fn generate(
        &self,
        prompt: &[i64],
        options: &GenerateOptions,
        mut on_token: impl FnMut(i64) -> bool,
    ) -> Result<Vec<i64>> {
        let most = self.room_after(prompt, options)?;
        let mut new = Vec::new();
        no_grad(|| -> Result<()> {
            let mut cache = self.cache_for(prompt, most)?;
            let mut input = prompt.to_vec();
            while new.len() < most {
                let logits = self.next_logits(&input, &mut cache)?;
                let logits = Vec::<f32>::try_from(&logits.f_to_kind(Kind::Float)?.f_squeeze_dim(0)?)?;
                let id = options.sampling.choose(&logits, new.len() as u64) as i64;
                new.push(id);
                if !on_token(id) || options.stop_ids.contains(&id) {
                    break;
                }
                input = vec![id];
            }
            Ok(())
        })?;
        Ok(new)
    }

    /// Continues a prompt in several ways at once, each with draws from a seed of its own: the prompt is read once, and every
    /// further pass goes through the weights for all texts together. What becomes of one text does not depend on the others
    /// but for the rounding of products over more rows.
    ///
    /// # Errors
    /// As [`Decoder::generate`].
    pub fn generate_group(&self, prompt: &[i64], options: &GenerateOptions, seeds: &[u64]) -> Result<Vec<Vec<i64>>> {
        let most = self.room_after(prompt, options)?;
        let mut texts = vec![Vec::new(); seeds.len()];
        // The places of the texts that go on, in the order of the cache.
        let mut going: Vec<usize> = (0..seeds.len()).collect();
        no_grad(|| -> Result<()> {
            let mut cache = self.cache_for(prompt, most)?;
            let mut logits = self.next_logits(prompt, &mut cache)?.f_repeat([seeds.len() as i64, 1])?;
            cache = cache.repeated(seeds.len() as i64)?;
            for position in 0..most {
                let numbers = Vec::<f32>::try_from(&logits.f_to_kind(Kind::Float)?.f_reshape([-1])?)?;
                let vocab = numbers.len() / going.len().max(1);
                let (mut input, mut rows, mut still) = (Vec::new(), Vec::new(), Vec::new());
                for (row, (&text, logits)) in going.iter().zip(numbers.chunks_exact(vocab.max(1))).enumerate() {
                    let sampling = Sampling { seed: seeds[text], ..options.sampling };
                    let id = sampling.choose(logits, position as u64) as i64;
                    texts[text].push(id);
                    if !options.stop_ids.contains(&id) {
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

    fn cache_for(&self, prompt: &[i64], more: usize) -> Result<KvCache> {
        KvCache::new(&self.config, (prompt.len() + more) as i64, self.kind(), self.device())
    }
}
