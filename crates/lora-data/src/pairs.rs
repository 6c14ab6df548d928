//! Preference pairs and rated answers: a prompt in any layout, and answers that are the only thing trained.

use serde_json::{Map, Value};

use crate::document::{Body, Conversation, Instruction, Message};
use crate::error::{DataError, Result};
use crate::fields::{Fields, list_of_text};
use crate::messages::untrained;

/// What the answers of a pair answer.
enum Prompt {
    Text(String),
    Messages(Vec<Message>),
    Instruction(Instruction),
    /// Both sides hold the whole of it.
    Implicit,
}

impl Fields<'_> {
    /// `chosen` and `rejected`, with their prompt.
    pub(crate) fn preference(&mut self) -> Result<Body> {
        let chosen_field = self.or_alias("chosen", "chosen_messages");
        let rejected_field = self.or_alias("rejected", "rejected_messages");
        let chosen = list_of_text(self.required(chosen_field)?);
        let rejected = list_of_text(self.required(rejected_field)?);
        let prompt = self.pair_prompt(&chosen)?;
        let (chosen, rejected) = match prompt {
            Prompt::Implicit => self.split_pair((chosen_field, chosen), (rejected_field, rejected))?,
            prompt => {
                (self.answered(&prompt, chosen_field, chosen)?, self.answered(&prompt, rejected_field, rejected)?)
            }
        };
        if matches!(chosen, Body::Conversation(_)) {
            // Both sides have read them.
            self.optional("tools");
        }
        Ok(Body::Preference { chosen: Box::new(chosen), rejected: Box::new(rejected) })
    }

    fn pair_prompt(&mut self, chosen: &Value) -> Result<Prompt> {
        if let Some(prompt) = self.optional("prompt") {
            return match list_of_text(prompt) {
                // Some files repeat the first question beside two whole conversations.
                Value::String(text) if is_conversation(chosen) && asks(chosen, &text) => Ok(Prompt::Implicit),
                Value::String(text) => Ok(Prompt::Text(text)),
                list @ Value::Array(_) => Ok(Prompt::Messages(untrained(self.messages("prompt", list)?))),
                other => Err(self.wrong_type(self.column("prompt"), "a string or a list of messages", &other)),
            };
        }
        let field = self.or_alias("conversations", "messages");
        if self.has(field) {
            let value = self.required(field)?;
            let mut messages = self.messages(field, value)?;
            self.add_system(&mut messages)?;
            return Ok(Prompt::Messages(untrained(messages)));
        }
        if self.has("instruction") {
            return Ok(Prompt::Instruction(Instruction {
                system: self.optional_string("system")?,
                history: self.history()?,
                instruction: self.string("instruction")?,
                input: self.optional_string("input")?.unwrap_or_default(),
                output: String::new(),
            }));
        }
        Ok(Prompt::Implicit)
    }

    /// The prompt with one answer.
    fn answered(&mut self, prompt: &Prompt, field: &str, answer: Value) -> Result<Body> {
        match (prompt, answer) {
            (Prompt::Text(prompt), Value::String(completion)) => {
                Ok(Body::PromptCompletion { prompt: prompt.clone(), completion })
            }
            (Prompt::Instruction(instruction), Value::String(output)) => {
                Ok(body_of(Instruction { output, ..instruction.clone() }))
            }
            (Prompt::Instruction(instruction), answer) => {
                let mut messages = untrained(messages_of(instruction));
                messages.extend(self.answer(field, answer)?);
                self.conversation_body(messages)
            }
            (Prompt::Text(prompt), answer) => {
                let mut messages = untrained(vec![Message::new("user", prompt.as_str())]);
                messages.extend(self.answer(field, answer)?);
                self.conversation_body(messages)
            }
            (Prompt::Messages(prompt), answer) => {
                let mut messages = prompt.clone();
                messages.extend(self.answer(field, answer)?);
                self.conversation_body(messages)
            }
            (Prompt::Implicit, other) => Err(self.wrong_type(self.column(field), "an answer with its prompt", &other)),
        }
    }

    /// The messages of an answer: text, one message or a list of them.
    fn answer(&self, field: &str, answer: Value) -> Result<Vec<Message>> {
        match answer {
            Value::String(text) => Ok(vec![Message::new("assistant", text)]),
            message @ Value::Object(_) => Ok(vec![self.message(self.column(field), message)?]),
            list @ Value::Array(_) => self.messages(field, list),
            other => Err(self.wrong_type(self.column(field), "a string, a message or a list of messages", &other)),
        }
    }

    fn conversation_body(&mut self, messages: Vec<Message>) -> Result<Body> {
        // Both sides have the same tools, so they stay in the record for the other side.
        let column = self.column("tools").to_owned();
        let kept = self.record.get(&column).cloned();
        let tools = self.tools()?;
        if let Some(kept) = kept {
            self.record.insert(column, kept);
        }
        Ok(Body::Conversation(Conversation { messages, tools }))
    }

    /// Two whole texts or conversations: what they share at the beginning is the prompt (TRL's implicit prompt).
    fn split_pair(&mut self, chosen: (&str, Value), rejected: (&str, Value)) -> Result<(Body, Body)> {
        match (chosen, rejected) {
            ((_, Value::String(chosen)), (_, Value::String(rejected))) => {
                let Some(end) = shared_text(&chosen, &rejected) else {
                    return Err(DataError::SamePair { origin: self.origin.clone() });
                };
                let side = |text: &str| Body::PromptCompletion {
                    prompt: text[..end].to_owned(),
                    completion: text[end..].to_owned(),
                };
                Ok((side(&chosen), side(&rejected)))
            }
            ((chosen_field, chosen @ Value::Array(_)), (rejected_field, rejected @ Value::Array(_))) => {
                let mut chosen = self.messages(chosen_field, chosen)?;
                let mut rejected = self.messages(rejected_field, rejected)?;
                let shared = chosen.iter().zip(&rejected).take_while(|(a, b)| a.fields == b.fields).count();
                if shared == chosen.len() || shared == rejected.len() {
                    return Err(DataError::SamePair { origin: self.origin.clone() });
                }
                for message in chosen.iter_mut().take(shared).chain(rejected.iter_mut().take(shared)) {
                    message.train = Some(false);
                }
                Ok((self.conversation_body(chosen)?, self.conversation_body(rejected)?))
            }
            ((_, Value::String(_) | Value::Array(_)), (field, other)) => {
                Err(self.wrong_type(self.column(field), "of the same kind as `chosen`", &other))
            }
            ((field, other), _) => Err(self.wrong_type(self.column(field), "a string or a list of messages", &other)),
        }
    }

    /// An answer with its prompt and `label`.
    pub(crate) fn rated(&mut self) -> Result<Body> {
        let field = self.or_alias("label", "kto_tag");
        let desirable = match self.required(field)? {
            Value::Bool(label) => label,
            Value::String(text) if text.eq_ignore_ascii_case("true") => true,
            Value::String(text) if text.eq_ignore_ascii_case("false") => false,
            other => return Err(self.wrong_type(self.column(field), "true or false", &other)),
        };
        let field = self.or_alias("messages", "conversations");
        let answer = if self.has(field) {
            let value = self.required(field)?;
            let mut messages = self.messages(field, value)?;
            self.add_system(&mut messages)?;
            let place = format!("{}[{}]", self.column(field), messages.len().saturating_sub(1));
            match messages.split_last_mut() {
                Some((last, before)) if last.role() == "assistant" => {
                    before.iter_mut().for_each(|message| message.train = Some(false));
                }
                last => {
                    let role = last.map(|(last, _)| last.role().to_owned()).unwrap_or_default();
                    let (origin, wanted) = (self.origin.clone(), "the answer that is rated");
                    return Err(DataError::RoleOrder { origin, field: place, role, place: "at its end", wanted });
                }
            }
            Body::Conversation(Conversation { messages, tools: self.tools()? })
        } else if self.has("instruction") {
            body_of(self.instruction()?)
        } else {
            self.prompt_completion()?
        };
        Ok(Body::Rated { answer: Box::new(answer), desirable })
    }
}

