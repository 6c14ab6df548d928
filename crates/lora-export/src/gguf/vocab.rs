//! The tokenizer of a checkpoint as GGUF's metadata.

use super::arch::refuse;
use crate::error::Result;
use lora_format::{GgufValue, HfConfig, read_json_object};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// What a token is, by GGUF's numbers.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The metadata of the tokenizer in `dir` for a table of `rows` rows, and the chat template.
///
/// # Errors
/// [`crate::Error::Gguf`] for a tokenizer that llama.cpp has no form of; [`crate::Error::Format`] for files that are broken.
pub(crate) fn metadata(dir: &Path, c: &HfConfig) -> Result<Vec<(String, GgufValue)>> {
    let path = dir.join("tokenizer.json");
    let file = read_json_object(&path)?;
    let settings = dir.join("tokenizer_config.json");
    let settings = if settings.is_file() { read_json_object(&settings)? } else { Map::new() };
    let model = file.get("model").and_then(Value::as_object).cloned().unwrap_or_default();
    // GPT-2's own file is older than the key that says so.
    if model.get("type").is_some_and(|t| t != "BPE") || !model.contains_key("merges") {
        return Err(refuse(&path, "only BPE tokenizers have a GGUF form here".into()));
    }
    let merges = merges(&path, &model)?;
    let table = Table::read(&path, &file, &model, c.vocab_size)?;
    let byte_fallback = model.get("byte_fallback").and_then(Value::as_bool) == Some(true);
    let mut list = Vec::new();
    let mut put = |key: &str, value| list.push((format!("tokenizer.{key}"), value));
    if byte_fallback {
        put("ggml.model", GgufValue::Text("llama".into()));
        put("ggml.pre", GgufValue::Text("default".into()));
        put("ggml.scores", GgufValue::F32s(scores(&table.tokens, &merges)));
        put("ggml.add_space_prefix", GgufValue::Bool(prepends_space(&file)));
    } else {
        put("ggml.model", GgufValue::Text("gpt2".into()));
        put("ggml.pre", GgufValue::Text(pre_tokenizer(&path, &file)?.into()));
        put("ggml.merges", GgufValue::Texts(merges.iter().map(|(a, b)| format!("{a} {b}")).collect()));
    }
    put("ggml.token_type", GgufValue::I32s(table.kinds));
    let id = |key: &str| -> Option<u32> {
        let token = settings.get(key)?;
        let content = token.as_str().or_else(|| token.get("content")?.as_str())?;
        table.tokens.iter().position(|t| t == content).and_then(|i| u32::try_from(i).ok())
    };
    let small = |id: i64| u32::try_from(id).ok();
    let bos = id("bos_token").or_else(|| c.bos_token_id.and_then(small));
    let eos = id("eos_token").or_else(|| c.eos_token_ids.first().copied().and_then(small));
    for (key, value) in [
        ("bos", bos),
        ("eos", eos),
        ("unknown", id("unk_token")),
        ("padding", id("pad_token").or_else(|| c.pad_token_id.and_then(small))),
    ] {
        if let Some(value) = value {
            put(&format!("ggml.{key}_token_id"), GgufValue::U32(value));
        }
    }
    let begins = begins_with_special(&file);
    let flag = |key: &str, default| settings.get(key).and_then(Value::as_bool).unwrap_or(default);
    put("ggml.add_bos_token", GgufValue::Bool(bos.is_some() && flag("add_bos_token", begins)));
    put("ggml.add_eos_token", GgufValue::Bool(flag("add_eos_token", false)));
    if let Some(template) = chat_template(dir, &settings)? {
        put("chat_template", GgufValue::Text(template));
    }
    put("ggml.tokens", GgufValue::Texts(table.tokens));
    Ok(list)
}

/// The pairs in the order in which they are merged, from either form of the file.
fn merges(path: &Path, model: &Map<String, Value>) -> Result<Vec<(String, String)>> {
    let one = |merge: &Value| match merge {
        Value::String(pair) => pair.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string())),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(a), Value::String(b)] => Some((a.clone(), b.clone())),
            _ => None,
        },
        _ => None,
    };
    let list = model.get("merges").and_then(Value::as_array).into_iter().flatten();
    list.map(|merge| one(merge).ok_or_else(|| refuse(path, format!("model.merges has {merge}, which is no pair"))))
        .collect()
}

/// The tokens by id.
struct Table {
    tokens: Vec<String>,
    kinds: Vec<i32>,
}

