//! The data of a run: read, tokenised, part of it held out, the rest mixed.

use crate::answers::Answers;
use crate::config::{
    BadRecords, Cache, DataConfig, Mixing, ObjectiveName, Preference, RunConfig, SourceConfig, TextBy, Truncation,
};
use crate::error::{Error, Result};
use crate::events::{Event, EventSink};
use lora_data::{
    AnswerKind, CacheUse, Clock, DataError, DataOptions, DataReport, Format, HubId, PreferenceUse, ReadOptions, Replay,
    Rows, Source, Tags, TokenCache, TokenSet, Tokenizer, hold_out, mix_order, open_answers, open_dataset,
    stage_lengths,
};
use std::path::{Path, PathBuf};

/// The data sources of a configuration in the pipeline's terms; `hub_cache` is where datasets of the hub are looked for.
///
/// # Errors
/// [`Error::Data`] for a format or a tag that is not known.
pub fn data_sources(list: &[SourceConfig], hub_cache: Option<&Path>) -> Result<Vec<Source>> {
    let in_cache = |source: Source| Source { hub_cache: hub_cache.map(Path::to_path_buf), ..source };
    list.iter().map(|source| data_source(source).map(in_cache)).collect()
}

/// The folder of the base model: what the configuration names, or the snapshot of a model of the hub in the cache.
///
/// # Errors
/// [`Error::Data`] for a name that is none, and for a model that is not in the cache.
pub fn model_folder(config: &RunConfig) -> Result<PathBuf> {
    let path = Path::new(&config.model.path);
    if !HubId::is_hub(path) {
        return Ok(path.to_path_buf());
    }
    let hub = HubId::parse_model(&config.model.path)?;
    let cache = config.data.hub_cache.as_deref();
    let missing = || DataError::HubMissing {
        kind: "model",
        id: hub.id.clone(),
        revision: hub.revision.clone(),
        cache: cache.map_or_else(|| "no cache folder".to_owned(), |cache| cache.display().to_string()),
    };
    Ok(cache.and_then(|cache| hub.model_snapshot(cache)).ok_or_else(missing)?)
}

/// The base model as an adapter names it: a model of the hub by its id alone, as others write it.
pub(crate) fn base_name(path: &str) -> String {
    let hub = HubId::is_hub(Path::new(path)).then(|| HubId::parse_model(path).ok()).flatten();
    hub.map_or_else(|| path.to_owned(), |hub| hub.id)
}

fn data_source(s: &SourceConfig) -> Result<Source> {
    let mut tags = Tags::default();
    for (key, name) in &s.tags {
        if !tags.set(key, Some(name)) {
            let (path, key) = (s.path.clone(), key.clone());
            return Err(lora_data::DataError::UnknownTag { path, key, known: Tags::KEYS.join(", ") }.into());
        }
    }
    Ok(Source {
        path: s.path.clone(),
        format: s.format.as_deref().map(str::parse::<Format>).transpose()?,
        columns: s.columns.iter().cloned().collect(),
        tags,
        text_by: match s.text_by {
            TextBy::Line => lora_data::TextBy::Line,
            TextBy::Paragraph => lora_data::TextBy::Paragraph,
            TextBy::Document => lora_data::TextBy::Document,
        },
        separator: s.separator.clone(),
        max_samples: s.max_samples.map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
        split: s.split.clone(),
        weight: s.weight,
        ..Source::default()
    })
}

