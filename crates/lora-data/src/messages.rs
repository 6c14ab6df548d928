//! Conversations: messages with roles, in the names of whatever file they come from.

use serde_json::{Map, Value, json};

use crate::document::{Conversation, Message};
use crate::error::{DataError, Result};
use crate::fields::{Fields, field_names, list_of_text};
use crate::strict_json::{kind, read_whole};
use crate::tags::Role;

/// What an assistant can say besides `content`.
const OTHER_SPEECH: [&str; 4] = ["tool_calls", "reasoning_content", "thinking", "reasoning"];

/// The messages as a prompt, of which nothing is trained.
pub(crate) fn untrained(mut messages: Vec<Message>) -> Vec<Message> {
    for message in &mut messages {
        message.train = Some(false);
    }
    messages
}

impl Fields<'_> {
    /// `messages` with `tools` and `system`.
    pub(crate) fn conversation(&mut self) -> Result<Conversation> {
        // `conversations` is what sharegpt files call the list.
        let field = self.or_alias("messages", "conversations");
        let value = self.required(field)?;
        let mut messages = self.messages(field, value)?;
        self.check_tools_follow(field, &messages)?;
        self.add_system(&mut messages)?;
        Ok(Conversation { messages, tools: self.tools()? })
    }

    /// `conversations`, in which who asks and who answers take turns.
    pub(crate) fn sharegpt(&mut self) -> Result<Conversation> {
        let field = self.or_alias("conversations", "messages");
        let value = self.required(field)?;
        let mut messages = self.messages(field, value)?;
        self.check_turns(field, &messages)?;
        self.add_system(&mut messages)?;
        Ok(Conversation { messages, tools: self.tools()? })
    }

    /// The `system` column, which counts where the messages do not begin with one of their own.
    pub(crate) fn add_system(&mut self, messages: &mut Vec<Message>) -> Result<()> {
        let own = messages.first().is_some_and(|message| message.role() == "system");
        if let Some(system) = self.optional_string("system")?
            && !own
        {
            messages.insert(0, Message::new("system", system));
        }
        Ok(())
    }

    /// The messages of a list, which a table may hold as JSON text.
    pub(crate) fn messages(&self, field: &str, value: Value) -> Result<Vec<Message>> {
        let column = self.column(field);
        let value = list_of_text(value);
        let Value::Array(items) = value else { return Err(self.wrong_type(column, "a list of messages", &value)) };
        if items.is_empty() {
            return Err(DataError::EmptyConversation { origin: self.origin.clone(), field: column.to_owned() });
        }
        items.into_iter().enumerate().map(|(index, item)| self.message(&format!("{column}[{index}]"), item)).collect()
    }

    /// One message; `place` names it in errors.
    pub(crate) fn message(&self, place: &str, value: Value) -> Result<Message> {
        let Value::Object(mut fields) = value else { return Err(self.wrong_type(place, "an object", &value)) };
        if self.has_tags(&fields) {
            self.rename(place, &mut fields)?;
        }
        let train = self.train_flag(place, &mut fields)?;
        match fields.get("role") {
            Some(Value::String(_)) => {}
            Some(other) => return Err(self.wrong_type(format!("{place}.role"), "a string", other)),
            None => return Err(self.missing(format!("{place}.role"), &fields)),
        }
        if let Some(Value::Array(parts)) = fields.get("content") {
            let parts = parts.clone();
            self.join_parts(place, &parts, &mut fields)?;
        }
        match fields.get("content") {
            Some(Value::String(_) | Value::Array(_)) => {}
            Some(Value::Null) | None => {
                if !OTHER_SPEECH.iter().any(|name| fields.get(*name).is_some_and(|value| !value.is_null())) {
                    return Err(self.missing(format!("{place}.content"), &fields));
                }
            }
            Some(other) => {
                return Err(self.wrong_type(format!("{place}.content"), "a string or a list of parts", other));
            }
        }
        parse_call_arguments(&mut fields);
        Ok(Message { fields, train })
    }

    fn missing(&self, field: String, fields: &Map<String, Value>) -> DataError {
        DataError::MissingField {
            origin: self.origin.clone(),
            format: self.format,
            field,
            present: field_names(fields),
        }
    }

    /// Whether a message is written in the names of the source's tags, and not as `role` and `content`.
    fn has_tags(&self, fields: &Map<String, Value>) -> bool {
        let tags = &self.source.tags;
        match &tags.role {
            Some(_) => true,
            None => !fields.contains_key("role") && fields.contains_key("from") || !tags.names.is_empty(),
        }
    }

    /// Brings the source's names of role and text to `role` and `content`.
    fn rename(&self, place: &str, fields: &mut Map<String, Value>) -> Result<()> {
        let tags = &self.source.tags;
        let usual = if fields.contains_key("from") { ("from", "value") } else { ("role", "content") };
        let role_field = tags.role.as_deref().unwrap_or(usual.0);
        let content_field = tags.content.as_deref().unwrap_or(usual.1);
        let name = match fields.shift_remove(role_field) {
            Some(Value::String(name)) => name,
            None => return Err(self.missing(format!("{place}.{role_field}"), fields)),
            Some(other) => return Err(self.wrong_type(format!("{place}.{role_field}"), "a string", &other)),
        };
        let Some(role) = tags.role_of(&name) else {
            let (origin, known) = (self.origin.clone(), tags.known());
            return Err(DataError::ShareGptRole { origin, field: format!("{place}.{role_field}"), role: name, known });
        };
        let content = fields.shift_remove(content_field).unwrap_or_default();
        fields.insert("role".to_owned(), Value::from(role.in_template()));
        match (role, content) {
            (Role::Function, Value::String(text)) => {
                self.add_call(&format!("{place}.{content_field}"), &text, fields)?
            }
            (_, content) => {
                fields.insert("content".to_owned(), content);
            }
        }
        Ok(())
    }

    /// A `function_call` turn: one call or a list of calls as JSON text, perhaps after a `<think>` block.
    fn add_call(&self, field: &str, text: &str, fields: &mut Map<String, Value>) -> Result<()> {
        const WANTED: &str = "a call as JSON text, as {\"name\": \"f\", \"arguments\": {}}, or a list of them";
        let wrong = |found: &str| DataError::WrongType {
            origin: self.origin.clone(),
            field: field.to_owned(),
            wanted: WANTED,
            found: found.to_owned(),
        };
        let mut rest = text.trim();
        if let Some((thought, after)) = rest.strip_prefix("<think>").and_then(|inner| inner.split_once("</think>")) {
            fields.insert("reasoning_content".to_owned(), Value::from(thought.trim()));
            rest = after.trim();
        }
        let calls = match read_whole(rest) {
            Ok(Value::Array(calls)) if !calls.is_empty() => calls,
            Ok(call @ Value::Object(_)) => vec![call],
            Ok(other) => return Err(wrong(kind(&other))),
            Err(_) => return Err(wrong("text that is not JSON")),
        };
        let calls = calls.into_iter().map(|call| tool_call(call).ok_or_else(|| wrong("a call without a name")));
        fields.insert("tool_calls".to_owned(), Value::Array(calls.collect::<Result<_>>()?));
        Ok(())
    }

    /// A content list: text parts become `content`, `reasoning` parts `reasoning_content`, `tool_call` parts `tool_calls`.
    /// A list with any other part is left to the template.
    fn join_parts(&self, place: &str, parts: &[Value], fields: &mut Map<String, Value>) -> Result<()> {
        let (mut text, mut reasoning, mut calls) = (None::<String>, None::<String>, Vec::new());
        for (index, part) in parts.iter().enumerate() {
            let of = part.get("type").and_then(Value::as_str);
            let says = || part.get("text").or_else(|| part.get("value")).and_then(Value::as_str);
            match (of, says()) {
                (Some("text"), Some(says)) => text.get_or_insert_default().push_str(says),
                (Some("reasoning" | "thinking"), Some(says)) => reasoning.get_or_insert_default().push_str(says),
                (Some("tool_call"), Some(says)) => {
                    let mut one = Map::new();
                    self.add_call(&format!("{place}.content[{index}]"), says, &mut one)?;
                    calls.extend(one.get("tool_calls").and_then(Value::as_array).into_iter().flatten().cloned());
                }
                _ => return Ok(()),
            }
        }
        if text.is_some() || (reasoning.is_none() && calls.is_empty()) {
            fields.insert("content".to_owned(), Value::String(text.unwrap_or_default()));
        } else {
            fields.insert("content".to_owned(), Value::Null);
        }
        if let Some(reasoning) = reasoning {
            fields.insert("reasoning_content".to_owned(), Value::String(reasoning));
        }
        if !calls.is_empty() {
            fields.insert("tool_calls".to_owned(), Value::Array(calls));
        }
        Ok(())
    }

    /// `train` (boolean) or `weight` / `loss_weight` (0 or 1) of a message.
    fn train_flag(&self, place: &str, fields: &mut Map<String, Value>) -> Result<Option<bool>> {
        let mut train = None;
        for name in ["train", "weight", "loss_weight"] {
            let Some(value) = fields.shift_remove(name).filter(|value| !value.is_null()) else { continue };
            train = match (name, &value) {
                ("train", Value::Bool(flag)) => Some(*flag),
                ("train", other) => return Err(self.wrong_type(format!("{place}.train"), "true or false", other)),
                (_, number) if number.as_f64() == Some(0.0) => Some(false),
                (_, number) if number.as_f64() == Some(1.0) => Some(true),
                (_, other) => return Err(self.wrong_type(format!("{place}.{name}"), "0 or 1", other)),
            };
        }
        Ok(train)
    }

    /// Who asks and who answers take turns, after a system message that may come first. What a tool gives back counts as
    /// asking, a call as answering.
    pub(crate) fn check_turns(&self, field: &str, messages: &[Message]) -> Result<()> {
        let begins = usize::from(messages.first().is_some_and(|message| message.role() == "system"));
        for (index, message) in messages.iter().enumerate().skip(begins) {
            let answers = (index - begins) % 2 == 1;
            let fits = match message.role() {
                "user" | "tool" => !answers,
                "assistant" => answers,
                _ => false,
            };
            if !fits {
                let wanted = if answers { "an answer" } else { "what is asked, or what a tool gave back," };
                let place = match (index == begins, answers) {
                    (true, _) => "at its beginning",
                    (_, true) => "after what was asked",
                    (_, false) => "after an answer",
                };
                return Err(self.role_order(format!("{}[{index}]", self.column(field)), message, place, wanted));
            }
        }
        Ok(())
    }

    /// What a tool gives back follows the call of it or what another tool gave back.
    fn check_tools_follow(&self, field: &str, messages: &[Message]) -> Result<()> {
        for (index, message) in messages.iter().enumerate().filter(|(_, message)| message.role() == "tool") {
            let before = index.checked_sub(1).and_then(|before| messages.get(before)).map(Message::role);
            if !matches!(before, Some("assistant" | "tool")) {
                let place = if before.is_none() { "at its beginning" } else { "without a call before it" };
                let field = format!("{}[{index}]", self.column(field));
                return Err(self.role_order(field, message, place, "the assistant's call of the tool"));
            }
        }
        Ok(())
    }

    fn role_order(&self, field: String, message: &Message, place: &'static str, wanted: &'static str) -> DataError {
        DataError::RoleOrder { origin: self.origin.clone(), field, role: message.role().to_owned(), place, wanted }
    }
}

/// A call with `name` and `arguments`, perhaps already inside of `function`, in the form that templates read.
fn tool_call(call: Value) -> Option<Value> {
    let inner = call.get("function").unwrap_or(&call);
    let name = inner.get("name").and_then(Value::as_str)?;
    let arguments = inner.get("arguments").or_else(|| inner.get("parameters")).cloned().unwrap_or_else(|| json!({}));
    Some(json!({"type": "function", "function": {"name": name, "arguments": arguments}}))
}

/// The arguments of a tool call come as JSON text from an API, but templates write them with `tojson`.
fn parse_call_arguments(fields: &mut Map<String, Value>) {
    let calls = fields.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        let call = if call.get("function").is_some() { &mut call["function"] } else { call };
        if let Some(arguments) = call.get_mut("arguments")
            && let Some(Ok(parsed @ Value::Object(_))) = arguments.as_str().map(read_whole)
        {
            *arguments = parsed;
        }
    }
}
