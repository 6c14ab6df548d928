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

/// The role whose messages are answers.
const ASSISTANT: &str = "assistant";

/// Which messages are trained.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Choice<'a> {
    /// The roles whose messages are trained unless a message says otherwise.
    pub(crate) roles: &'a [String],
    /// Of the trained messages, only the last one.
    pub(crate) last_only: bool,
    /// Everything, prompts too.
    pub(crate) everything: bool,
}

impl Choice<'_> {
    /// The numbers of the trained messages.
    pub(crate) fn trained(&self, messages: &[Message]) -> Vec<usize> {
        let chosen =
            |message: &Message| message.train.unwrap_or_else(|| self.roles.iter().any(|role| role == message.role()));
        let mut turns: Vec<usize> = (0..messages.len()).filter(|&k| chosen(&messages[k])).collect();
        if self.last_only {
            turns.drain(..turns.len().saturating_sub(1));
        }
        turns
    }
}

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
    /// differently once others follow. No row when no message is trained.
    pub(crate) fn rows(
        &self,
        conversation: &Conversation,
        choice: Choice<'_>,
        origin: &Origin,
    ) -> Result<Vec<MaskedText>> {
        let turns = choice.trained(&conversation.messages);
        // What follows the last trained turn teaches nothing.
        let end = match turns.last() {
            Some(last) => last + 1,
            None if choice.everything => conversation.messages.len(),
            None => return Ok(Vec::new()),
        };
        let messages: Vec<Value> =
            conversation.messages[..end].iter().map(|message| Value::Object(message.fields.clone())).collect();
        let render = Turns { renderer: self, messages: &messages, tools: conversation.tools.as_ref(), origin };
        let (answers, others): (Vec<usize>, Vec<usize>) =
            turns.iter().partition(|&&k| conversation.messages[k].role() == ASSISTANT);
        let rows = match choice.everything {
            true => render.text(messages.len(), false).map(|text| {
                let whole = 0..text.len();
                vec![MaskedText { text, spans: vec![whole] }]
            }),
            false if self.template.marks_generation() => {
                let assistants: Vec<usize> =
                    (0..end).filter(|&k| conversation.messages[k].role() == ASSISTANT).collect();
                render.marked(&answers, &assistants, &others).map(|row| vec![row])
            }
            false => render.by_prefix(&turns),
        };
        rows.map_err(|error| error.at(origin))
    }
}

struct Turns<'a> {
    renderer: &'a Renderer<'a>,
    messages: &'a [Value],
    tools: Option<&'a Value>,
    origin: &'a Origin,
}

impl Turns<'_> {
    /// The first `count` messages as text.
    fn text(&self, count: usize, add_generation_prompt: bool) -> Result<String> {
        self.render(&self.messages[..count], add_generation_prompt)
    }

    fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String> {
        let Renderer { template, extra, .. } = self.renderer;
        template.render(messages, self.tools, add_generation_prompt, extra)
    }

    fn spans(&self, count: usize) -> Result<MaskedText> {
        let Renderer { template, extra, .. } = self.renderer;
        let rendered = template.render_spans(&self.messages[..count], self.tools, false, extra)?;
        Ok(MaskedText { text: rendered.text, spans: rendered.spans })
    }

    fn role(&self, k: usize) -> &str {
        self.messages[k].get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// Spans from generation blocks, those of the trained turns only. `others` are trained messages of other roles, which
    /// no block marks.
    fn marked(&self, answers: &[usize], assistants: &[usize], others: &[usize]) -> Result<MaskedText> {
        let mut whole = self.spans(self.messages.len())?;
        if answers.len() < assistants.len() {
            whole.spans = self.marked_of(answers, assistants, &whole)?;
        }
        for &k in others {
            let span = self.span_in(&whole.text, k)?.ok_or_else(|| self.not_trainable(k))?;
            whole.spans.push(span);
        }
        whole.spans.sort_by_key(|span| span.start);
        Ok(whole)
    }

    /// Of the marked spans those of some assistant turns.
    fn marked_of(&self, answers: &[usize], assistants: &[usize], whole: &MaskedText) -> Result<Vec<Range<usize>>> {
        let mut kept = Vec::new();
        let mut seen = 0;
        for &k in assistants {
            // A turn may have several blocks, reasoning and answer for instance.
            let through = if k + 1 == self.messages.len() { whole.spans.len() } else { self.spans(k + 1)?.spans.len() };
            if through <= seen || through > whole.spans.len() {
                let template = self.renderer.template.name().to_owned();
                let (origin, spans, turns) = (self.origin.clone(), whole.spans.len(), assistants.len());
                return Err(DataError::SpansPerTurn { origin, template, spans, turns });
            }
            if answers.contains(&k) {
                kept.extend_from_slice(&whole.spans[seen..through]);
            }
            seen = through;
        }
        Ok(kept)
    }

    fn by_prefix(&self, turns: &[usize]) -> Result<Vec<MaskedText>> {
        let whole = self.text(self.messages.len(), false)?;
        let mut spans = Vec::with_capacity(turns.len());
        for &k in turns {
            match self.span_in(&whole, k)? {
                Some(span) => spans.push(span),
                None => return self.row_per_turn(turns),
            }
        }
        Ok(vec![MaskedText { text: whole, spans }])
    }

    /// Where the words of message `k` begin in a text that begins with the messages through `k`.
    ///
    /// An answer begins after the generation prompt. What another role says begins where the text changes when the role
    /// says something else.
    fn start_in(&self, text: &str, k: usize) -> Result<Option<usize>> {
        if self.role(k) == ASSISTANT {
            let prompt = self.text(k, true)?;
            return Ok(text.starts_with(&prompt).then_some(prompt.len()));
        }
        let mut changed = self.messages[..=k].to_vec();
        let Some(Value::String(content)) = changed[k].get_mut("content") else { return Ok(None) };
        let other = if content.trim_start().starts_with('x') { "y" } else { "x" };
        content.insert_str(0, other);
        let (through, changed) = (self.text(k + 1, false)?, self.render(&changed, false)?);
        let same = through.char_indices().zip(changed.chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at);
        Ok(same.filter(|&at| text.starts_with(&through[..at])))
    }

    /// Where turn `k` stands in the whole text, if the texts of its prefixes are prefixes of the whole.
    fn span_in(&self, whole: &str, k: usize) -> Result<Option<Range<usize>>> {
        let Some(start) = self.start_in(whole, k)? else { return Ok(None) };
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
        Ok((end > start).then_some(start..end))
    }

    /// Each turn as the last one of a row of its own.
    fn row_per_turn(&self, turns: &[usize]) -> Result<Vec<MaskedText>> {
        let row = |&k: &usize| {
            let text = self.text(k + 1, false)?;
            match self.start_in(&text, k)?.filter(|&start| start < text.len()) {
                Some(start) => Ok(MaskedText { spans: std::iter::once(start..text.len()).collect(), text }),
                None if self.role(k) != ASSISTANT => Err(self.not_trainable(k)),
                None => {
                    let template = self.renderer.template.name().to_owned();
                    Err(DataError::NotPrefixPreserving { origin: self.origin.clone(), template, message: k + 1 })
                }
            }
        };
        turns.iter().map(row).collect()
    }

    fn not_trainable(&self, k: usize) -> DataError {
        let template = self.renderer.template.name().to_owned();
        let (origin, role) = (self.origin.clone(), self.role(k).to_owned());
        DataError::RoleNotTrainable { origin, template, message: k + 1, role }
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
