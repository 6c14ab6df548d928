//! What is wrong with a configuration: every fault of it, each with its place, key, value and remedy.

use std::fmt;
use std::path::PathBuf;

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a configuration file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1, where the format tells it (TOML does, YAML does not).
        line: Option<usize>,
    },
    /// On the command line.
    CommandLine,
    /// Nowhere: a default, or a configuration made by a program.
    Program,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { path, line: Some(line) } => write!(f, "{}:{line}: ", path.display()),
            Place::File { path, line: None } => write!(f, "{}: ", path.display()),
            Place::CommandLine => write!(f, "--set: "),
            Place::Program => Ok(()),
        }
    }
}

/// What kind of fault it is.
#[derive(Debug)]
#[non_exhaustive]
pub enum FaultKind {
    /// The file cannot be read.
    Unreadable {
        /// What the system said.
        source: std::io::Error,
    },
    /// The text is not well-formed TOML or YAML.
    Syntax {
        /// What the parser said.
        message: String,
    },
    /// There is no such key.
    UnknownKey {
        /// The key that is probably meant.
        nearest: Option<String>,
    },
    /// The key belongs to PEFT or Hugging Face and asks for something that is not done here.
    Unsupported {
        /// What to do instead.
        why: &'static str,
    },
    /// The value has the wrong type or lies outside what is allowed.
    NotAllowed {
        /// What is allowed.
        allowed: String,
    },
    /// The key must be given.
    Missing {
        /// How to give it.
        remedy: &'static str,
    },
    /// Two keys exclude each other.
    Contradiction {
        /// The other key, with its value.
        with: String,
        /// Which to keep.
        remedy: &'static str,
    },
}

/// One fault of a configuration.
#[derive(Debug)]
pub struct Fault {
    /// Where the value was written.
    pub place: Place,
    /// The key with its sections, as `lora.r`; empty when the fault is the file's.
    pub key: String,
    /// The value as TOML, shortened; `None` when there is none.
    pub value: Option<String>,
    /// What is wrong with it.
    pub kind: FaultKind,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let setting = match &self.value {
            Some(value) => format!("{} = {value}", self.key),
            None => self.key.clone(),
        };
        write!(f, "{}", self.place)?;
        match &self.kind {
            FaultKind::Unreadable { source } => write!(f, "cannot be read: {source}"),
            FaultKind::Syntax { message } => write!(f, "{message}"),
            FaultKind::UnknownKey { nearest: Some(nearest) } => {
                write!(f, "unknown key `{}`; did you mean `{nearest}`?", self.key)
            }
            FaultKind::UnknownKey { nearest: None } => {
                write!(f, "unknown key `{}`; remove it or see the reference of keys", self.key)
            }
            FaultKind::Unsupported { why } => write!(f, "{setting}: {why}"),
            FaultKind::NotAllowed { allowed } => write!(f, "{setting}: must be {allowed}"),
            FaultKind::Missing { remedy } => write!(f, "{} is missing: {remedy}", self.key),
            FaultKind::Contradiction { with, remedy } => write!(f, "{setting} contradicts {with}: {remedy}"),
        }
    }
}

/// All faults of a configuration, in the order of the keys; never empty.
#[derive(Debug)]
pub struct ConfigErrors(pub(crate) Vec<Fault>);

impl ConfigErrors {
    /// The faults.
    pub fn faults(&self) -> &[Fault] {
        &self.0
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [fault] = self.0.as_slice() {
            return write!(f, "{fault}");
        }
        write!(f, "the configuration has {} faults:", self.0.len())?;
        self.0.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
    }
}

impl std::error::Error for ConfigErrors {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.iter().find_map(|fault| match &fault.kind {
            FaultKind::Unreadable { source } => Some(source as _),
            _ => None,
        })
    }
}

/// A value as it is shown in a message: TOML, cut to a length that fits a line.
pub(crate) fn shown(value: &toml::Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text,
    }
}
