//! Tokens that are kept between runs: the same rows, the same report, and never those of other input.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};

use common::{chain, fixture, tokenizer};
use lora_data::{
    AnswerKind, BadRecords, CacheUse, Clock, DataError, DataOptions, Format, PreferenceUse, ReadOptions, Source, Tags,
    TextBy, TokenCache, TokenSet, Tokenizer, Truncation, build_dataset, open_answers, open_dataset,
};
use serde_json::json;
use tempfile::TempDir;

/// Data, a tokenizer and a cache, each to be changed.
struct World {
    folder: TempDir,
    sources: Vec<Source>,
    options: DataOptions,
    clock: Clock,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        std::fs::create_dir(&model).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"] {
            std::fs::copy(fixture().join(name), model.join(name)).unwrap();
        }
        let mut lines: Vec<String> = (0..40)
            .map(|i| {
                let (q, a) = (format!("question {i} ").repeat(1 + i % 5), format!("answer {}", i / 2));
                json!({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}).to_string()
            })
            .collect();
        lines.push(lines[0].clone());
        lines.push(r#"{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]}"#.into());
        lines.push("{broken".into());
        let data = folder.path().join("data");
        std::fs::create_dir(&data).unwrap();
        std::fs::write(data.join("a.jsonl"), lines.join("\n")).unwrap();
        std::fs::write(folder.path().join("b.txt"), "one\n\ntwo\n\n\nthree four").unwrap();
        let sources = [data, folder.path().join("b.txt")].map(|path| Source { path, ..Source::default() });
        let reading = ReadOptions { bad_records: BadRecords::Skip { max_share: 0.5 }, ..ReadOptions::default() };
        let options = DataOptions {
            max_length: 32,
            truncation: Truncation::Right,
            max_affected_share: 1.0,
            reading,
            ..DataOptions::default()
        };
        Self { folder, sources: sources.to_vec(), options, clock: Clock::Fixed(0) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::load(&self.path("model")).unwrap().with_clock(self.clock)
    }

    fn cache(&self) -> TokenCache {
        TokenCache::new(self.path("cache/tokens")).for_every_size()
    }

    fn open(&self) -> TokenSet {
        open_dataset(&self.sources, &self.tokenizer(), &self.options, Some(&self.cache()), &mut |_, _| {}).unwrap()
    }

    /// Opens it, and checks that it is what is made without a cache.
    fn open_checked(&self) -> CacheUse {
        let set = self.open();
        let fresh = build_dataset(&self.sources, &self.tokenizer(), &self.options, &mut |_, _| {}).unwrap();
        assert_eq!(set.report, fresh.report);
        assert_eq!(set.source_ends, fresh.source_ends);
        let rows: Vec<_> = (0..set.rows.len()).map(|row| set.rows.example(row).unwrap()).collect();
        assert_eq!(rows, fresh.examples);
        set.cache
    }

    fn append(&self, name: &str, text: &str) {
        let path = self.path(name);
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        std::fs::write(path, before + text).unwrap();
    }
}

fn is_found(cache: &CacheUse) -> bool {
    matches!(cache, CacheUse::Found(_))
}

fn is_written(cache: &CacheUse) -> bool {
    matches!(cache, CacheUse::Written(_))
}

#[test]
fn a_second_start_has_the_same_rows_and_the_same_report() {
    let world = World::new();
    assert!(is_written(&world.open_checked()));
    assert!(is_found(&world.open_checked()));
    let report = world.open().report;
    let counted = [report.duplicates, report.truncated, report.dropped.len(), report.sources[0].bad.count];
    assert!(!counted.contains(&0), "the set has something of everything: {counted:?}");
    assert_eq!(world.cache().entries().unwrap().len(), 1);
}

