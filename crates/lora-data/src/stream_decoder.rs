//! Text of tokens as they come, never with half a character.

use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// Stands where bytes do not make a whole character (yet).
const REPLACEMENT: char = '\u{FFFD}';

/// Decodes a growing row of tokens piece by piece; all pieces together are the text of the whole row.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    skip_special_tokens: bool,
    ids: Vec<u32>,
    /// Tokens before this one are forgotten.
    context: usize,
    /// Tokens before this one have been given out.
    read: usize,
}

impl<'a> StreamDecoder<'a> {
    /// A decoder that has seen no token.
    pub fn new(tokenizer: &'a Tokenizer, skip_special_tokens: bool) -> Self {
        Self { tokenizer, skip_special_tokens, ids: Vec::new(), context: 0, read: 0 }
    }

    /// A decoder for what follows a prompt: its text joins the prompt's without a lost or doubled space.
    pub fn after(tokenizer: &'a Tokenizer, skip_special_tokens: bool, prompt: &[u32]) -> Self {
        const CONTEXT: usize = 8;
        let ids = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        Self { tokenizer, skip_special_tokens, context: 0, read: ids.len(), ids }
    }

    /// Takes one more token and gives the text that is complete with it, if any.
    ///
    /// # Errors
    /// When the tokenizer cannot decode.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        let text = self.pending()?;
        if text.is_empty() || text.ends_with(REPLACEMENT) {
            return Ok(None);
        }
        // The last piece stays as context: some decoders treat the first token of a row differently.
        self.context = self.read;
        self.read = self.ids.len();
        Ok(Some(text))
    }

    /// The text that is still held back: an incomplete character at the end.
    ///
    /// # Errors
    /// When the tokenizer cannot decode.
    pub fn finish(self) -> Result<Option<String>> {
        self.pending().map(|text| Some(text).filter(|text| !text.is_empty()))
    }

    /// The text of the tokens that have not been given out.
    fn pending(&self) -> Result<String> {
        let decode = |ids: &[u32]| self.tokenizer.decode(ids, self.skip_special_tokens);
        let known = decode(&self.ids[self.context..self.read])?;
        let whole = decode(&self.ids[self.context..])?;
        Ok(whole.strip_prefix(known.as_str()).unwrap_or(&whole).to_owned())
    }
}
