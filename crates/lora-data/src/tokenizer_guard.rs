//! What a tokenizer's own rules could make of a text, before they are let loose on one.
//!
//! `tokenizer.json` is data from elsewhere, and some of its rules write: a dozen replacements of one letter by ten would
//! make a terabyte of it. How much longer a text can become is reckoned from the rules, and a text that could become
//! larger than memory is refused. The rules of real tokenizers make a text a few times as long, on paper.

use serde_json::Value;

use crate::error::{DataError, Result};
use std::path::Path;

/// Bytes that a text may become; and so many times its length in any case, as the rules of real tokenizers may ask for.
const MAX_BYTES: u64 = 1 << 30;
const ALWAYS: u64 = 128;
/// Special tokens around one text.
const MAX_AROUND: usize = 4096;

/// How many times as long a text can become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Growth {
    encoding: u64,
    decoding: u64,
}

impl Growth {
    /// From the rules of a tokenizer, as its file spells them.
    pub(crate) fn of(inner: &tokenizers::Tokenizer) -> Self {
        let spelt = |rules: serde_json::Result<Value>| of_rules(&rules.unwrap_or_default());
        Self {
            encoding: inner.get_normalizer().map_or(1, |rules| spelt(serde_json::to_value(rules))),
            decoding: inner.get_decoder().map_or(1, |rules| spelt(serde_json::to_value(rules))),
        }
    }

    /// # Errors
    /// [`DataError::TextGrowth`] for a text of so many bytes that might become too long.
    pub(crate) fn check_encoding(self, bytes: usize) -> Result<()> {
        check("normalizer", self.encoding, bytes)
    }

    /// The same for tokens that become text. Their bytes are counted only where the rules are out of the ordinary.
    pub(crate) fn check_decoding(self, bytes: impl FnOnce() -> usize) -> Result<()> {
        if self.decoding <= ALWAYS { Ok(()) } else { check("decoder", self.decoding, bytes()) }
    }
}

fn check(field: &'static str, times: u64, bytes: usize) -> Result<()> {
    let limit = MAX_BYTES.max(ALWAYS.saturating_mul(bytes as u64));
    if times.saturating_mul(bytes as u64) > limit {
        return Err(DataError::TextGrowth { field, times, bytes, limit });
    }
    Ok(())
}

/// Refuses a post-processor that puts more around a text than any real one; it is told how many tokens it adds.
pub(crate) fn check_around(path: &Path, tokens: usize) -> Result<()> {
    if tokens > MAX_AROUND {
        return Err(DataError::TokensAround { path: path.to_owned(), tokens, limit: MAX_AROUND });
    }
    Ok(())
}

/// How many times as many bytes a rule, or a sequence of rules, can make of a text; never less than 1.
fn of_rules(rules: &Value) -> u64 {
    let length = |key: &str| rules[key].as_str().map_or(0, str::len) as u64;
    match rules["type"].as_str().unwrap_or_default() {
        "Sequence" => {
            let all = ["normalizers", "decoders"].iter().filter_map(|key| rules[key].as_array()).flatten();
            all.map(of_rules).fold(1, u64::saturating_mul)
        }
        "Replace" => match rules["pattern"]["String"].as_str() {
            Some(pattern) if !pattern.is_empty() => length("content").div_ceil(pattern.len() as u64).max(1),
            // A pattern may match before every character.
            _ => 1 + length("content"),
        },
        "Prepend" => 1 + length("prepend"),
        "Precompiled" => longest_replacement(rules["precompiled_charsmap"].as_str().unwrap_or_default()),
        // One character is written as 18 in the longest case.
        "NFKC" | "NFKD" => 18,
        // A space on either side of a character; accents are taken apart.
        "BertNormalizer" => 12,
        "NFC" | "NFD" | "Lowercase" | "ByteLevel" | "Metaspace" => 4,
        _ => 1,
    }
}

/// The longest text that SentencePiece's table of replacements writes for one character: behind a trie, whose length in
/// bytes comes first, lie the texts, each with a zero at its end.
fn longest_replacement(table: &str) -> u64 {
    use base64::Engine;
    let Ok(bytes) = base64::engine::general_purpose::STANDARD.decode(table) else { return 1 };
    let Some((size, rest)) = bytes.split_first_chunk::<4>() else { return 1 };
    let texts = rest.get(u32::from_le_bytes(*size) as usize..).unwrap_or_default();
    texts.split(|byte| *byte == 0).map(|text| text.len() as u64).max().unwrap_or(1).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn replace(pattern: Value, content: &str) -> Value {
        json!({"type": "Replace", "pattern": pattern, "content": content})
    }

    #[test]
    fn rules_multiply() {
        assert_eq!(of_rules(&Value::Null), 1);
        assert_eq!(of_rules(&replace(json!({"String": " "}), "▁")), 3);
        assert_eq!(of_rules(&replace(json!({"String": "abc"}), "")), 1);
        assert_eq!(of_rules(&replace(json!({"String": ""}), "ab")), 3);
        assert_eq!(of_rules(&replace(json!({"Regex": "x*"}), "ab")), 3);
        let doubled = replace(json!({"String": "a"}), "aa");
        let all = |n: usize| json!({"type": "Sequence", "normalizers": vec![doubled.clone(); n]});
        assert_eq!(of_rules(&all(10)), 1024);
        assert_eq!(of_rules(&all(100)), u64::MAX, "and stays there");
        let llama = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            replace(json!({"String": " "}), "▁")]});
        assert_eq!(of_rules(&llama), 12);
    }

    #[test]
    fn a_table_is_as_long_as_its_longest_text() {
        use base64::Engine;
        let table = [&4_u32.to_le_bytes()[..], b"TRIE", b"ab\0abcdef\0c\0"].concat();
        let table = base64::engine::general_purpose::STANDARD.encode(table);
        assert_eq!(of_rules(&json!({"type": "Precompiled", "precompiled_charsmap": table})), 6);
        assert_eq!(of_rules(&json!({"type": "Precompiled", "precompiled_charsmap": "AA"})), 1);
    }

    #[test]
    fn a_text_is_refused_for_what_it_could_become() {
        let of = |encoding| Growth { encoding, decoding: 1 };
        of(100).check_encoding(64 << 20).unwrap();
        of(1 << 20).check_encoding(1000).unwrap();
        let message = of(1 << 20).check_encoding(2000).unwrap_err().to_string();
        assert!(message.contains("normalizer") && message.contains("2000"), "{message}");
        of(1 << 40).check_decoding(|| unreachable!("nothing is counted for rules of one")).unwrap();
        let writes = Growth { encoding: 1, decoding: 1 << 20 };
        writes.check_decoding(|| 1000).unwrap();
        assert!(writes.check_decoding(|| 2000).unwrap_err().to_string().contains("decoder"));
        check_around(Path::new("t"), 4).unwrap();
        assert!(check_around(Path::new("t"), 5000).is_err());
    }
}