impl Table {
    fn read(path: &Path, file: &Map<String, Value>, model: &Map<String, Value>, rows: i64) -> Result<Self> {
        let mut by_id: BTreeMap<i64, (String, i32)> = BTreeMap::new();
        let unknown = model.get("unk_token").and_then(Value::as_str);
        let byte = |t: &str| t.len() == 6 && t.starts_with("<0x") && t.ends_with('>');
        for (token, id) in model.get("vocab").and_then(Value::as_object).into_iter().flatten() {
            let kind = match token.as_str() {
                t if Some(t) == unknown => UNKNOWN,
                t if byte(t) => BYTE,
                _ => NORMAL,
            };
            by_id.insert(id.as_i64().unwrap_or(-1), (token.clone(), kind));
        }
        for added in file.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            let (Some(id), Some(token)) = (added["id"].as_i64(), added["content"].as_str()) else { continue };
            let kind = match added["special"].as_bool() {
                _ if Some(token) == unknown => UNKNOWN,
                Some(true) => CONTROL,
                _ => USER_DEFINED,
            };
            by_id.insert(id, (token.to_string(), kind));
        }
        if let Some((id, (token, _))) = by_id.iter().find(|(id, _)| !(0..rows).contains(*id)) {
            return Err(refuse(path, format!("token {token:?} has the id {id}, and the model has {rows} rows")));
        }
        // Rows of the model that no token has.
        let row = |id: i64| by_id.remove(&id).unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED));
        let (tokens, kinds) = (0..rows).map(row).unzip();
        Ok(Self { tokens, kinds })
    }
}

/// SentencePiece merges what scores highest, so a token scores by the rank of the first merge that makes it; what no merge
/// makes scores below all.
fn scores(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
    for (rank, (a, b)) in merges.iter().enumerate() {
        ranks.entry(format!("{a}{b}")).or_insert(rank);
    }
    let last = merges.len() as f32 + 1.0;
    tokens.iter().map(|t| ranks.get(t).map_or(-last, |rank| -(*rank as f32) - 1.0)).collect()
}

/// Whether a space is put before the text.
fn prepends_space(file: &Map<String, Value>) -> bool {
    let text = |key: &str| file.get(key).map(Value::to_string).unwrap_or_default();
    let scheme = text("pre_tokenizer");
    text("normalizer").contains("\"Prepend\"") || scheme.contains("\"always\"") || scheme.contains("\"first\"")
}

/// Whether the tokenizer puts a special token first.
fn begins_with_special(file: &Map<String, Value>) -> bool {
    let processor = file.get("post_processor").cloned().unwrap_or_default();
    let parts = [&processor].into_iter().chain(processor["processors"].as_array().into_iter().flatten());
    parts.into_iter().any(|p| p["single"][0].get("SpecialToken").is_some())
}

/// llama.cpp's name of the way that a text is split before it is merged.
fn pre_tokenizer(path: &Path, file: &Map<String, Value>) -> Result<&'static str> {
    let text = file.get("pre_tokenizer").map(Value::to_string).unwrap_or_default();
    let splits = text.contains("\"Split\"");
    if splits && text.contains(r"\\p{N}{1,3}") {
        return Ok("llama-bpe");
    }
    if splits && text.contains(r"\\p{N}|") {
        return Ok("qwen2");
    }
    if !splits && text.contains("ByteLevel") {
        return Ok("gpt-2");
    }
    Err(refuse(path, "its pre_tokenizer is none that llama.cpp is known to have".into()))
}

fn chat_template(dir: &Path, settings: &Map<String, Value>) -> Result<Option<String>> {
    let path = dir.join("chat_template.jinja");
    if path.is_file() {
        let text = std::fs::read_to_string(&path).map_err(|e| crate::Error::io("read", &path, e))?;
        return Ok(Some(text));
    }
    Ok(match settings.get("chat_template") {
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Array(list)) => {
            let default = list.iter().find(|t| t["name"] == "default").or(list.first());
            default.and_then(|t| t["template"].as_str()).map(str::to_string)
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn scores_fall_with_the_rank_of_the_first_merge() {
        let merges = [("a", "b"), ("ab", "c"), ("a", "bc")].map(|(a, b)| (a.to_string(), b.to_string()));
        let tokens = ["a", "ab", "abc", "<s>"].map(String::from);
        assert_eq!(scores(&tokens, &merges), [-4.0, -1.0, -2.0, -4.0]);
    }

    #[test]
    fn tokens_lie_by_id_and_gaps_are_filled() {
        let file = object(json!({"added_tokens": [
            {"id": 3, "content": "<s>", "special": true}, {"id": 2, "content": "new", "special": false}]}));
        let model = object(json!({"vocab": {"a": 1, "<unk>": 0, "<0x41>": 4}, "unk_token": "<unk>"}));
        let table = Table::read(Path::new("t"), &file, &model, 7).unwrap();
        assert_eq!(table.tokens, ["<unk>", "a", "new", "<s>", "<0x41>", "[PAD5]", "[PAD6]"]);
        assert_eq!(table.kinds, [UNKNOWN, NORMAL, USER_DEFINED, CONTROL, BYTE, UNUSED, UNUSED]);
        assert!(Table::read(Path::new("t"), &file, &model, 4).is_err());
    }

    #[test]
    fn ways_of_splitting_are_told_apart() {
        let of = |value: Value| pre_tokenizer(Path::new("t"), &object(json!({"pre_tokenizer": value})));
        let split = |regex: &str| json!({"pretokenizers": [{"type": "Split", "pattern": {"Regex": regex}}, {"type": "ByteLevel"}]});
        assert_eq!(of(split(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+")).unwrap(), "llama-bpe");
        assert_eq!(of(split(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?\s+")).unwrap(), "qwen2");
        assert_eq!(of(json!({"type": "ByteLevel", "use_regex": true})).unwrap(), "gpt-2");
        assert!(of(split("x")).is_err() && of(Value::Null).is_err());
    }
}
