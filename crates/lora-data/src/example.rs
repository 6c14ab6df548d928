//! From a document to rows of tokens with a loss mask.

use std::borrow::Cow;

use crate::document::{Body, Conversation, Document, Instruction, Message, Origin};
use crate::error::{DataError, Result};
use crate::format::Format;
use crate::mask::{Choice, Renderer};
use crate::mask_tokens::tokenise;
use crate::report::DropReason;
use crate::tokenizer::Tokenizer;
use crate::truncation::{Row, Truncation, cut, pieces, removable_turns, without_turns};

/// A row of tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// The tokens.
    pub input_ids: Vec<u32>,
    /// Of the same length: whether the token is a trained target. The first never is, as nothing predicts it.
    pub trained: Vec<bool>,
    /// The record it comes from.
    pub origin: Origin,
}

/// What became of one document.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) examples: Vec<Example>,
    pub(crate) dropped: Vec<DropReason>,
    /// Rows that were cut or split.
    pub(crate) truncated: usize,
    /// Tokens that were cut off, and how many of them were trained.
    pub(crate) cut: (usize, usize),
    /// Tokens of rows that were left out because they are too long or have nothing to train, and how many were trained.
    pub(crate) left_out: (usize, usize),
    /// Turns that were left out.
    pub(crate) cut_turns: usize,
    /// Rows that come of splitting rows, less the rows that were split.
    pub(crate) split_rows: usize,
    /// Each trained turn has a row of its own.
    pub(crate) row_per_turn: bool,
    /// The text of an instruction was laid out without a chat template.
    pub(crate) classic: bool,
    /// Edges of trained text inside a token.
    pub(crate) merged_edges: usize,
}

/// The rows of a document, or why it has none.
type Rows = std::result::Result<Vec<Row>, DropReason>;

/// Turns documents into rows of tokens.
pub(crate) struct ExampleBuilder<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    /// Renders conversations without and with tools.
    pub(crate) renderers: Option<(Renderer<'a>, Renderer<'a>)>,
    pub(crate) choice: Choice<'a>,
    pub(crate) max_length: usize,
    pub(crate) truncation: Truncation,
}

