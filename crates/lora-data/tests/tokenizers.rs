//! Tokenizers in all the shapes that checkpoints have, and text that comes token by token.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{chain, copied_tokenizer, fixture, tokenizer};
use lora_data::{Example, Origin, StreamDecoder, Tokenizer, preview};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

#[test]
fn loads_the_fixture() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode("<|im_start|>a<|im_end|>", false).unwrap();
    assert_eq!((ids[0], ids[2]), (3, 4));
    assert_eq!(tokenizer.eos_token_id(), Some(4));
    assert_eq!(tokenizer.bos_token_id(), Some(1));
    assert_eq!(tokenizer.pad_token_id(), Some(0));
    assert!(tokenizer.is_special(4) && tokenizer.is_special(0) && !tokenizer.is_special(ids[1]));
    assert_eq!(tokenizer.token(4).as_deref(), Some("<|im_end|>"));
    assert_eq!(tokenizer.token(99_999), None);
    assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
    assert!(tokenizer.template().is_some());
    assert_eq!(tokenizer.digest().len(), 64);
    let names: Vec<_> = tokenizer.files().iter().map(|f| f.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]);
}

#[test]
fn a_model_without_type_loads_the_same() {
    let (_folder, old) = copied_tokenizer(|dir| {
        edit(&dir.join("tokenizer.json"), |file| {
            file["model"].as_object_mut().unwrap().shift_remove("type").unwrap();
        });
    });
    let (old, new) = (old.unwrap(), tokenizer());
    let text = "Some text, é 🦀 <|im_end|>\n";
    assert_eq!(old.encode(text, true).unwrap(), new.encode(text, true).unwrap());
    assert_ne!(old.digest(), new.digest());
}

#[test]
fn merges_are_never_left_out_at_random() {
    let (_folder, random) = copied_tokenizer(|dir| {
        edit(&dir.join("tokenizer.json"), |file| file["model"]["dropout"] = json!(0.9));
    });
    let text = "some words that are merged in several steps";
    assert_eq!(random.unwrap().encode(text, false).unwrap(), tokenizer().encode(text, false).unwrap());
}

