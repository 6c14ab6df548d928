//! What of a conversation is trained: exactly the assistant's words and the end token after them.
//!
//! Spans come from the template's `{% generation %}` blocks where it has them, else from rendering prefixes: what the
//! template writes for `messages[..=k]` beyond the generation prompt after `messages[..k]` is what turn `k` says. No
//! text is searched for.

use std::ops::Range;

use serde_json::{Map, Value};

use crate::document::{Conversation, Message, Origin};
use crate::error::{DataError, Result};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// Text for one row of tokens, and the byte ranges of it that are trained.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MaskedText {
    pub(crate) text: String,
    pub(crate) spans: Vec<Range<usize>>,
}

/// Renders conversations with one template.
pub(crate) struct Renderer<'a> {
    pub(crate) template: &'a ChatTemplate,
    pub(crate) extra: &'a Map<String, Value>,
    /// The end token that some templates write once after everything.
    pub(crate) eos_token: Option<&'a str>,
}

impl Renderer<'_> {
    /// The rows that train a conversation: one, or one per trained turn when the template writes earlier turns
    /// differently once others follow. No row when no assistant message is trained.
    pub(crate) fn rows(
        &self,
        conversation: &Conversation,
        everything: bool,
        origin: &Origin,
    ) -> Result<Vec<MaskedText>> {
        // What follows the last trained turn teaches nothing.
        let end = match conversation.messages.iter().rposition(Message::is_trained) {
            Some(last) => last + 1,
            None if everything => conversation.messages.len(),
            None => return Ok(Vec::new()),
        };
        let messages: Vec<Value> =
            conversation.messages[..end].iter().map(|message| Value::Object(message.fields.clone())).collect();
        let turns: Vec<usize> = (0..end).filter(|&k| conversation.messages[k].is_trained()).collect();
        let render = Turns { renderer: self, messages: &messages, tools: conversation.tools.as_ref() };
        let rows = match everything {
            true => render.text(messages.len(), false).map(|text| {
                let whole = 0..text.len();
                vec![MaskedText { text, spans: vec![whole] }]
            }),
            false if self.template.marks_generation() => {
                let assistants =
                    (0..end).filter(|&k| conversation.messages[k].role() == "assistant").collect::<Vec<_>>();
                render.marked(&turns, &assistants, origin).map(|row| vec![row])
            }
            false => render.by_prefix(&turns, origin),
        };
        rows.map_err(|error| error.at(origin))
    }
}

struct Turns<'a> {
    renderer: &'a Renderer<'a>,
    messages: &'a [Value],
    tools: Option<&'a Value>,
}