/// The options of a configuration in the pipeline's terms.
pub fn data_options(c: &DataConfig) -> DataOptions {
    DataOptions {
        max_length: c.max_length as usize,
        truncation: match c.truncation {
            Truncation::Refuse => lora_data::Truncation::Refuse,
            Truncation::Drop => lora_data::Truncation::Drop,
            Truncation::Left => lora_data::Truncation::Left,
            Truncation::Right => lora_data::Truncation::Right,
            Truncation::Middle => lora_data::Truncation::Middle,
            Truncation::LeftTurns => lora_data::Truncation::LeftTurns,
            Truncation::RightTurns => lora_data::Truncation::RightTurns,
            Truncation::MiddleTurns => lora_data::Truncation::MiddleTurns,
            Truncation::Split => lora_data::Truncation::Split,
        },
        train_on_prompt: c.train_on_prompt,
        train_on_last_turn_only: c.train_on_last_turn_only,
        train_roles: c.train_roles.clone(),
        template: c.template.clone(),
        template_variables: c.template_variables.iter().map(|(name, value)| (name.clone(), json_of(value))).collect(),
        max_affected_share: c.max_affected_share,
        reading: ReadOptions {
            bad_records: match c.bad_records {
                BadRecords::Refuse => lora_data::BadRecords::Refuse,
                BadRecords::Skip => lora_data::BadRecords::Skip { max_share: c.max_bad_share },
            },
            ..ReadOptions::default()
        },
        dedup: c.dedup,
        preference: match c.preference {
            Preference::Refuse => PreferenceUse::Refuse,
            Preference::Chosen => PreferenceUse::Chosen,
        },
    }
}

/// A value of a configuration as templates take it; dates and times as text.
fn json_of(value: &toml::Value) -> serde_json::Value {
    match value {
        toml::Value::Datetime(time) => time.to_string().into(),
        other => serde_json::to_value(other).unwrap_or_default(),
    }
}

/// The tokenizer of a model folder, with the date that the configuration sets for chat templates.
///
/// # Errors
/// [`Error::Data`] naming the file and field that cannot be used.
pub fn data_tokenizer(model_dir: &Path, c: &DataConfig) -> Result<Tokenizer> {
    let clock = c.template_date.as_deref().and_then(Clock::from_date).unwrap_or_default();
    Ok(Tokenizer::load(model_dir)?.with_clock(clock))
}

/// Where tokens are kept between runs; nowhere when the configuration says so, or no folder is known.
pub fn token_cache(c: &DataConfig) -> Option<TokenCache> {
    let cache = TokenCache::new(c.cache_dir.clone()?);
    match c.cache {
        Cache::Auto => Some(cache),
        Cache::Always => Some(cache.for_every_size()),
        Cache::Never => None,
    }
}

/// What there is to say of where rows came from.
pub fn cache_note(cache: &CacheUse) -> Option<String> {
    match cache {
        CacheUse::Memory => None,
        CacheUse::Found(path) => Some(format!("tokens are those of {}", path.display())),
        CacheUse::Written(path) => Some(format!("tokens are kept in {}", path.display())),
        CacheUse::Impossible(reason) => Some(format!("tokens are not kept for the next run: {reason}")),
    }
}

/// How the objective wants its answers; `None` where it learns from plain rows.
pub fn answer_kind(config: &RunConfig) -> Option<AnswerKind> {
    match config.objective.name {
        _ if !config.objective.compares() => None,
        ObjectiveName::Kto => Some(AnswerKind::Rated),
        _ => Some(AnswerKind::Pairs),
    }
}

/// The rows of some sources, and notes of what there is to say about them.
fn token_set(
    config: &RunConfig,
    list: &[SourceConfig],
    answers: Option<AnswerKind>,
    tokenizer: &Tokenizer,
    sink: &mut dyn EventSink,
) -> Result<TokenSet> {
    let (options, cache) = (data_options(&config.data), token_cache(&config.data));
    let sources = data_sources(list, config.data.hub_cache.as_deref())?;
    let mut progress = |done, of| sink.event(Event::Tokenising { done, of });
    let set = match answers {
        None => open_dataset(&sources, tokenizer, &options, cache.as_ref(), &mut progress)?,
        Some(kind) => open_answers(&sources, tokenizer, &options, kind, cache.as_ref(), &mut progress)?,
    };
    cache_note(&set.cache).into_iter().for_each(|note| sink.event(Event::Note(note)));
    for note in set.report.sources.iter().flat_map(|source| &source.notes) {
        sink.event(Event::Note(note.clone()));
    }
    for source in set.report.sources.iter().filter(|source| source.bad.count > 0) {
        let (path, bad, first) = (source.path.display(), source.bad.count, source.bad.first.first());
        let first = first.map_or("", String::as_str);
        sink.event(Event::Note(format!("{path}: {bad} bad records were left out, the first: {first}")));
    }
    Ok(set)
}