/// Rules that would make terabytes of a line, and more tokens than there is memory for: refused, not tried.
#[test]
fn rules_that_blow_a_text_up_are_refused() {
    let tenfold = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"});
    let rules = |kind: &str, list: &str| json!({"type": "Sequence", list: vec![tenfold.clone(); 12], "kind": kind});
    let (_folder, writes) = copied_tokenizer(|dir| {
        edit(&dir.join("tokenizer.json"), |file| file["normalizer"] = rules("n", "normalizers"));
    });
    let message = writes.unwrap().encode("a", false).unwrap_err().to_string();
    assert!(message.contains("`normalizer`") && message.contains("1000000000000 times"), "{message}");
    let (_folder, speaks) = copied_tokenizer(|dir| {
        edit(&dir.join("tokenizer.json"), |file| file["decoder"] = rules("d", "decoders"));
    });
    let speaks = speaks.unwrap();
    let message = speaks.decode(&speaks.encode("a", false).unwrap(), false).unwrap_err().to_string();
    assert!(message.contains("`decoder`"), "{message}");
    let many = 3000;
    let (_folder, around) = copied_tokenizer(|dir| {
        edit(&dir.join("tokenizer.json"), |file| {
            let piece = json!({"SpecialToken": {"id": "S", "type_id": 0}});
            let tokens = json!({"S": {"id": "S", "ids": vec![1; many], "tokens": vec!["<s>"; many]}});
            let single = [vec![piece; many], vec![json!({"Sequence": {"id": "A", "type_id": 0}})]].concat();
            file["post_processor"] =
                json!({"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens});
        });
    });
    let message = around.err().unwrap().to_string();
    assert!(message.contains("post_processor") && message.contains("9000000 tokens"), "{message}");
}

#[test]
fn truncation_and_padding_of_the_file_are_ignored() {
    let (_folder, cut) = copied_tokenizer(|dir| {
        edit(&dir.join("tokenizer.json"), |file| {
            file["truncation"] =
                json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
            file["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"});
        });
    });
    let text = "a text of some words";
    assert_eq!(cut.unwrap().encode(text, true).unwrap(), tokenizer().encode(text, true).unwrap());
}

#[test]
fn special_tokens_come_from_wherever_they_stand() {
    // As objects, and from the map when the configuration is silent.
    let (_folder, loaded) = copied_tokenizer(|dir| {
        let config =
            json!({"bos_token": {"content": "<s>", "special": true}, "add_eos_token": false, "pad_token": null});
        std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
        std::fs::write(dir.join("special_tokens_map.json"), json!({"eos_token": "</s>"}).to_string()).unwrap();
    });
    let loaded = loaded.unwrap();
    assert_eq!((loaded.bos_token_id(), loaded.eos_token_id(), loaded.pad_token_id()), (Some(1), Some(2), None));

    // From the model's configuration, the generation's first.
    let (_folder, loaded) = copied_tokenizer(|dir| {
        std::fs::write(dir.join("tokenizer_config.json"), "{}").unwrap();
        std::fs::write(dir.join("generation_config.json"), r#"{"eos_token_id": [4, 2]}"#).unwrap();
        std::fs::write(dir.join("config.json"), r#"{"eos_token_id": 2}"#).unwrap();
    });
    assert_eq!(loaded.unwrap().eos_token_id(), Some(4));

    // Tokens that only the configuration knows are added, under the id that it gives.
    let declared =
        |id: usize| json!({"added_tokens_decoder": {id.to_string(): {"content": "<|new|>", "special": true}}});
    let next = tokenizer().vocab_size();
    let (_folder, loaded) = copied_tokenizer(|dir| {
        std::fs::write(dir.join("tokenizer_config.json"), declared(next).to_string()).unwrap();
    });
    let loaded = loaded.unwrap();
    assert_eq!(loaded.encode("<|new|>", false).unwrap(), [next as u32]);
    assert!(loaded.is_special(next as u32));
    assert_eq!(loaded.vocab_size(), next + 1);
    let (_folder, refused) = copied_tokenizer(|dir| {
        std::fs::write(dir.join("tokenizer_config.json"), declared(next + 7).to_string()).unwrap();
    });
    let message = refused.err().unwrap().to_string();
    assert!(message.contains("<|new|>") && message.contains("tokenizer_config.json"), "{message}");
}

#[test]
fn templates_come_from_wherever_they_stand() {
    let named = json!([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]);
    let (_folder, loaded) = copied_tokenizer(|dir| {
        std::fs::remove_file(dir.join("chat_template.jinja")).unwrap();
        edit(&dir.join("tokenizer_config.json"), |config| config["chat_template"] = named);
    });
    let loaded = loaded.unwrap();
    let text = |template: &lora_data::ChatTemplate| template.render(&[], None, false, &serde_json::Map::new()).unwrap();
    assert_eq!((text(loaded.template().unwrap()), text(loaded.tool_template().unwrap())), ("D".into(), "T".into()));

    let (_folder, refused) = copied_tokenizer(|dir| std::fs::write(dir.join("chat_template.jinja"), "{% if").unwrap());
    assert!(chain(&refused.err().unwrap()).contains("chat_template.jinja"));
}

#[test]
fn damaged_files_are_refused() {
    let missing = Tokenizer::load(Path::new("/no/such/folder")).err().unwrap().to_string();
    assert!(missing.contains("/no/such/folder/tokenizer.json"), "{missing}");
    let bytes = std::fs::read(fixture().join("tokenizer.json")).unwrap();
    for content in [b"{}".to_vec(), b"[1]".to_vec(), bytes[..bytes.len() / 2].to_vec(), b"{\"model\": {}}".to_vec()] {
        let (_folder, refused) = copied_tokenizer(|dir| std::fs::write(dir.join("tokenizer.json"), &content).unwrap());
        assert!(chain(&refused.err().unwrap()).contains("tokenizer.json"));
    }
    let (_folder, refused) = copied_tokenizer(|dir| {
        std::fs::write(dir.join("tokenizer_config.json"), r#"{"eos_token": 5}"#).unwrap();
    });
    let message = refused.err().unwrap().to_string();
    assert!(message.contains("tokenizer_config.json") && message.contains("`eos_token`"), "{message}");
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> String {
    let mut decoder = StreamDecoder::new(tokenizer, skip);
    let mut text = String::new();
    for &id in ids {
        let piece = decoder.push(id).unwrap().unwrap_or_default();
        assert!(!piece.ends_with('\u{FFFD}'), "half a character in {piece:?}");
        text.push_str(&piece);
    }
    text + &decoder.finish().unwrap().unwrap_or_default()
}

#[test]
fn a_character_comes_whole() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode("a🦀b", false).unwrap();
    assert!(ids.len() > 3, "the crab must take several tokens");
    let mut decoder = StreamDecoder::new(&tokenizer, false);
    let pieces: Vec<String> = ids.iter().filter_map(|&id| decoder.push(id).unwrap()).collect();
    assert_eq!(pieces, ["a", "🦀", "b"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Pieces together are the whole, for any tokens at all, those of broken characters included.
    #[test]
    fn streaming_equals_decoding(ids in prop::collection::vec(0..400_u32, 0..40), skip: bool) {
        let tokenizer = tokenizer();
        prop_assert_eq!(streamed(&tokenizer, &ids, skip), tokenizer.decode(&ids, skip).unwrap());
    }

    #[test]
    fn preview_shows_the_whole_text(text in "(\\PC|<\\|im_end\\|>|\n){0,30}") {
        let tokenizer = tokenizer();
        let input_ids = tokenizer.encode(&text, true).unwrap();
        let trained = vec![false; input_ids.len()];
        let origin = Origin { file: Path::new("x").into(), record: 1, line: 1 };
        let shown = preview(&Example { input_ids: input_ids.clone(), trained, origin }, &tokenizer).unwrap();
        prop_assert_eq!(shown.iter().map(|token| token.text.as_str()).collect::<String>(), text);
        prop_assert!(shown.iter().all(|token| token.special == tokenizer.is_special(token.id)));
    }
}
