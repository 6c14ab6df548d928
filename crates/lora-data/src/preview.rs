//! What will be trained, token by token.

use serde::Serialize;

use crate::error::Result;
use crate::example::Example;
use crate::stream_decoder::StreamDecoder;
use crate::tokenizer::Tokenizer;

/// One token as a reader sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PreviewToken {
    /// The token.
    pub id: u32,
    /// The text that is complete with it; nothing for a part of a character that later tokens complete.
    pub text: String,
    /// Whether it is a trained target.
    pub trained: bool,
    /// Whether it is a special token.
    pub special: bool,
}

/// The tokens of an example with their text; all texts together are the text of the example.
///
/// # Errors
/// When the tokenizer cannot decode.
pub fn preview(example: &Example, tokenizer: &Tokenizer) -> Result<Vec<PreviewToken>> {
    let mut decoder = StreamDecoder::new(tokenizer, false);
    let mut tokens = Vec::with_capacity(example.input_ids.len());
    for (&id, &trained) in example.input_ids.iter().zip(&example.trained) {
        let text = decoder.push(id)?.unwrap_or_default();
        tokens.push(PreviewToken { id, text, trained, special: tokenizer.is_special(id) });
    }
    if let (Some(last), Some(rest)) = (tokens.last_mut(), decoder.finish()?) {
        last.text.push_str(&rest);
    }
    Ok(tokens)
}