impl ExampleBuilder<'_> {
    pub(crate) fn build(&self, document: &Document) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        match self.rows(document, &mut outcome)? {
            Ok(rows) => {
                outcome.row_per_turn = rows.len() > 1;
                match self.with_fewer_turns(document, &rows, &mut outcome)? {
                    Some(shorter) => {
                        outcome.truncated += shorter.len();
                        for row in shorter {
                            self.keep(row, &document.origin, &mut outcome);
                        }
                    }
                    None => rows.into_iter().try_for_each(|row| self.fit(row, document, &mut outcome))?,
                }
            }
            Err(reason) => outcome.dropped.push(reason),
        }
        Ok(outcome)
    }

    /// The rows of a document that is too long, with as few turns left out as is enough. None when nothing is to be left
    /// out, or when the last turn alone is too long.
    fn with_fewer_turns(&self, document: &Document, rows: &[Row], outcome: &mut Outcome) -> Result<Option<Vec<Row>>> {
        let fits = |rows: &[Row]| rows.iter().all(|(ids, _)| ids.len() <= self.max_length);
        let (true, Some(side)) = (self.truncation.is_by_turn() && !fits(rows), self.truncation.side()) else {
            return Ok(None);
        };
        let Some(removable) = removable_turns(document) else { return Ok(None) };
        // The fewest turns for which the rest fits, by halving.
        let (mut low, mut high) = (1, removable);
        let mut best = None;
        while low <= high {
            let count = (low + high) / 2;
            match self.rows(&without_turns(document, side, count), &mut Outcome::default())? {
                Ok(shorter) if fits(&shorter) => {
                    best = Some((count, shorter));
                    high = count - 1;
                }
                // A rest without an answer does not count; fewer turns may still hold one, and leaving out more cannot.
                Err(_) => high = count - 1,
                Ok(_) => low = count + 1,
            }
        }
        let Some((count, shorter)) = best else { return Ok(None) };
        let sum = |rows: &[Row]| rows.iter().map(size).fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
        let (before, after) = (sum(rows), sum(&shorter));
        outcome.cut.0 += before.0.saturating_sub(after.0);
        outcome.cut.1 += before.1.saturating_sub(after.1);
        outcome.cut_turns += count;
        Ok(Some(shorter))
    }

    /// Applies the length limit to one row.
    fn fit(&self, mut row: Row, document: &Document, outcome: &mut Outcome) -> Result<()> {
        if let Some(first) = row.1.first_mut() {
            *first = false;
        }
        let origin = &document.origin;
        let (tokens, max_length) = (row.0.len(), self.max_length);
        if tokens <= max_length {
            self.keep(row, origin, outcome);
            return Ok(());
        }
        // Where turns can be left out and it was not enough, one turn alone is too long.
        let is_one_turn =
            self.truncation.is_by_turn() && matches!(document.body, Body::Conversation(_) | Body::Instruction(_));
        match (self.truncation, self.truncation.side()) {
            (Truncation::Refuse, _) => return Err(DataError::TooLong { origin: origin.clone(), tokens, max_length }),
            (Truncation::Split, _) => {
                let trained = size(&row).1;
                let pieces: Vec<Row> =
                    pieces(&row, max_length).into_iter().filter(|piece| piece.1.contains(&true)).collect();
                if !pieces.is_empty() {
                    outcome.truncated += 1;
                    outcome.split_rows += pieces.len() - 1;
                    let kept = pieces.iter().map(size).fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
                    // Pieces overlap by a token each.
                    outcome.cut.0 += (tokens + pieces.len() - 1).saturating_sub(kept.0);
                    outcome.cut.1 += trained.saturating_sub(kept.1);
                    pieces.into_iter().for_each(|piece| self.keep(piece, origin, outcome));
                    return Ok(());
                }
                self.leave_out(&row, DropReason::NoTrainedToken, outcome);
            }
            (_, Some(side)) if !is_one_turn => {
                let before = size(&row);
                let row = cut(row, side, max_length);
                let after = size(&row);
                if after.1 > 0 {
                    outcome.truncated += 1;
                    outcome.cut.0 += before.0 - after.0;
                    outcome.cut.1 += before.1 - after.1;
                    self.keep(row, origin, outcome);
                } else {
                    outcome.left_out.0 += before.0;
                    outcome.left_out.1 += before.1;
                    outcome.dropped.push(DropReason::NoTrainedToken);
                }
            }
            _ => self.leave_out(&row, DropReason::TooLong, outcome),
        }
        Ok(())
    }

    fn leave_out(&self, row: &Row, reason: DropReason, outcome: &mut Outcome) {
        let (tokens, trained) = size(row);
        outcome.left_out.0 += tokens;
        outcome.left_out.1 += trained;
        outcome.dropped.push(reason);
    }

    /// Keeps a row that fits, if anything of it is trained.
    fn keep(&self, row: Row, origin: &Origin, outcome: &mut Outcome) {
        let (input_ids, mut trained) = row;
        if let Some(first) = trained.first_mut() {
            *first = false;
        }
        if trained.contains(&true) {
            outcome.examples.push(Example { input_ids, trained, origin: origin.clone() });
        } else {
            self.leave_out(&(input_ids, trained), DropReason::NoTrainedToken, outcome);
        }
    }

    fn rows(&self, document: &Document, outcome: &mut Outcome) -> Result<Rows> {
        let origin = &document.origin;
        match &document.body {
            Body::Instruction(instruction) if instruction.output.is_empty() => Ok(Err(DropReason::Empty)),
            Body::Instruction(instruction) => match &self.renderers {
                Some(_) => self.conversation(&conversation_of(instruction), Format::Alpaca, origin, outcome),
                None => {
                    outcome.classic = true;
                    self.segments(&classic_segments(instruction), origin).map(|row| Ok(vec![row]))
                }
            },
            Body::Conversation(conversation) => self.conversation(conversation, Format::Messages, origin, outcome),
            Body::PromptCompletion { completion, .. } if completion.is_empty() => Ok(Err(DropReason::Empty)),
            Body::PromptCompletion { prompt, completion } => {
                let segments = [(prompt.as_str().into(), false), (completion.as_str().into(), true)];
                self.segments(&segments, origin).map(|row| Ok(vec![row]))
            }
            Body::Preference { .. } => {
                Err(DataError::PreferenceData { origin: origin.clone(), format: Format::Preference })
            }
            Body::Rated { .. } => Err(DataError::PreferenceData { origin: origin.clone(), format: Format::Kto }),
            Body::Text(text) if text.is_empty() => Ok(Err(DropReason::Empty)),
            Body::Text(text) => {
                let mut ids = self.tokenizer.encode_prompt(text).map_err(|error| error.at(origin))?;
                ids.push(self.eos()?);
                let trained = vec![true; ids.len()];
                Ok(Ok(vec![(ids, trained)]))
            }
            Body::Labelled { .. } => Err(DataError::Labelled { origin: origin.clone() }),
            Body::Tokenized { input_ids, labels } => {
                self.tokenized(input_ids, labels.as_deref(), origin).map(|row| Ok(vec![row]))
            }
        }
    }

    fn conversation(
        &self,
        conversation: &Conversation,
        format: Format,
        origin: &Origin,
        outcome: &mut Outcome,
    ) -> Result<Rows> {
        let trained = self.choice.trained(&conversation.messages);
        if !self.choice.everything && trained.is_empty() {
            return Ok(Err(DropReason::NoAnswer));
        }
        if !trained.is_empty() && trained.iter().all(|&k| conversation.messages[k].is_empty()) {
            return Ok(Err(DropReason::Empty));
        }
        let rows = self.renderer(conversation, format)?.rows(conversation, self.choice, origin)?;
        let mut tokens = Vec::with_capacity(rows.len());
        for row in &rows {
            let row = tokenise(row, self.tokenizer).map_err(|error| error.at(origin))?;
            outcome.merged_edges += row.merged_edges;
            tokens.push((row.input_ids, row.trained));
        }
        Ok(Ok(tokens))
    }

    /// The renderer for a conversation, by whether it has tools.
    pub(crate) fn renderer(&self, conversation: &Conversation, format: Format) -> Result<&Renderer<'_>> {
        match (&self.renderers, &conversation.tools) {
            (Some((plain, _)), None) => Ok(plain),
            (Some((_, with_tools)), Some(_)) => Ok(with_tools),
            (None, _) => Err(DataError::NoTemplate { path: self.tokenizer.dir().to_owned(), format }),
        }
    }

    /// Pieces of text end to end, each tokenised alone, and the end token after every trained one.
    fn segments(&self, segments: &[(Cow<'_, str>, bool)], origin: &Origin) -> Result<Row> {
        let (mut ids, mut trained) = (Vec::new(), Vec::new());
        for (index, (text, is_answer)) in segments.iter().enumerate() {
            let tokens =
                if index == 0 { self.tokenizer.encode_prompt(text) } else { self.tokenizer.encode(text, false) };
            ids.extend(tokens.map_err(|error| error.at(origin))?);
            if *is_answer {
                ids.push(self.eos()?);
            }
            // Of several answers perhaps only the last one is trained.
            let is_trained = *is_answer && !(self.choice.last_only && index + 1 < segments.len());
            trained.resize(ids.len(), is_trained || self.choice.everything);
        }
        Ok((ids, trained))
    }

    fn eos(&self) -> Result<u32> {
        self.tokenizer.eos_token_id().ok_or_else(|| DataError::NoEos { path: self.tokenizer.dir().to_owned() })
    }

    fn tokenized(&self, input_ids: &[i64], labels: Option<&[i64]>, origin: &Origin) -> Result<Row> {
        let vocab_size = self.tokenizer.vocab_size();
        let mut ids = Vec::with_capacity(input_ids.len());
        let mut trained = Vec::with_capacity(input_ids.len());
        for (index, &id) in input_ids.iter().enumerate() {
            let out_of_range =
                || DataError::TokenOutOfRange { origin: origin.clone(), field: "input_ids", index, id, vocab_size };
            let token = u32::try_from(id).ok().filter(|&token| (token as usize) < vocab_size);
            ids.push(token.ok_or_else(out_of_range)?);
            let label = labels.map_or(id, |labels| labels[index]);
            if label != -100 && label != id {
                return Err(DataError::LabelMismatch { origin: origin.clone(), index, label, input_id: id });
            }
            trained.push(label != -100 || self.choice.everything);
        }
        Ok((ids, trained))
    }
}

/// Tokens of a row, and how many of them are trained.
fn size((ids, trained): &Row) -> (usize, usize) {
    (ids.len(), trained.iter().filter(|&&trained| trained).count())
}

/// An instruction as messages.
pub(crate) fn conversation_of(instruction: &Instruction) -> Conversation {
    let mut messages: Vec<Message> =
        instruction.system.iter().map(|system| Message::new("system", system.as_str())).collect();
    for (user, assistant) in &instruction.history {
        messages.extend([Message::new("user", user.as_str()), Message::new("assistant", assistant.as_str())]);
    }
    messages.push(Message::new("user", instruction.user_text()));
    messages.push(Message::new("assistant", instruction.output.as_str()));
    Conversation { messages, tools: None }
}

/// An instruction in the layout of the Alpaca model, for tokenizers without a chat template.
fn classic_segments(instruction: &Instruction) -> Vec<(Cow<'_, str>, bool)> {
    let mut segments = Vec::new();
    let mut opening = instruction.system.as_ref().map(|system| format!("{system}\n\n")).unwrap_or_default();
    for (user, assistant) in &instruction.history {
        segments.push((format!("{opening}### Instruction:\n{user}\n\n### Response:\n").into(), false));
        segments.push((assistant.as_str().into(), true));
        opening = "\n\n".to_owned();
    }
    let input = match instruction.input.as_str() {
        "" => String::new(),
        input => format!("### Input:\n{input}\n\n"),
    };
    let task = &instruction.instruction;
    segments.push((format!("{opening}### Instruction:\n{task}\n\n{input}### Response:\n").into(), false));
    segments.push((instruction.output.as_str().into(), true));
    segments
}
