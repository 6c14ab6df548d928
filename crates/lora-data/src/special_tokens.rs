//! The special tokens that a tokenizer's side files name, in all the shapes the field writes them.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::error::{DataError, Result};
use crate::strict_json::kind;

/// Named special tokens (`bos_token`, `eos_token`, ...) and where each was found first.
#[derive(Debug, Clone, Default)]
pub(crate) struct SpecialTokens {
    /// Name to text, as templates see them.
    pub(crate) named: BTreeMap<String, String>,
    /// `additional_special_tokens`.
    pub(crate) additional: Vec<String>,
}

impl SpecialTokens {
    /// Adds the tokens of one file; tokens known already stay.
    pub(crate) fn add_from(&mut self, fields: &Map<String, Value>, path: &Path) -> Result<()> {
        for (name, value) in fields.iter().filter(|(name, value)| name.ends_with("_token") && !value.is_null()) {
            // `add_bos_token`, `add_eos_token` and the like are switches, not tokens.
            if value.is_boolean() || self.named.contains_key(name) {
                continue;
            }
            self.named.insert(name.clone(), token_text(name, value, path)?);
        }
        let lists = ["additional_special_tokens", "extra_special_tokens"];
        for value in lists.iter().filter_map(|name| fields.get(*name)?.as_array()).flatten() {
            let token = token_text("additional_special_tokens", value, path)?;
            if !self.additional.contains(&token) {
                self.additional.push(token);
            }
        }
        Ok(())
    }

    /// What templates see: every named token, and the list of the others.
    pub(crate) fn variables(&self) -> BTreeMap<String, Value> {
        let mut variables: BTreeMap<String, Value> =
            self.named.iter().map(|(name, token)| (name.clone(), Value::from(token.clone()))).collect();
        if !self.additional.is_empty() {
            variables.insert("additional_special_tokens".to_owned(), Value::from(self.additional.clone()));
        }
        variables
    }
}

/// A token is a string, or an object with `content`.
fn token_text(name: &str, value: &Value, path: &Path) -> Result<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned).ok_or_else(|| {
        DataError::TokenizerField {
            path: path.to_owned(),
            field: name.to_owned(),
            wanted: "a string or an object with `content`",
            found: kind(value).to_owned(),
        }
    })
}

/// The tokens of `added_tokens_decoder` by id.
pub(crate) fn added_tokens(fields: &Map<String, Value>, path: &Path) -> Result<BTreeMap<u32, AddedToken>> {
    let mut added = BTreeMap::new();
    let entries = fields.get("added_tokens_decoder").and_then(Value::as_object);
    for (id, value) in entries.into_iter().flatten() {
        let field = || format!("added_tokens_decoder.{id}");
        let number = id.parse::<u32>().map_err(|_| DataError::TokenizerField {
            path: path.to_owned(),
            field: field(),
            wanted: "named by a token id",
            found: format!("`{id}`"),
        })?;
        let flag = |name: &str| value.get(name).and_then(Value::as_bool).unwrap_or(false);
        let token = AddedToken::from(token_text(&field(), value, path)?, flag("special"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .single_word(flag("single_word"))
            .normalized(flag("normalized"));
        added.insert(number, token);
    }
    Ok(added)
}
