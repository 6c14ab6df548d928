//! A model and its tokenizer that write text, piece by piece.

use crate::failure::usage;
use crate::out;
use anyhow::Result;
use lora_data::{StreamDecoder, Tokenizer};
use lora_model::{Decoder, GenerateOptions, Sampling};
use lora_train::stop_ids;
use serde::Serialize;
use std::time::Instant;

/// How tokens are chosen.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct SamplingArgs {
    /// 0 takes the most likely token each time; higher is more varied
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    pub(crate) temperature: f64,
    /// Draw from the most likely tokens that together hold this share
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub(crate) top_p: f64,
    /// Where the draws come from: the same seed gives the same text
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) seed: u64,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
}

/// A text that was written.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Generated {
    /// The text, without end token and stop text.
    pub(crate) text: String,
    /// The tokens, end token included.
    pub(crate) token_ids: Vec<i64>,
    /// Tokens of the prompt.
    pub(crate) prompt_tokens: usize,
    /// `stop` at an end token or stop text, `length` at the limit.
    pub(crate) finish_reason: &'static str,
    /// Seconds it took.
    pub(crate) seconds: f64,
    /// New tokens a second.
    pub(crate) tokens_per_second: f64,
}

/// A model with its tokenizer.
#[derive(Debug)]
pub(crate) struct Generator<'a> {
    model: &'a Decoder,
    tokenizer: &'a Tokenizer,
    stop_ids: Vec<i64>,
}

impl<'a> Generator<'a> {
    /// Says once when a text may grow beyond the positions that the model has or was made for.
    pub(crate) fn warn_of_length(&self, longest_prompt: usize, max_new_tokens: usize) {
        let (long, positions) =
            ((longest_prompt + max_new_tokens) as i64 - 1, self.model.config.max_position_embeddings);
        if long <= positions {
            return;
        }
        let then = match self.model.config.layout.embed_positions {
            Some(_) => "a text ends there",
            None => "what comes later may be poor",
        };
        out::note(format!("note: texts of up to {long} tokens, and the model was made for {positions}; {then}"));
    }

    /// Ends are the end tokens of the model's config and of the tokenizer.
    pub(crate) fn new(model: &'a Decoder, tokenizer: &'a Tokenizer) -> Self {
        let stop_ids = stop_ids(model, tokenizer);
        Self { model, tokenizer, stop_ids }
    }

    /// Continues a prompt; `show` gets the text piece by piece and says whether to go on.
    ///
    /// # Errors
    /// What the model or the tokenizer reports.
    pub(crate) fn run(
        &self,
        prompt: &[i64],
        max_new_tokens: usize,
        sampling: &SamplingArgs,
        show: &mut dyn FnMut(&str) -> Result<bool>,
    ) -> Result<Generated> {
        let start = Instant::now();
        let options = GenerateOptions {
            max_new_tokens,
            stop_ids: self.stop_ids.clone(),
            sampling: Sampling { temperature: sampling.temperature, top_p: sampling.top_p, seed: sampling.seed },
        };
        let seen: Vec<u32> = prompt.iter().filter_map(|&id| u32::try_from(id).ok()).collect();
        let mut decoder = StreamDecoder::after(self.tokenizer, true, &seen);
        let mut text = Held::new(&sampling.stop);
        let (mut failed, mut ended) = (None, false);
        let token_ids = self.model.generate(prompt, &options, |id| {
            if self.stop_ids.contains(&id) {
                ended = true;
                return false;
            }
            let mut step = || -> Result<bool> {
                let id = u32::try_from(id).map_err(|_| usage(format!("token id {id} is none of the tokenizer's")))?;
                let Some(piece) = decoder.push(id)? else { return Ok(true) };
                let go_on = show(text.push(&piece))?;
                ended |= text.stopped;
                Ok(go_on && !text.stopped)
            };
            step().unwrap_or_else(|e| {
                failed = Some(e);
                false
            })
        })?;
        if let Some(e) = failed {
            return Err(e);
        }
        if let Some(rest) = decoder.finish()?.filter(|_| !text.stopped) {
            show(text.push(&rest))?;
            ended |= text.stopped;
        }
        show(text.release())?;
        let seconds = start.elapsed().as_secs_f64();
        Ok(Generated {
            tokens_per_second: token_ids.len() as f64 / seconds,
            token_ids,
            text: text.text,
            prompt_tokens: prompt.len(),
            finish_reason: if ended { "stop" } else { "length" },
            seconds,
        })
    }
}

/// Text of which the end is held back while it may be the beginning of a stop text.
struct Held<'a> {
    stops: &'a [String],
    text: String,
    shown: usize,
    stopped: bool,
}

impl<'a> Held<'a> {
    fn new(stops: &'a [String]) -> Self {
        Self { stops, text: String::new(), shown: 0, stopped: false }
    }

    /// Adds a piece and gives what can be shown.
    fn push(&mut self, piece: &str) -> &str {
        self.text.push_str(piece);
        let stops = || self.stops.iter().filter(|stop| !stop.is_empty());
        let found = stops().filter_map(|stop| Some(self.shown + self.text[self.shown..].find(stop.as_str())?)).min();
        if let Some(at) = found {
            self.text.truncate(at);
            self.stopped = true;
            return self.release();
        }
        let rest = &self.text[self.shown..];
        let held = stops()
            .flat_map(|stop| stop.char_indices().map(move |(i, c)| &stop[..i + c.len_utf8()]))
            .filter(|start| rest.ends_with(start))
            .map(str::len)
            .max()
            .unwrap_or(0);
        let from = std::mem::replace(&mut self.shown, self.text.len() - held);
        &self.text[from..self.shown]
    }

    /// Gives what was held back.
    fn release(&mut self) -> &str {
        let from = std::mem::replace(&mut self.shown, self.text.len());
        &self.text[from..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, bool) {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_string()).collect();
        let mut held = Held::new(&stops);
        let mut out: Vec<String> = Vec::new();
        for piece in pieces {
            out.push(held.push(piece).into());
            if held.stopped {
                break;
            }
        }
        out.push(held.release().into());
        (out, held.text.clone(), held.stopped)
    }

    #[test]
    fn a_stop_text_is_never_shown_and_its_beginning_is_held_back() {
        let (out, text, stopped) = shown(&["\nUser:"], &["Hello", "\n", "Us", "er", ": next"]);
        assert_eq!(out, ["Hello", "", "", "", "", ""]);
        assert!(stopped && text == "Hello");
        let (out, text, stopped) = shown(&["\nUser:"], &["Hello", "\nUs", "ual"]);
        assert_eq!(out, ["Hello", "", "\nUsual", ""]);
        assert!(!stopped && text == "Hello\nUsual");
        let (out, _, stopped) = shown(&["ab"], &["xa"]);
        assert_eq!(out, ["x", "a"]);
        assert!(!stopped);
        let (out, text, stopped) = shown(&[], &["grün", "e"]);
        assert_eq!((out.concat(), stopped), (text, false));
    }
}