/// What is trained and what is evaluated, and what became of their records.
pub(crate) struct RunData {
    pub(crate) train: Rows,
    /// Examples of each dataset, where they are trained one after the other.
    pub(crate) stages: Option<Vec<usize>>,
    pub(crate) report: DataReport,
    pub(crate) eval: Rows,
    /// Of evaluation data with files of its own.
    pub(crate) eval_report: Option<DataReport>,
    /// How many examples of `train`, its last, are an old set's.
    pub(crate) old: usize,
}

/// Everything that is read to be trained: the new set, and behind it the old one.
pub fn trained_sources(c: &DataConfig) -> Vec<SourceConfig> {
    c.train.iter().chain(&c.replay).cloned().collect()
}

/// How many items are new and how many old, where `ends` are those of all sources.
pub fn new_and_old(c: &DataConfig, ends: &[usize]) -> (usize, usize) {
    let end = |sources: usize| sources.checked_sub(1).and_then(|last| ends.get(last)).copied().unwrap_or(0);
    let new = end(c.train.len());
    (new, end(ends.len()).saturating_sub(new))
}

/// What is replayed of the old set, in examples or pairs, where `ends` are those of all sources; a run that packs counts its
/// packed rows instead.
pub fn replayed(config: &RunConfig, ends: &[usize]) -> Option<Replay> {
    let (new, old) = new_and_old(&config.data, ends);
    let own = &ends[..config.data.train.len().min(ends.len())];
    let held = match config.data.eval.is_empty() {
        true => hold_out(new, config.data.eval_split, config.seed),
        false => Vec::new(),
    };
    let lengths = lengths(own, &held);
    let new = mix(config, &lengths).map_or(lengths.iter().sum(), |order| order.len());
    (!config.data.replay.is_empty()).then(|| Replay::of(new, old, config.data.replay_share))
}

/// A set of which nothing is left beside the other has no share.
fn check_both(c: &DataConfig, new: usize, old: usize) -> Result<()> {
    match (c.replay.is_empty(), new, old) {
        (false, 0, _) => Err(Error::NoRows { key: "data.train" }),
        (false, _, 0) => Err(Error::NoRows { key: "data.replay" }),
        _ => Ok(()),
    }
}

/// What is trained, what became of its records, and what is evaluated.
///
/// Examples are held out before datasets are mixed, so that none of them is trained however often a dataset is taken.
pub(crate) fn datasets(config: &RunConfig, tokenizer: &Tokenizer, sink: &mut dyn EventSink) -> Result<RunData> {
    let mut build = |list: &[SourceConfig]| token_set(config, list, None, tokenizer, sink);
    let set = build(&trained_sources(&config.data))?;
    let (examples, old) = new_and_old(&config.data, &set.source_ends);
    check_both(&config.data, examples, old)?;
    let ends = &set.source_ends[..config.data.train.len().min(set.source_ends.len())];
    if !config.data.eval.is_empty() {
        let eval = build(&config.data.eval)?;
        let lengths = lengths(ends, &[]);
        return Ok(RunData {
            train: mixed(config, set.rows, &lengths)?,
            stages: stages(config, &lengths),
            report: set.report,
            eval: eval.rows,
            eval_report: Some(eval.report),
            old,
        });
    }
    let split = config.data.eval_split;
    let held = hold_out(examples, split, config.seed);
    if held.len() >= examples {
        return Err(Error::EvalSplit { split, examples });
    }
    let lengths = lengths(ends, &held);
    let stages = stages(config, &lengths);
    if held.is_empty() {
        let (train, eval) = (mixed(config, set.rows, &lengths)?, Rows::from(Vec::new()));
        return Ok(RunData { train, stages, report: set.report, eval, eval_report: None, old });
    }
    let mut next = held.iter().peekable();
    let train = (0..set.rows.len()).filter(|index| next.next_if(|held| **held == *index).is_none()).collect();
    let train = mixed(config, set.rows.select(train)?, &lengths)?;
    Ok(RunData { train, stages, report: set.report, eval: set.rows.select(held)?, eval_report: None, old })
}

