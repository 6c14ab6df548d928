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
        options.sampling.check()?;
        if prompt.is_empty() {
            return Err(Error::Input { what: "prompt", expected: "at least one token".into(), got: "none".into() });
        }
        if let Some(id) = prompt.iter().find(|id| !(0..self.config.vocab_size).contains(id)) {
            let expected = format!("in the model's vocabulary [0, {})", self.config.vocab_size);
            return Err(Error::Input { what: "token id", expected, got: id.to_string() });
        }
        // Learned positions end somewhere, and the text with them; the last new token takes none.
        let room = match self.config.layout.embed_positions {
            Some(_) => usize::try_from(self.config.max_position_embeddings).unwrap_or(usize::MAX),
            None => usize::MAX,
        };
        let max_new_tokens = options.max_new_tokens.min((room.saturating_sub(prompt.len())).saturating_add(1));
        let capacity = (prompt.len() + max_new_tokens) as i64;
        let mut new = Vec::new();
        no_grad(|| -> Result<()> {
            let mut cache = KvCache::new(&self.config, capacity, self.kind(), self.device())?;
            let mut input = prompt.to_vec();
            while new.len() < max_new_tokens {
                let logits = self.next_logits(&input, &mut cache)?;
                let logits = Vec::<f32>::try_from(&logits.f_to_kind(Kind::Float)?)?;
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
}