impl Turns<'_> {
    /// The first `count` messages as text.
    fn text(&self, count: usize, add_generation_prompt: bool) -> Result<String> {
        let Renderer { template, extra, .. } = self.renderer;
        template.render(&self.messages[..count], self.tools, add_generation_prompt, extra)
    }

    fn spans(&self, count: usize) -> Result<MaskedText> {
        let Renderer { template, extra, .. } = self.renderer;
        let rendered = template.render_spans(&self.messages[..count], self.tools, false, extra)?;
        Ok(MaskedText { text: rendered.text, spans: rendered.spans })
    }

    /// Spans from generation blocks, those of the trained turns only.
    fn marked(&self, turns: &[usize], assistants: &[usize], origin: &Origin) -> Result<MaskedText> {
        let mut whole = self.spans(self.messages.len())?;
        if turns.len() == assistants.len() {
            return Ok(whole);
        }
        let mut kept = Vec::new();
        let mut seen = 0;
        for &k in assistants {
            // A turn may have several blocks, reasoning and answer for instance.
            let through = if k + 1 == self.messages.len() { whole.spans.len() } else { self.spans(k + 1)?.spans.len() };
            if through <= seen || through > whole.spans.len() {
                let (spans, turns) = (whole.spans.len(), assistants.len());
                return Err(self.spans_per_turn(origin, spans, turns));
            }
            if turns.contains(&k) {
                kept.extend_from_slice(&whole.spans[seen..through]);
            }
            seen = through;
        }
        whole.spans = kept;
        Ok(whole)
    }

    fn spans_per_turn(&self, origin: &Origin, spans: usize, turns: usize) -> DataError {
        let template = self.renderer.template.name().to_owned();
        DataError::SpansPerTurn { origin: origin.clone(), template, spans, turns }
    }

    fn by_prefix(&self, turns: &[usize], origin: &Origin) -> Result<Vec<MaskedText>> {
        let whole = self.text(self.messages.len(), false)?;
        let mut spans = Vec::with_capacity(turns.len());
        for &k in turns {
            match self.span_in(&whole, k)? {
                Some(span) => spans.push(span),
                None => return self.row_per_turn(turns, origin),
            }
        }
        Ok(vec![MaskedText { text: whole, spans }])
    }

    /// Where turn `k` stands in the whole text, if the texts of its prefixes are prefixes of the whole.
    fn span_in(&self, whole: &str, k: usize) -> Result<Option<Range<usize>>> {
        let prompt = self.text(k, true)?;
        if !whole.starts_with(&prompt) {
            return Ok(None);
        }
        let end = if k + 1 == self.messages.len() {
            whole.len()
        } else {
            let through = self.text(k + 1, false)?;
            let without_eos = self.renderer.eos_token.and_then(|eos| through.trim_end().strip_suffix(eos));
            match (whole.starts_with(&through), without_eos) {
                (true, _) => through.len(),
                (false, Some(through)) if whole.starts_with(through) => through.len(),
                _ => return Ok(None),
            }
        };
        Ok((end > prompt.len()).then_some(prompt.len()..end))
    }

    /// Each turn as the last one of a row of its own.
    fn row_per_turn(&self, turns: &[usize], origin: &Origin) -> Result<Vec<MaskedText>> {
        let row = |&k: &usize| {
            let text = self.text(k + 1, false)?;
            let prompt = self.text(k, true)?;
            if !text.starts_with(&prompt) || text.len() == prompt.len() {
                let template = self.renderer.template.name().to_owned();
                return Err(DataError::NotPrefixPreserving { origin: origin.clone(), template, message: k + 1 });
            }
            let span = prompt.len()..text.len();
            Ok(MaskedText { text, spans: vec![span] })
        };
        turns.iter().map(row).collect()
    }
}

impl Renderer<'_> {
    /// Refuses a template that leaves out what the role of message `at` says: other content must give other text.
    pub(crate) fn check_role(&self, conversation: &Conversation, at: usize, origin: &Origin) -> Result<()> {
        let mut changed = conversation.clone();
        let message = &mut changed.messages[at];
        let Some(Value::String(content)) = message.fields.get_mut("content") else { return Ok(()) };
        content.push('x');
        if self.whole(conversation, origin)? != self.whole(&changed, origin)? {
            return Ok(());
        }
        let (template, role) = (self.template.name().to_owned(), conversation.messages[at].role().to_owned());
        Err(DataError::RoleIgnored { origin: origin.clone(), template, role })
    }

    /// Refuses a template that leaves out the tools of a conversation.
    pub(crate) fn check_tools(&self, conversation: &Conversation, origin: &Origin) -> Result<()> {
        let without = Conversation { messages: conversation.messages.clone(), tools: None };
        if conversation.tools.is_none() || self.whole(conversation, origin)? != self.whole(&without, origin)? {
            return Ok(());
        }
        Err(DataError::ToolsIgnored { origin: origin.clone(), template: self.template.name().to_owned() })
    }

    fn whole(&self, conversation: &Conversation, origin: &Origin) -> Result<String> {
        let messages: Vec<Value> =
            conversation.messages.iter().map(|message| Value::Object(message.fields.clone())).collect();
        let text = self.template.render(&messages, conversation.tools.as_ref(), false, self.extra);
        text.map_err(|error| error.at(origin))
    }
}

/// Tokens of a masked text, and which of them are trained.
pub(crate) fn tokenise(row: &MaskedText, tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<bool>)> {
    let (ids, offsets) = tokenizer.encode_with_offsets(&row.text)?;
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
    Ok((ids, trained))
}