/// The answers of a run that compares or rates them, to train on and held out.
pub(crate) struct ComparedData {
    pub(crate) answers: [Answers; 2],
    /// Pairs or answers of each dataset, where they are trained one after the other.
    pub(crate) stages: Option<Vec<usize>>,
    pub(crate) report: DataReport,
    pub(crate) eval_report: Option<DataReport>,
    /// How many of those to train on, the last, are an old set's.
    pub(crate) old: usize,
}

/// Reads pairs, or rated answers, as the objective wants them.
pub(crate) fn compared_answers(
    config: &RunConfig,
    tokenizer: &Tokenizer,
    sink: &mut dyn EventSink,
) -> Result<ComparedData> {
    let kind = answer_kind(config).unwrap_or(AnswerKind::Pairs);
    let mut build = |list: &[SourceConfig]| -> Result<(Answers, Vec<usize>, DataReport)> {
        let TokenSet { rows, good, source_ends, report, .. } = token_set(config, list, Some(kind), tokenizer, sink)?;
        let answers = match kind {
            AnswerKind::Pairs => Answers::of_pairs(rows),
            AnswerKind::Rated => Answers::of_rated(rows, good, config.data.max_length as usize)?,
        };
        Ok((answers, source_ends, report))
    };
    let (all, ends, report) = build(&trained_sources(&config.data))?;
    let (count, old) = new_and_old(&config.data, &ends);
    check_both(&config.data, count, old)?;
    let ends = &ends[..config.data.train.len().min(ends.len())];
    let old_ones = count..all.count();
    if !config.data.eval.is_empty() {
        let (eval, _, eval_report) = build(&config.data.eval)?;
        let lengths = lengths(ends, &[]);
        let mut order = mix(config, &lengths).unwrap_or_else(|| (0..count).collect());
        order.extend(old_ones);
        let (answers, stages) = ([all.select(&order)?, eval], stages(config, &lengths));
        return Ok(ComparedData { answers, stages, report, eval_report: Some(eval_report), old });
    }
    let held = hold_out(count, config.data.eval_split, config.seed);
    if held.len() >= count {
        return Err(Error::EvalSplit { split: config.data.eval_split, examples: count });
    }
    let kept: Vec<usize> = (0..count).filter(|i| held.binary_search(i).is_err()).collect();
    let lengths = lengths(ends, &held);
    let mut order: Vec<usize> = match mix(config, &lengths) {
        None => kept,
        Some(order) => order.into_iter().filter_map(|i| kept.get(i).copied()).collect(),
    };
    order.extend(old_ones);
    let (answers, stages) = ([all.select(&order)?, all.select(&held)?], stages(config, &lengths));
    Ok(ComparedData { answers, stages, report, eval_report: None, old })
}

/// Takes `data.eval_split` out of the training data.
pub(crate) fn take_held_out<T>(train: &mut Vec<T>, config: &RunConfig) -> Result<Vec<T>> {
    let (split, examples) = (config.data.eval_split, train.len());
    let held = hold_out(examples, split, config.seed);
    if held.len() >= examples {
        return Err(Error::EvalSplit { split, examples });
    }
    let mut eval: Vec<T> = held.into_iter().rev().map(|i| train.remove(i)).collect();
    eval.reverse();
    Ok(eval)
}

