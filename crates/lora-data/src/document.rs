//! A record as it is meant, whatever file and format it came from.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::{Map, Value};

/// Where a record stands: file, record number and line, both counted from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub file: Arc<Path>,
    /// The number of the record in the file.
    pub record: usize,
    /// The line on which the record begins.
    pub line: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)?;
        if self.record != self.line { write!(f, " (record {})", self.record) } else { Ok(()) }
    }
}

impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Reads what `Display` writes. It ends in a line, or in a line and the number of the record, so that no name of a file
/// can be taken for either.
impl<'de> Deserialize<'de> for Origin {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = || {
            let (place, record) = match text.strip_suffix(')') {
                Some(text) => text.rsplit_once(" (record ").map(|(place, record)| (place, Some(record)))?,
                None => (text.as_str(), None),
            };
            let (file, line) = place.rsplit_once(':')?;
            let line = line.parse().ok()?;
            let record = record.map_or(Some(line), |record| record.parse().ok())?;
            Some(Self { file: Path::new(file).into(), record, line })
        };
        parsed().ok_or_else(|| de::Error::custom(format!("`{text}` is not a place in a file")))
    }
}

/// One record.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// Where it was read.
    pub origin: Origin,
    /// What it says.
    pub body: Body,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    /// An instruction and its answer.
    Instruction(Instruction),
    /// A conversation.
    Conversation(Conversation),
    /// A prompt and what comes after it, both verbatim.
    PromptCompletion {
        /// Not trained.
        prompt: String,
        /// Trained, with the end token.
        completion: String,
    },
    /// A better and a worse answer to the same; each side is one of the bodies above, trained on its answer only.
    Preference {
        /// The better one.
        chosen: Box<Body>,
        /// The worse one.
        rejected: Box<Body>,
    },
    /// An answer and whether it is a good one.
    Rated {
        /// One of the bodies above, trained on its answer only.
        answer: Box<Body>,
        /// Whether the answer is a good one.
        desirable: bool,
    },
    /// Running text.
    Text(String),
    /// A text, or a pair of texts, with its label.
    Labelled {
        /// The text.
        text: String,
        /// The second text of a pair.
        text_pair: Option<String>,
        /// A name, an id, a number, or a list of them, as it was written.
        label: Value,
    },
    /// Tokens made elsewhere.
    Tokenized {
        /// The tokens.
        input_ids: Vec<i64>,
        /// For each token itself, or -100 where it is not trained; all are trained when absent.
        labels: Option<Vec<i64>>,
    },
}

impl Body {
    /// The answers of a pair, or the one that is rated; of other records the record itself.
    pub(crate) fn sides(&self) -> Vec<&Self> {
        match self {
            Self::Preference { chosen, rejected } => vec![chosen, rejected],
            Self::Rated { answer, .. } => vec![answer],
            body => vec![body],
        }
    }

    /// About how many bytes it holds.
    pub(crate) fn size(&self) -> usize {
        match self {
            Self::Instruction(of) => of.instruction.len() + of.input.len() + of.output.len(),
            Self::Conversation(of) => of.messages.iter().map(|message| size_of_fields(&message.fields)).sum(),
            Self::PromptCompletion { prompt, completion } => prompt.len() + completion.len(),
            Self::Preference { chosen, rejected } => chosen.size() + rejected.size(),
            Self::Rated { answer, .. } => answer.size(),
            Self::Text(text) => text.len(),
            Self::Labelled { text, text_pair, .. } => text.len() + text_pair.as_ref().map_or(0, String::len),
            Self::Tokenized { input_ids, .. } => input_ids.len() * 16,
        }
    }
}

fn size_of_fields(fields: &Map<String, Value>) -> usize {
    fields.values().map(|value| value.as_str().map_or(64, str::len)).sum()
}

/// An instruction in the layout of the Alpaca dataset.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Instruction {
    /// A system prompt.
    pub system: Option<String>,
    /// Earlier turns: what the user said and what was answered; the answers are trained.
    pub history: Vec<(String, String)>,
    /// What is to be done.
    pub instruction: String,
    /// What it is to be done with; may be empty.
    pub input: String,
    /// The answer.
    pub output: String,
}

impl Instruction {
    /// What the user says: the task, and on the next line its input.
    pub(crate) fn user_text(&self) -> String {
        match (self.instruction.as_str(), self.input.as_str()) {
            (text, "") | ("", text) => text.to_owned(),
            (task, input) => format!("{task}\n{input}"),
        }
    }
}

/// A conversation and the tools that it may use.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    /// The messages in order.
    pub messages: Vec<Message>,
    /// Tool descriptions, handed to the template as they are.
    pub tools: Option<Value>,
}

/// One message: an object with `role` and `content`, and whatever else the template reads.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// The message's fields without the training flag.
    pub fields: Map<String, Value>,
    /// Whether it is trained; when absent, its role decides.
    pub train: Option<bool>,
}

impl Message {
    /// A message of a role with plain content.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        let mut fields = Map::new();
        fields.insert("role".to_owned(), Value::from(role));
        fields.insert("content".to_owned(), Value::from(content.into()));
        Self { fields, train: None }
    }

    /// The message's role.
    pub fn role(&self) -> &str {
        self.fields.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// Whether it is trained where `data.train_roles` names the assistant alone: its own flag, else its role.
    pub fn is_trained(&self) -> bool {
        self.train.unwrap_or_else(|| self.role() == "assistant")
    }

    /// Whether an assistant said nothing: no content, no reasoning, no tool call.
    pub(crate) fn is_empty(&self) -> bool {
        self.fields.iter().filter(|(name, _)| *name != "role" && *name != "name").all(|(_, value)| match value {
            Value::Null => true,
            Value::String(text) => text.is_empty(),
            Value::Array(items) => items.is_empty(),
            _ => false,
        })
    }
}