/// An instruction of which only the last answer is trained.
fn body_of(instruction: Instruction) -> Body {
    if instruction.history.is_empty() {
        return Body::Instruction(instruction);
    }
    let mut messages = untrained(messages_of(&instruction));
    messages.push(Message::new("assistant", instruction.output));
    Body::Conversation(Conversation { messages, tools: None })
}

/// An instruction without its answer.
fn messages_of(instruction: &Instruction) -> Vec<Message> {
    let mut messages: Vec<Message> =
        instruction.system.iter().map(|system| Message::new("system", system.as_str())).collect();
    for (user, assistant) in &instruction.history {
        messages.extend([Message::new("user", user.as_str()), Message::new("assistant", assistant.as_str())]);
    }
    messages.push(Message::new("user", instruction.user_text()));
    messages
}

fn is_conversation(value: &Value) -> bool {
    value.as_array().is_some_and(|messages| messages.len() > 1)
}

/// Whether the conversation asks `text` before anything else is asked.
fn asks(conversation: &Value, text: &str) -> bool {
    let says = |message: &Map<String, Value>| {
        let content = message.get("content").or_else(|| message.get("value")).and_then(Value::as_str);
        content == Some(text)
    };
    conversation.as_array().into_iter().flatten().filter_map(Value::as_object).take(2).any(says)
}

/// Where two texts part, moved back to the start of a word; none when one is the beginning of the other.
fn shared_text(a: &str, b: &str) -> Option<usize> {
    let differ = a.char_indices().zip(b.chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at)?;
    Some(a[..differ].rfind(char::is_whitespace).map_or(0, |at| at + a[at..].chars().next().map_or(0, char::len_utf8)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_part_at_a_word() {
        assert_eq!(shared_text("Q: a\nA: good", "Q: a\nA: great"), Some(8));
        assert_eq!(shared_text("good", "great"), Some(0));
        assert_eq!(shared_text("a\u{2003}bc", "a\u{2003}bd"), Some(4));
        assert_eq!(shared_text("a b", "a b c"), None);
    }
}
