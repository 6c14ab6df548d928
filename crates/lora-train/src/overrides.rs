//! Settings from the command line, which go before those of the configuration's file.

use crate::config::{ConfigErrors, Fault, FaultKind, Place, Places, key};
use std::str::FromStr;
use toml::{Table, Value};

/// One setting, as `train.learning_rate=1e-4`.
#[derive(Clone, Debug, PartialEq)]
pub struct Override {
    path: Vec<String>,
    text: String,
    value: Value,
}

/// Of each pair at most one key may be set, so setting one drops the other of the file.
const EITHER: &[(&str, &str)] =
    &[("train.max_steps", "train.num_train_epochs"), ("train.warmup_steps", "train.warmup_ratio")];

impl Override {
    /// A setting whose value is this text as it stands, as a path from a flag is.
    pub fn text(key: &str, value: impl Into<String>) -> Self {
        let text = value.into();
        Self { path: key.split('.').map(str::to_string).collect(), value: Value::String(text.clone()), text }
    }

    /// The key, dotted.
    pub fn key(&self) -> String {
        self.path.join(".")
    }
}

impl FromStr for Override {
    type Err = ConfigErrors;

    /// Reads `KEY=VALUE`. The value is TOML (`1e-4`, `true`, `["q_proj", "v_proj"]`), and a text where it is not TOML. The
    /// key is dotted; a part with a dot in it is quoted, as in `lora.rank_pattern."layers.0"=4`.
    fn from_str(setting: &str) -> Result<Self, ConfigErrors> {
        let fault = |message: String| {
            ConfigErrors(vec![Fault {
                place: Place::CommandLine,
                key: String::new(),
                value: None,
                kind: FaultKind::Syntax { message },
            }])
        };
        let (key, text) = split(setting).ok_or_else(|| fault(format!("`{setting}` must have the form KEY=VALUE")))?;
        let path =
            key_path(key).ok_or_else(|| fault(format!("`{key}` is not a key; write it as train.learning_rate")))?;
        let text = text.trim();
        let value = text.parse().unwrap_or_else(|_| Value::String(text.to_string()));
        Ok(Self { path, text: text.to_string(), value })
    }
}

/// The parts around the first `=` outside quotes.
fn split(setting: &str) -> Option<(&str, &str)> {
    let mut quote = None;
    for (i, c) in setting.char_indices() {
        match (quote, c) {
            (None, '=') => return Some((&setting[..i], &setting[i + 1..])),
            (None, '"' | '\'') => quote = Some(c),
            (Some(open), _) if c == open => quote = None,
            _ => {}
        }
    }
    None
}

/// The parts of a dotted key, by TOML's own rules.
fn key_path(key: &str) -> Option<Vec<String>> {
    if key.contains(['\n', '\r', '#', '[', ']']) {
        return None;
    }
    let mut table: Table = toml::from_str(&format!("{key} = 0")).ok()?;
    let mut path = Vec::new();
    loop {
        let (name, value) = table.into_iter().next()?;
        path.push(name);
        match value {
            Value::Table(inner) => table = inner,
            _ => return Some(path),
        }
    }
}

/// Puts the settings into a tree and notes that they come from the command line.
pub(crate) fn apply(overrides: &[Override], tree: &mut Table, places: &mut Places) -> Result<(), ConfigErrors> {
    let mut faults = Vec::new();
    for setting in overrides {
        if let Err(kind) = put(tree, setting) {
            faults.push(Fault {
                place: Place::CommandLine,
                key: setting.key(),
                value: Some(setting.value.to_string()),
                kind,
            });
        }
        places.on_command_line.insert(setting.key());
    }
    for (one, other) in EITHER.iter().flat_map(|&(a, b)| [(a, b), (b, a)]) {
        if places.on_command_line.contains(one)
            && !places.on_command_line.contains(other)
            && let Some((section, name)) = other.split_once('.')
        {
            tree.get_mut(section).and_then(Value::as_table_mut).and_then(|table| table.remove(name));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(ConfigErrors(faults)) }
}

fn put(tree: &mut Table, setting: &Override) -> Result<(), FaultKind> {
    let Some((last, sections)) = setting.path.split_last() else { return Ok(()) };
    let mut table = tree;
    for section in sections {
        let inner = table.entry(section.clone()).or_insert_with(|| Value::Table(Table::new()));
        table = inner.as_table_mut().ok_or_else(|| FaultKind::NotAllowed {
            allowed: format!("set as a whole: `{section}` is not a section"),
        })?;
    }
    let is_text = key(&setting.key()).is_some_and(|key| key.kind.is_text()) && !setting.value.is_str();
    let value = if is_text { Value::String(setting.text.clone()) } else { setting.value.clone() };
    table.insert(last.clone(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(setting: &str) -> (Vec<String>, Value) {
        let o: Override = setting.parse().unwrap();
        (o.path, o.value)
    }

    #[test]
    fn values_are_toml_or_text() {
        assert_eq!(
            parsed("train.learning_rate=1e-4"),
            (vec!["train".into(), "learning_rate".into()], Value::Float(1e-4))
        );
        assert_eq!(parsed("lora.r = 16").1, Value::Integer(16));
        assert_eq!(parsed("model.path=/base/model=1").1, Value::String("/base/model=1".into()));
        assert_eq!(parsed("lora.target_modules=[\"q_proj\"]").1, Value::Array(vec!["q_proj".into()]));
        assert_eq!(parsed("output_dir=").1, Value::String(String::new()));
        assert_eq!(parsed("lora.rank_pattern.\"layers.0=x\"=4").0, vec!["lora", "rank_pattern", "layers.0=x"]);
    }

    #[test]
    fn what_is_not_a_setting_is_refused() {
        for wrong in ["", "lora.r", "=3", "a b=3", "lora.=3", "x\ny=3", "[lora]\nr=3"] {
            let e = wrong.parse::<Override>().unwrap_err().to_string();
            assert!(e.starts_with("--set: "), "{wrong}: {e}");
        }
    }
}