/// Pairs and ratings are kept as rows are, and the same file read for another objective is another set.
#[test]
fn answers_are_kept_with_their_ratings() {
    let mut world = World::new();
    let pair =
        |i: usize| json!({"prompt": format!("q {i}"), "chosen": "a longer answer", "rejected": "no"}).to_string();
    let rated = |i: usize| {
        json!({"prompt": format!("q {i}"), "completion": "an answer", "label": i.is_multiple_of(3)}).to_string()
    };
    let lines = |of: &dyn Fn(usize) -> String| (0..30).map(|i| of(i % 20)).collect::<Vec<_>>().join("\n");
    let of = |path: PathBuf| Source { path, ..Source::default() };
    for (name, text) in [("pairs.jsonl", lines(&pair)), ("rated.jsonl", lines(&rated))] {
        std::fs::write(world.path(name), text).unwrap();
    }
    for (name, kind, each) in [("pairs.jsonl", AnswerKind::Pairs, 2), ("rated.jsonl", AnswerKind::Rated, 1)] {
        world.sources = vec![of(world.path(name))];
        for (dedup, items) in [(false, 30), (true, 20)] {
            world.options.dedup = dedup;
            let open = |cache: Option<&TokenCache>| {
                open_answers(&world.sources, &world.tokenizer(), &world.options, kind, cache, &mut |_, _| {}).unwrap()
            };
            let sets = [open(None), open(Some(&world.cache())), open(Some(&world.cache()))];
            assert!(is_written(&sets[1].cache) && is_found(&sets[2].cache), "{name}");
            for set in &sets {
                assert_eq!((set.rows.len(), &set.source_ends, set.report.duplicates), (items * each, &vec![items], 10));
                assert_eq!(set.rows.digest(), sets[0].rows.digest());
                assert_eq!(set.report, sets[0].report);
                let good: Vec<bool> = (0..items).map(|i: usize| (i % 20).is_multiple_of(3)).collect();
                assert_eq!(set.good, if each == 1 { good } else { vec![] });
            }
        }
    }
    world.options.preference = PreferenceUse::BothSides;
    assert!(is_written(&world.open().cache), "plain rows of the same file are another set");
}

#[test]
fn a_refusal_is_the_same_from_the_cache() {
    let mut world = World::new();
    world.open();
    world.options.max_affected_share = 0.01;
    let open = |cache: Option<&TokenCache>| {
        let opened = open_dataset(&world.sources, &world.tokenizer(), &world.options, cache, &mut |_, _| {});
        chain(&opened.unwrap_err())
    };
    let (found, fresh) = (open(Some(&world.cache())), open(None));
    assert_eq!(found, fresh);
    assert!(found.contains("max_affected_share"), "{found}");
    assert_eq!(world.cache().entries().unwrap().len(), 1, "the share is no part of the key");
}

