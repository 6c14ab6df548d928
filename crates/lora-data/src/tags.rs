//! What dataset files call the parts and the roles of a message.

use std::collections::BTreeMap;

/// A role as sharegpt files know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Who asks.
    User,
    /// Who answers.
    Assistant,
    /// What a tool gave back.
    Observation,
    /// A call of a tool, which the assistant makes.
    Function,
    /// The system prompt.
    System,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 5] = [Self::User, Self::Assistant, Self::Observation, Self::Function, Self::System];

    /// The names it has where none is set.
    pub fn usual_names(self) -> &'static [&'static str] {
        match self {
            Self::User => &["human", "user"],
            Self::Assistant => &["gpt", "assistant", "bot", "model", "chatgpt"],
            Self::Observation => &["observation", "tool"],
            Self::Function => &["function_call"],
            Self::System => &["system"],
        }
    }

    /// The role's name in a chat template.
    pub(crate) fn in_template(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Assistant | Self::Function => "assistant",
            Self::Observation => "tool",
            Self::System => "system",
        }
    }

    /// The key that names the role in a table of tags.
    fn key(self) -> &'static str {
        match self {
            Self::User => "user_tag",
            Self::Assistant => "assistant_tag",
            Self::Observation => "observation_tag",
            Self::Function => "function_tag",
            Self::System => "system_tag",
        }
    }
}

/// The names that a dataset's messages use; the usual ones where nothing is set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tags {
    /// The field with the role: `from`, or `role` where there is no such field.
    pub role: Option<String>,
    /// The field with the text: `value`, or `content` where the role stands in `role`.
    pub content: Option<String>,
    /// A role's name; with `None` the role is not known at all.
    pub names: BTreeMap<Role, Option<String>>,
}

impl Tags {
    /// The keys of a table of tags.
    pub const KEYS: [&'static str; 7] =
        ["role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag"];

    /// Sets what `key`, one of [`Tags::KEYS`], names; says whether there is such a key.
    pub fn set(&mut self, key: &str, name: Option<&str>) -> bool {
        let name = name.map(str::to_owned);
        match key {
            "role_tag" => self.role = name,
            "content_tag" => self.content = name,
            _ => match Role::ALL.into_iter().find(|role| role.key() == key) {
                Some(role) => {
                    self.names.insert(role, name);
                }
                None => return false,
            },
        }
        true
    }

    /// Whether nothing is set.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The role that is meant by `name`.
    pub(crate) fn role_of(&self, name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| match self.names.get(role) {
            Some(own) => own.as_deref() == Some(name),
            None => role.usual_names().contains(&name),
        })
    }

    /// The names that are known, for messages.
    pub(crate) fn known(&self) -> String {
        let mut names = Vec::new();
        for role in Role::ALL {
            match self.names.get(&role) {
                Some(own) => names.extend(own.iter().map(String::as_str)),
                None => names.extend(role.usual_names()),
            }
        }
        names.join(", ")
    }
}
