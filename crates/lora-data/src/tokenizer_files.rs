//! The files of a checkpoint folder that make its tokenizer.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::error::{DataError, Result};
use crate::strict_json::kind;

/// The largest tokenizers in use have about 35 MB. Read into the library's tables a file takes some ten times its size.
const MAX_FILE_BYTES: u64 = 128 << 20;

/// Files that other tools want beside an adapter, though not all of them are read here.
const COMPANIONS: [&str; 12] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// Reads the files of one folder and keeps a digest over what was read.
pub(crate) struct TokenizerFiles<'a> {
    dir: &'a Path,
    hash: Sha256,
}

impl<'a> TokenizerFiles<'a> {
    pub(crate) fn new(dir: &'a Path) -> Self {
        Self { dir, hash: Sha256::new() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The content of a file, or none when there is no such file.
    pub(crate) fn read(&mut self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.path(name);
        let io = |source| DataError::Io { path: path.clone(), source };
        let size = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(error)),
        };
        if size > MAX_FILE_BYTES {
            return Err(DataError::TokenizerSize { path, size, limit: MAX_FILE_BYTES });
        }
        let bytes = std::fs::read(&path).map_err(io)?;
        self.mix(name.as_bytes());
        self.mix(&bytes);
        Ok(Some(bytes))
    }

    /// A file that holds a JSON object; an absent file is an empty object.
    pub(crate) fn read_object(&mut self, name: &str) -> Result<Map<String, Value>> {
        match self.read(name)? {
            Some(bytes) => parse_object(&bytes, &self.path(name)),
            None => Ok(Map::new()),
        }
    }

    /// The first `eos_token_id` of the model's own configuration, which counts when the tokenizer names no end token.
    pub(crate) fn model_eos_id(&mut self) -> Result<Option<u32>> {
        for name in ["generation_config.json", "config.json"] {
            let path = self.path(name);
            let Ok(bytes) = std::fs::read(&path) else { continue };
            let config = parse_object(&bytes, &path)?;
            let id = match config.get("eos_token_id") {
                Some(Value::Array(ids)) => ids.first().and_then(Value::as_u64),
                Some(value) => value.as_u64(),
                None => None,
            };
            if let Some(id) = id.and_then(|id| u32::try_from(id).ok()) {
                self.mix(b"eos_token_id");
                self.mix(&id.to_le_bytes());
                return Ok(Some(id));
            }
        }
        Ok(None)
    }

    /// Every tokenizer file that lies in the folder, to be copied as it is.
    pub(crate) fn companions(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = COMPANIONS.iter().map(|name| self.path(name)).filter(|p| p.is_file()).collect();
        if let Ok(entries) = std::fs::read_dir(self.path("additional_chat_templates")) {
            let mut templates: Vec<PathBuf> = entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| path.extension().is_some_and(|extension| extension == "jinja"))
                .collect();
            templates.sort();
            files.extend(templates);
        }
        files
    }

    /// SHA-256 over name and content of everything that was read, in hexadecimal.
    pub(crate) fn digest(self) -> String {
        self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn mix(&mut self, bytes: &[u8]) {
        self.hash.update((bytes.len() as u64).to_le_bytes());
        self.hash.update(bytes);
    }
}

fn parse_object(bytes: &[u8], path: &Path) -> Result<Map<String, Value>> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(DataError::TokenizerField {
            path: path.to_owned(),
            field: "(the whole file)".to_owned(),
            wanted: "an object",
            found: kind(&other).to_owned(),
        }),
        Err(source) => Err(DataError::TokenizerJson { path: path.to_owned(), problem: "not valid JSON", source }),
    }
}

/// A `tokenizer.json` as the library is to read it. Early ones do not say of what type their model is, and the library needs
/// to be told. Merges left out at random would make other tokens of the same text each time: what is trained would be
/// neither what was looked at nor what is kept for the next run, so none are.
pub(crate) fn for_library(bytes: Vec<u8>, path: &Path) -> Result<Vec<u8>> {
    #[derive(Deserialize)]
    struct File {
        model: Model,
    }
    #[derive(Deserialize)]
    struct Model {
        r#type: Option<IgnoredAny>,
        merges: Option<IgnoredAny>,
        max_input_chars_per_word: Option<IgnoredAny>,
        unk_id: Option<IgnoredAny>,
        dropout: Option<IgnoredAny>,
    }
    let broken =
        |source| DataError::TokenizerJson { path: path.to_owned(), problem: "not a tokenizer in JSON form", source };
    let model = serde_json::from_slice::<File>(&bytes).map_err(broken)?.model;
    if model.r#type.is_some() && model.dropout.is_none() {
        return Ok(bytes);
    }
    let name = match &model {
        Model { merges: Some(_), .. } => "BPE",
        Model { max_input_chars_per_word: Some(_), .. } => "WordPiece",
        Model { unk_id: Some(_), .. } => "Unigram",
        _ => "WordLevel",
    };
    let mut file: Value = serde_json::from_slice(&bytes).map_err(broken)?;
    if model.r#type.is_none() {
        file["model"]["type"] = Value::from(name);
    }
    if model.dropout.is_some() {
        file["model"]["dropout"] = Value::Null;
    }
    serde_json::to_vec(&file).map_err(broken)
}
