//! The reference of keys, made from the same table that checks them.

use super::keys::Key;
use super::{ObjectiveConfig, RunConfig, SECTIONS, SourceConfig, TOP_KEYS, WatchConfig};
use toml::{Table, Value};

const REQUIRED: &[&str] = &["output_dir", "model.path", "data.train", "path"];

pub(crate) fn reference() -> String {
    let mut defaults = Table::try_from(RunConfig::default()).unwrap_or_default();
    // Written where it is not the usual one only.
    if let Ok(objective) = Value::try_from(ObjectiveConfig::default()) {
        defaults.insert("objective".into(), objective);
    }
    if let Ok(watch) = Value::try_from(WatchConfig::default()) {
        defaults.insert("watch".into(), watch);
    }
    let mut text = String::from(
        "Relative paths are relative to the current folder. A key without a default may be left out unless it is required.\n",
    );
    table(&mut text, "Top level", "", TOP_KEYS, Some(&defaults));
    for (section, keys) in SECTIONS {
        let defaults = defaults.get(*section).and_then(Value::as_table);
        table(&mut text, &format!("`[{section}]`"), &format!("{section}."), keys, defaults);
    }
    table(&mut text, "A table of `data.train`, `data.eval` and `data.replay`", "", SourceConfig::KEYS, None);
    text
}

fn table(text: &mut String, title: &str, prefix: &str, keys: &[Key], defaults: Option<&Table>) {
    text.push_str(&format!("\n## {title}\n\n| key | default | allowed | meaning |\n| --- | --- | --- | --- |\n"));
    for Key { name, kind, doc } in keys {
        let key = format!("{prefix}{name}");
        let default = match defaults.and_then(|d| d.get(*name)) {
            _ if REQUIRED.contains(&key.as_str()) => "required".to_string(),
            Some(value) => format!("`{value}`"),
            None => String::new(),
        };
        let doc = doc.trim().replace('|', "\\|");
        text.push_str(&format!("| `{key}` | {default} | {} | {doc} |\n", kind.allowed().replace('|', "\\|")));
    }
}