/// Each change of an input has to be answered with rows made anew, and with those that are made without a cache.
#[test]
fn every_input_has_a_part_in_the_key() {
    type Change = (&'static str, fn(&mut World));
    let inputs: [Change; 31] = [
        ("a byte of the data", |w| w.append("data/a.jsonl", " ")),
        ("another file", |w| w.append("data/c.jsonl", &json!({"text": "more"}).to_string())),
        ("the name of a file", |w| std::fs::rename(w.path("data/a.jsonl"), w.path("data/b.jsonl")).unwrap()),
        ("the order of the sources", |w| w.sources.reverse()),
        ("fewer sources", |w| w.sources.truncate(1)),
        ("tokenizer.json", |w| w.append("model/tokenizer.json", " ")),
        ("tokenizer_config.json", |w| w.append("model/tokenizer_config.json", " ")),
        ("the chat template", |w| w.append("model/chat_template.jinja", "{# #}")),
        ("a template for tools", |w| {
            std::fs::create_dir(w.path("model/additional_chat_templates")).unwrap();
            let text = std::fs::read_to_string(w.path("model/chat_template.jinja")).unwrap();
            w.append("model/additional_chat_templates/tool_use.jinja", &text);
        }),
        ("special_tokens_map.json", |w| w.append("model/special_tokens_map.json", "{}")),
        ("max_length", |w| w.options.max_length = 31),
        ("truncation", |w| w.options.truncation = Truncation::Left),
        ("train_on_prompt", |w| w.options.train_on_prompt = true),
        ("train_on_last_turn_only", |w| w.options.train_on_last_turn_only = true),
        ("train_roles", |w| w.options.train_roles.push("user".into())),
        ("template", |w| w.options.template = Some("chatml".into())),
        ("template_variables", |w| w.options.template_variables = [("x".to_owned(), json!(1))].into_iter().collect()),
        ("bad_records", |w| w.options.reading.bad_records = BadRecords::Skip { max_share: 0.75 }),
        ("max_record_bytes", |w| w.options.reading.max_record_bytes = 1 << 20),
        ("dedup", |w| w.options.dedup = true),
        ("preference", |w| w.options.preference = PreferenceUse::Chosen),
        ("format", |w| w.sources[0].format = Some(Format::Messages)),
        ("columns", |w| {
            w.sources[0].format = Some(Format::Messages);
            w.sources[0].columns.insert("tools".into(), "my_tools".into());
        }),
        ("off", |w| assert!(w.sources[0].off.insert("tools".into()))),
        ("tags", |w| assert!(w.sources[0].tags.set("user_tag", Some("user")))),
        ("text_by", |w| w.sources[1].text_by = TextBy::Document),
        ("separator", |w| w.sources[1].separator = Some("o".into())),
        ("max_samples", |w| w.sources[0].max_samples = Some(5)),
        ("hub_cache", |w| w.sources[0].hub_cache = Some("cache".into())),
        ("split", |w| w.sources[0].split = Some("test".into())),
        ("notes", |w| w.sources[0].notes.push("a note".into())),
    ];
    for (input, change) in inputs {
        let mut world = World::new();
        assert!(is_written(&world.open().cache));
        change(&mut world);
        assert!(is_written(&world.open_checked()), "{input} is no part of the key");
        assert!(is_found(&world.open_checked()), "{input}");
    }
    // A field that is new here belongs into the list above, or below with a reason.
    let Source { path: _, format: _, columns: _, off: _, tags: _, text_by: _, .. } = Source::default();
    let Source { separator: _, max_samples: _, hub_cache: _, split: _, notes: _, weight: _, .. } = Source::default();
    let ReadOptions { bad_records: _, max_record_bytes: _ } = ReadOptions::default();
    let DataOptions {
        max_length: _,
        truncation: _,
        train_on_prompt: _,
        train_on_last_turn_only: _,
        train_roles: _,
        template: _,
        template_variables: _,
        max_affected_share: _,
        reading: _,
        dedup: _,
        preference: _,
    } = DataOptions::default();
    let _ = Tags::KEYS;
}

/// What changes no row makes no other file.
#[test]
fn times_weights_and_copies_are_no_part_of_the_key() {
    let mut world = World::new();
    world.open();
    world.sources[0].weight = Some(2.0);
    assert!(is_found(&world.open_checked()));
    let (path, copy) = (world.path("data/a.jsonl"), world.path("data/copy"));
    std::fs::copy(&path, &copy).unwrap();
    std::fs::rename(&copy, &path).unwrap();
    assert!(is_found(&world.open_checked()), "the same bytes in another file with another time");
}

#[test]
fn the_content_of_a_template_file_counts() {
    let mut world = World::new();
    world.append("own.jinja", "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}");
    world.options.template = Some(world.path("own.jinja"));
    assert!(is_written(&world.open_checked()));
    assert!(is_found(&world.open_checked()));
    std::fs::write(world.path("own.jinja"), "{% for m in messages %}{{ m.content }} <|im_end|>{% endfor %}").unwrap();
    assert!(is_written(&world.open_checked()));
}

#[test]
fn the_clock_counts_where_the_template_reads_it() {
    let mut world = World::new();
    world.open();
    world.clock = Clock::Fixed(86_400);
    assert!(is_found(&world.open_checked()), "this template does not read it");

    let dated = |format: &str| {
        let template = std::fs::read_to_string(fixture().join("chat_template.jinja")).unwrap();
        let world = World::new();
        let text = format!("{{{{ strftime_now({format}) }}}}{template}");
        std::fs::write(world.path("model/chat_template.jinja"), text).unwrap();
        world
    };
    let mut world = dated("'%d %b %Y'");
    assert!(is_written(&world.open_checked()));
    assert!(is_found(&world.open_checked()));
    world.clock = Clock::Fixed(86_400);
    assert!(is_written(&world.open_checked()));
    for format in ["'%d %-H'", "'%T'", "'%' + 'd'", "\"%d\\u0025\"", "format"] {
        let mut world = dated(format);
        world.options.template_variables = [("format".to_owned(), json!("%F"))].into_iter().collect();
        world.clock = Clock::System;
        let set = world.open();
        let CacheUse::Impossible(reason) = &set.cache else { panic!("{format}: {:?}", set.cache) };
        assert!(reason.contains("template_date"), "{reason}");
        world.clock = Clock::Fixed(0);
        assert!(is_written(&world.open_checked()), "{format} with a fixed time");
    }
}

#[test]
fn a_damaged_file_is_made_anew() {
    let world = World::new();
    world.open();
    let path = world.cache().entries().unwrap()[0].path.clone();
    let whole = std::fs::read(&path).unwrap();
    for part in 0..16 {
        std::fs::write(&path, &whole[..whole.len() * part / 16]).unwrap();
        assert!(is_written(&world.open_checked()), "{part}/16 of the file");
        assert_eq!(std::fs::read(&path).unwrap(), whole, "the file is the same each time");
    }
    // Tokens are not read at the start; a row that changed is refused when it is.
    let mut changed = whole.clone();
    changed[16] ^= 1;
    std::fs::write(&path, changed).unwrap();
    let error = world.open().rows.example(0).unwrap_err();
    assert!(matches!(&error, DataError::CacheDamaged { row: 1, path: named } if *named == path), "{error}");
}

#[test]
fn data_that_changes_while_it_is_read_is_not_kept() {
    let world = World::new();
    let mut first = true;
    let mut touch = |_, _| {
        if std::mem::take(&mut first) {
            world.append("data/a.jsonl", " ");
        }
    };
    let set = open_dataset(&world.sources, &world.tokenizer(), &world.options, Some(&world.cache()), &mut touch);
    let set = set.unwrap();
    assert_eq!(set.cache, CacheUse::Memory);
    assert!(set.rows.example(set.rows.len() - 1).is_ok(), "the rows are there all the same");
    assert!(world.cache().entries().unwrap().is_empty());
}

#[test]
fn a_folder_that_cannot_be_is_passed_over() {
    let world = World::new();
    let cache = TokenCache::new(world.path("b.txt").join("cache")).for_every_size();
    let set = open_dataset(&world.sources, &world.tokenizer(), &world.options, Some(&cache), &mut |_, _| {}).unwrap();
    let CacheUse::Impossible(reason) = &set.cache else { panic!("{:?}", set.cache) };
    assert!(reason.contains("b.txt"), "{reason}");
    let small = TokenCache::new(world.path("cache"));
    let set = open_dataset(&world.sources, &world.tokenizer(), &world.options, Some(&small), &mut |_, _| {}).unwrap();
    assert_eq!(set.cache, CacheUse::Memory, "so small a set is not worth a file");
}

#[test]
fn old_files_are_removed() {
    let world = World::new();
    world.open();
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(31 * 86_400);
    let age = |path: &Path| std::fs::File::options().append(true).open(path).unwrap().set_modified(old).unwrap();
    let unfinished = world.path("cache/tokens/.unfinished-x");
    std::fs::write(&unfinished, "half").unwrap();
    std::fs::write(world.path("cache/tokens/notes.txt"), "not ours").unwrap();
    let first = world.cache().entries().unwrap().into_iter().find(|entry| !entry.unfinished).unwrap();
    assert_eq!(world.cache().entries().unwrap().len(), 2);
    // A start that finds a file keeps it for another month.
    age(&first.path);
    assert!(is_found(&world.open().cache));
    world.append("data/a.jsonl", " ");
    assert!(is_written(&world.open().cache));
    assert_eq!(world.cache().entries().unwrap().len(), 3);
    age(&first.path);
    age(&unfinished);
    world.append("data/a.jsonl", " ");
    assert!(is_written(&world.open().cache));
    assert!(!first.path.exists() && !unfinished.exists() && world.path("cache/tokens/notes.txt").exists());
    let bytes: u64 = world.cache().entries().unwrap().iter().map(|entry| entry.bytes).sum();
    assert_eq!(world.cache().remove_unused_since(std::time::SystemTime::now()).unwrap(), bytes);
    assert!(world.cache().entries().unwrap().is_empty() && world.path("cache/tokens/notes.txt").exists());
}

/// A digest of what the fixture's tokenizer makes of some records. Where it changes, files of earlier versions hold other
/// rows than this one makes: raise `LAYOUT` in `src/cache/layout.rs`, then put the new digest here.
#[test]
fn rows_are_those_that_this_layout_was_made_for() {
    let mut world = World::new();
    world.sources.truncate(1);
    let set = open_dataset(&world.sources, &tokenizer(), &world.options, None, &mut |_, _| {}).unwrap();
    assert_eq!(set.rows.digest(), ROWS);
}

const ROWS: &str = "f3fcc324e4895d43fbb84dcccb113bde6c2e9c596969357ecd45de27bebc7de0";