/// How many examples of each source stay, where those at `held` are taken out.
fn lengths(ends: &[usize], held: &[usize]) -> Vec<usize> {
    let before = |end: usize| end - held.partition_point(|&index| index < end);
    let mut start = 0;
    ends.iter().map(|&end| before(end) - std::mem::replace(&mut start, before(end))).collect()
}

/// The examples in the order, and as often, as the mix has them; those of an old set follow as they are.
fn mixed(config: &RunConfig, rows: Rows, lengths: &[usize]) -> Result<Rows> {
    match mix(config, lengths) {
        None => Ok(rows),
        Some(mut order) => {
            order.extend(lengths.iter().sum()..rows.len());
            Ok(rows.select(order)?)
        }
    }
}

/// Examples of each stage, where datasets are trained one after the other.
fn stages(config: &RunConfig, lengths: &[usize]) -> Option<Vec<usize>> {
    let weights: Vec<Option<f64>> = config.data.train.iter().map(|source| source.weight).collect();
    (config.data.mixing == Mixing::Sequential).then(|| stage_lengths(lengths, &weights))
}

/// The order of a mix; `None` where it is that of the data.
fn mix(config: &RunConfig, lengths: &[usize]) -> Option<Vec<usize>> {
    let weights: Vec<Option<f64>> = config.data.train.iter().map(|source| source.weight).collect();
    let mixing = match config.data.mixing {
        Mixing::Concat => lora_data::Mixing::Concat,
        Mixing::Sequential => lora_data::Mixing::Sequential,
        Mixing::InterleaveUnder => lora_data::Mixing::InterleaveUnder,
        Mixing::InterleaveOver => lora_data::Mixing::InterleaveOver,
        Mixing::InterleaveOnce => lora_data::Mixing::InterleaveOnce,
    };
    let in_order = matches!(config.data.mixing, Mixing::Concat | Mixing::Sequential);
    if in_order && weights.iter().all(Option::is_none) {
        return None;
    }
    Some(mix_order(lengths, &weights, mixing, config.seed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_reach_the_pipeline() {
        let pairs = |of: &[(&str, &str)]| of.iter().map(|(a, b)| ((*a).to_string(), (*b).to_string())).collect();
        let config = SourceConfig {
            path: "a.txt".into(),
            tags: pairs(&[("user_tag", "customer")]),
            text_by: TextBy::Paragraph,
            separator: Some("||".into()),
            split: Some("test".into()),
            weight: Some(2.0),
            ..SourceConfig::default()
        };
        let source = data_sources(&[config], Some("cache".as_ref())).unwrap().remove(0);
        let mut tags = Tags::default();
        assert!(tags.set("user_tag", Some("customer")));
        let wanted = Source {
            path: "a.txt".into(),
            tags,
            text_by: lora_data::TextBy::Paragraph,
            separator: Some("||".into()),
            split: Some("test".into()),
            weight: Some(2.0),
            hub_cache: Some("cache".into()),
            ..Source::default()
        };
        assert_eq!(source, wanted);
        let unknown = SourceConfig { tags: pairs(&[("usertag", "x")]), ..SourceConfig::default() };
        assert!(data_sources(&[unknown], None).unwrap_err().to_string().contains("user_tag"));

        let data = DataConfig {
            bad_records: BadRecords::Skip,
            max_bad_share: 0.25,
            dedup: true,
            preference: Preference::Chosen,
            ..DataConfig::default()
        };
        let options = data_options(&data);
        assert_eq!(options.reading.bad_records, lora_data::BadRecords::Skip { max_share: 0.25 });
        assert!(options.dedup && options.preference == PreferenceUse::Chosen);
        let usual = data_options(&DataConfig::default());
        assert_eq!((usual.reading, usual.dedup), (ReadOptions::default(), false));
    }

    #[test]
    fn held_out_examples_shorten_their_source() {
        assert_eq!(lengths(&[3, 3, 8], &[0, 2, 7]), [1, 0, 4]);
        assert_eq!(lengths(&[3, 8], &[]), [3, 5]);
    }
}
