//! A byte-level BPE vocabulary, learnt from the demo's own text, as a `tokenizer.json`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

pub const PAD: &str = "<pad>";
pub const BOS: &str = "<s>";
pub const EOS: &str = "</s>";
const SPECIAL: [&str; 3] = [PAD, BOS, EOS];

/// A merge of two tokens into one.
type Pair = (u32, u32);

/// Tokens in the order of their ids, and the merges in the order of their rank.
pub struct Vocabulary {
    tokens: Vec<String>,
    merges: Vec<Pair>,
}

impl Vocabulary {
    /// Merges the most frequent pair of neighbours until there are `size` tokens; of equals, the pair with lower ids.
    pub fn learn<'a>(texts: impl Iterator<Item = &'a str>, size: usize) -> Self {
        let letters = byte_letters();
        let mut tokens: Vec<String> = SPECIAL.iter().map(|token| (*token).to_owned()).collect();
        let first = tokens.len() as u32;
        tokens.extend(letters.iter().map(char::to_string));
        let mut words: BTreeMap<&str, u64> = BTreeMap::new();
        texts.flat_map(split).for_each(|word| *words.entry(word).or_default() += 1);
        let mut words: Vec<(Vec<u32>, u64)> =
            words.into_iter().map(|(word, n)| (word.bytes().map(|b| first + u32::from(b)).collect(), n)).collect();
        let mut merges = Vec::new();
        while tokens.len() < size {
            let mut counts: BTreeMap<Pair, u64> = BTreeMap::new();
            for (ids, n) in &words {
                ids.windows(2).for_each(|w| *counts.entry((w[0], w[1])).or_default() += n);
            }
            let Some((&pair, _)) = counts.iter().rev().max_by_key(|(_, n)| **n) else { break };
            let merged = tokens.len() as u32;
            tokens.push(format!("{}{}", tokens[pair.0 as usize], tokens[pair.1 as usize]));
            merges.push(pair);
            words.iter_mut().for_each(|(ids, _)| merge(ids, pair, merged));
        }
        Self { tokens, merges }
    }

    /// The id of a token.
    pub fn id(&self, token: &str) -> Option<usize> {
        self.tokens.iter().position(|t| t == token)
    }

    /// The file that Hugging Face's libraries read.
    pub fn tokenizer_json(&self) -> Value {
        let vocab: Map<String, Value> = self.tokens.iter().enumerate().map(|(id, t)| (t.clone(), json!(id))).collect();
        let text = |id: u32| &self.tokens[id as usize];
        let merges: Vec<Value> = self.merges.iter().map(|(a, b)| json!([text(*a), text(*b)])).collect();
        let added: Vec<Value> = SPECIAL
            .iter()
            .enumerate()
            .map(|(id, token)| {
                json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": true})
            })
            .collect();
        let bos = json!({"SpecialToken": {"id": BOS, "type_id": 0}});
        let sequence = |id: &str, kind: u8| json!({"Sequence": {"id": id, "type_id": kind}});
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, sequence("A", 0)],
                "pair": [bos, sequence("A", 0), sequence("B", 1)],
                "special_tokens": {BOS: {"id": BOS, "ids": [self.id(BOS)], "tokens": [BOS]}},
            },
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": merges,
            },
        })
    }
}

/// Replaces every `pair` from left to right.
fn merge(ids: &mut Vec<u32>, pair: Pair, merged: u32) {
    let (mut from, mut to) = (0, 0);
    while from < ids.len() {
        let here = from + 1 < ids.len() && (ids[from], ids[from + 1]) == pair;
        ids[to] = if here { merged } else { ids[from] };
        from += if here { 2 } else { 1 };
        to += 1;
    }
    ids.truncate(to);
}

/// The letters that stand for the 256 bytes in GPT-2's vocabularies: printable ones for themselves, the others moved up.
fn byte_letters() -> Vec<char> {
    let mut moved = 0;
    (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => {
                moved += 1;
                char::from_u32(255 + moved).unwrap_or('?')
            }
        })
        .collect()
}

/// Cuts text as the pre-tokenizer `ByteLevel` cuts text that has single spaces and no apostrophes: a space goes with the
/// run of letters, digits or signs behind it.
fn split(text: &str) -> Vec<&str> {
    #[derive(PartialEq)]
    enum Run {
        Letters,
        Digits,
        Space,
        Signs,
    }
    let run = |c: char| match c {
        c if c.is_alphabetic() => Run::Letters,
        c if c.is_numeric() => Run::Digits,
        c if c.is_whitespace() => Run::Space,
        _ => Run::Signs,
    };
    let mut words = Vec::new();
    let (mut start, mut last) = (0, None);
    for (at, c) in text.char_indices() {
        let joins = last.is_none_or(|l| run(l) == run(c) || (l == ' ' && start + 1 == at && run(c) != Run::Space));
        if !joins {
            words.push(&text[start..at]);
            start = at;
        }
        last = Some(c);
    }
    if start < text.len() {
        words.push(&text[start..]);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tokens of a text.
    fn encode(vocabulary: &Vocabulary, text: &str) -> Vec<u32> {
        let encode_word = |word: &str| {
            let mut ids: Vec<u32> = word.bytes().map(|b| SPECIAL.len() as u32 + u32::from(b)).collect();
            for (rank, pair) in vocabulary.merges.iter().enumerate() {
                merge(&mut ids, *pair, (SPECIAL.len() + 256 + rank) as u32);
            }
            ids
        };
        split(text).into_iter().flat_map(encode_word).collect()
    }

    #[test]
    fn text_is_cut_as_gpt2_cuts_it() {
        assert_eq!(
            split("name: The Fox | a café, \"so\" 12.\n"),
            ["name", ":", " The", " Fox", " |", " a", " café", ",", " \"", "so", "\"", " 12", ".", "\n"]
        );
    }

    #[test]
    fn the_most_frequent_pair_is_merged_first() {
        let size = SPECIAL.len() + 256 + 2;
        let vocabulary = Vocabulary::learn(["abab abab", "ab xy"].into_iter(), size);
        assert_eq!(vocabulary.tokens[size - 2..], ["ab".to_owned(), "abab".to_owned()]);
        let ids = encode(&vocabulary, "ababab");
        assert_eq!(ids, [size as u32 - 1, size as u32 - 2]);
    }

    #[test]
    fn bytes_have_the_letters_of_gpt2() {
        let letters = byte_letters();
        assert_eq!((letters[b' ' as usize], letters[b'\n' as usize], letters[b'a' as usize]), ('Ġ', 'Ċ', 'a'));
        let distinct: std::collections::BTreeSet<_> = letters.iter().collect();
        assert_eq!(distinct.len(), 256);
    }

    #[test]
    fn the_file_gives_every_token_its_id() {
        let vocabulary = Vocabulary::learn(["the old mill and the old bridge"].into_iter(), 270);
        let file = vocabulary.tokenizer_json();
        assert_eq!(file["model"]["vocab"].as_object().unwrap().len(), 270);
        assert_eq!(file["model"]["merges"].as_array().unwrap().len(), 270 - 256 - SPECIAL.len());
        assert_eq!(file["model"]["vocab"]["Ġold"], json!(vocabulary.id("Ġold").unwrap()));
        assert_eq!(vocabulary.id(EOS), Some(2));
    }
}
