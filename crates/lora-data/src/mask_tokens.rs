//! From a masked text to tokens and which of them are trained.

use std::ops::Range;

use crate::error::Result;
use crate::mask::MaskedText;
use crate::tokenizer::Tokenizer;

/// A row of tokens.
#[derive(Debug, Default)]
pub(crate) struct MaskedTokens {
    pub(crate) input_ids: Vec<u32>,
    pub(crate) trained: Vec<bool>,
    /// Edges of trained text that lie inside a token, which cannot be divided.
    pub(crate) merged_edges: usize,
}

type Encoded = (Vec<u32>, Vec<Range<usize>>);

/// Tokens of a masked text, and which of them are trained.
///
/// Where a token would reach over the edge of trained text, the text is tokenised apart there: what a prompt ends with
/// and what an answer begins with never become one token when the answer is generated, either.
pub(crate) fn tokenise(row: &MaskedText, tokenizer: &Tokenizer) -> Result<MaskedTokens> {
    let (mut ids, mut offsets) = tokenizer.encode_with_offsets(&row.text)?;
    let cuts = cuts(row, tokenizer, &ids, &offsets);
    let mut merged_edges = 0;
    if !cuts.is_empty() {
        match encode_apart(row, tokenizer, &ids, &cuts)? {
            Some(apart) => (ids, offsets) = apart,
            None => merged_edges = cuts.len(),
        }
    }
    let mut trained = vec![false; ids.len()];
    for span in &row.spans {
        let first =
            offsets.partition_point(|token| token.end < span.start || token.end == span.start && !token.is_empty());
        let mut inside: Vec<usize> = (first..ids.len())
            .take_while(|&t| offsets[t].start < span.end)
            // An added token may swallow white space after it; it is still not a part of the answer.
            .filter(|&t| offsets[t].start >= span.start || !tokenizer.is_added(ids[t]))
            .collect();
        // Line breaks after the end token are never generated.
        let blank = |t: &usize| row.text[offsets[*t].clone()].trim().is_empty();
        let last = inside.iter().rposition(|t| tokenizer.is_added(ids[*t]) || !blank(t));
        if let Some(last) = last.filter(|&last| tokenizer.is_added(ids[inside[last]])) {
            inside.truncate(last + 1);
        }
        for t in inside {
            trained[t] = true;
        }
    }
    Ok(MaskedTokens { input_ids: ids, trained, merged_edges })
}

/// The edges of spans that lie inside a token made of text.
fn cuts(row: &MaskedText, tokenizer: &Tokenizer, ids: &[u32], offsets: &[Range<usize>]) -> Vec<usize> {
    let inside = |edge: usize| {
        let at = offsets.partition_point(|token| token.end <= edge);
        offsets.get(at).is_some_and(|token| token.start < edge && !tokenizer.is_added(ids[at]))
    };
    let mut cuts: Vec<usize> =
        row.spans.iter().flat_map(|span| [span.start, span.end]).filter(|&e| inside(e)).collect();
    cuts.sort_unstable();
    cuts.dedup();
    cuts
}

/// The tokens of the pieces of a text; none when the tokenizer writes the pieces otherwise than the whole, as those do
/// that put a space before every text.
fn encode_apart(row: &MaskedText, tokenizer: &Tokenizer, whole: &[u32], cuts: &[usize]) -> Result<Option<Encoded>> {
    let (mut ids, mut offsets) = (Vec::new(), Vec::new());
    let mut from = 0;
    for &to in cuts.iter().chain([&row.text.len()]) {
        let (piece_ids, piece_offsets) = tokenizer.encode_with_offsets(&row.text[from..to])?;
        ids.extend(piece_ids);
        offsets.extend(piece_offsets.into_iter().map(|offset| offset.start + from..offset.end + from));
        from = to;
    }
    let same = tokenizer.decode(&ids, false)? == tokenizer.decode(whole, false)?;
    Ok(same.then_some((ids, offsets)))
}
