//! From a document to rows of tokens with a loss mask.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::document::{Body, Conversation, Document, Instruction, Message, Origin};
use crate::error::{DataError, Result};
use crate::format::Format;
use crate::mask::{MaskedText, Renderer, tokenise};
use crate::report::DropReason;
use crate::tokenizer::Tokenizer;

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

/// What happens to a row that is longer than the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// The whole set is refused.
    Refuse,
    /// The row is left out and counted.
    #[default]
    Drop,
    /// Tokens are cut off on the left: the end is kept.
    Left,
    /// Tokens are cut off on the right: the start is kept.
    Right,
}

/// What became of one document.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) examples: Vec<Example>,
    pub(crate) dropped: Vec<DropReason>,
    /// Rows that were cut.
    pub(crate) truncated: usize,
    /// The text of an instruction was laid out without a chat template.
    pub(crate) classic: bool,
    /// A token that ends a turn or a text is trained, or the tokens were made elsewhere.
    pub(crate) trains_end: bool,
}

/// Tokens, and which of them are trained.
type Row = (Vec<u32>, Vec<bool>);
/// The rows of a document, or why it has none.
type Rows = std::result::Result<Vec<Row>, DropReason>;

/// Turns documents into rows of tokens.
pub(crate) struct ExampleBuilder<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    /// Renders conversations without and with tools.
    pub(crate) renderers: Option<(Renderer<'a>, Renderer<'a>)>,
    pub(crate) train_on_prompt: bool,
    pub(crate) max_length: usize,
    pub(crate) truncation: Truncation,
}

impl ExampleBuilder<'_> {
    pub(crate) fn build(&self, document: &Document) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let rows = match self.rows(document, &mut outcome)? {
            Ok(rows) => rows,
            Err(reason) => {
                outcome.dropped.push(reason);
                return Ok(outcome);
            }
        };
        for (input_ids, mut trained) in rows {
            if let Some(first) = trained.first_mut() {
                *first = false;
            }
            outcome.trains_end |= matches!(document.body, Body::Tokenized { .. })
                || input_ids.iter().zip(&trained).any(|(&id, &trained)| trained && self.tokenizer.is_added(id));
            let example = Example { input_ids, trained, origin: document.origin.clone() };
            self.fit(example, &mut outcome)?;
        }
        Ok(outcome)
    }

    /// Applies the length limit.
    fn fit(&self, mut example: Example, outcome: &mut Outcome) -> Result<()> {
        let (tokens, max_length) = (example.input_ids.len(), self.max_length);
        if tokens > max_length {
            match self.truncation {
                Truncation::Refuse => {
                    return Err(DataError::TooLong { origin: example.origin, tokens, max_length });
                }
                Truncation::Drop => {
                    outcome.dropped.push(DropReason::TooLong);
                    return Ok(());
                }
                Truncation::Left => {
                    example.input_ids.drain(..tokens - max_length);
                    example.trained.drain(..tokens - max_length);
                    example.trained[0] = false;
                }
                Truncation::Right => {
                    example.input_ids.truncate(max_length);
                    example.trained.truncate(max_length);
                }
            }
        }
        if !example.trained.contains(&true) {
            outcome.dropped.push(DropReason::NoTrainedToken);
            return Ok(());
        }
        outcome.truncated += usize::from(tokens > max_length);
        outcome.examples.push(example);
        Ok(())
    }

    fn rows(&self, document: &Document, outcome: &mut Outcome) -> Result<Rows> {
        let origin = &document.origin;
        match &document.body {
            Body::Instruction(instruction) if instruction.output.is_empty() => Ok(Err(DropReason::Empty)),
            Body::Instruction(instruction) => match &self.renderers {
                Some(_) => self.conversation(&conversation_of(instruction), Format::Alpaca, origin),
                None => {
                    outcome.classic = true;
                    self.segments(&classic_segments(instruction), origin).map(|row| Ok(vec![row]))
                }
            },
            Body::Conversation(conversation) => self.conversation(conversation, Format::Messages, origin),
            Body::PromptCompletion { completion, .. } if completion.is_empty() => Ok(Err(DropReason::Empty)),
            Body::PromptCompletion { prompt, completion } => {
                let segments = [(prompt.as_str().into(), false), (completion.as_str().into(), true)];
                self.segments(&segments, origin).map(|row| Ok(vec![row]))
            }
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

    fn conversation(&self, conversation: &Conversation, format: Format, origin: &Origin) -> Result<Rows> {
        let trained = || conversation.messages.iter().filter(|message| message.is_trained());
        if !self.train_on_prompt && trained().next().is_none() {
            return Ok(Err(DropReason::NoAnswer));
        }
        if trained().next().is_some() && trained().all(Message::is_empty) {
            return Ok(Err(DropReason::Empty));
        }
        let rows = self.renderer(conversation, format)?.rows(conversation, self.train_on_prompt, origin)?;
        let tokens = |row: &MaskedText| tokenise(row, self.tokenizer).map_err(|error| error.at(origin));
        rows.iter().map(tokens).collect::<Result<_>>().map(Ok)
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
            trained.resize(ids.len(), *is_answer || self.train_on_prompt);
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
            trained.push(label != -100 || self.train_on_prompt);
        }
        Ok((ids, trained))
    }
}

/// What the user says in an instruction: the task, and on the next line its input.
fn user_text(instruction: &Instruction) -> String {
    match (instruction.instruction.as_str(), instruction.input.as_str()) {
        (text, "") | ("", text) => text.to_owned(),
        (task, input) => format!("{task}\n{input}"),
    }
}

/// An instruction as messages.
fn conversation_of(instruction: &Instruction) -> Conversation {
    let mut messages: Vec<Message> =
        instruction.system.iter().map(|system| Message::new("system", system.as_str())).collect();
    for (user, assistant) in &instruction.history {
        messages.extend([Message::new("user", user.as_str()), Message::new("assistant", assistant.as_str())]);
    }
    messages.push(Message::new("user", user_text(instruction)));
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
