//! What a command names of the hub, on this machine before anything else is done.

use crate::failure::usage;
use crate::hub::{find_caches, settings};
use crate::out;
use crate::progress::{ByteBar, NowAndThen};
use anyhow::Result;
use lora_data::{HubId, Source, hub_dataset};
use lora_hub::{Event, Fetched, Freshness, Repo, RepoKind, Settings, fetch, model_files};
use lora_model::ModelConfig;
use lora_train::{RunConfig, data_sources, model_folder};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Digits of a commit that are shown.
const SHOWN: usize = 12;

/// How much of a model is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Configuration and tokenizer.
    Settings,
    /// All that is read of it.
    Whole,
}

/// Fetches what a configuration names of the hub and the cache lacks, and writes the commits into it, so that what was used is
/// on record. Gives the folder of the model.
///
/// # Errors
/// What is not there and cannot be had.
pub(crate) fn prepare(config: &mut RunConfig, part: Part, quiet: bool) -> Result<PathBuf> {
    let text = config.model.path.clone();
    let named = hub_model(&text)?;
    if let Some(hub) = &named {
        config.model.path = hub.at(&hub.revision).to_string_lossy().into_owned();
    }
    find_caches(config);
    let cache = config.data.hub_cache.clone();
    if let Some(hub) = &named {
        let settings = settings(cache.as_deref())?;
        let found = get_model(hub, Part::Settings, &settings, quiet).map_err(|e| or_no_folder(&text, e))?;
        if part == Part::Whole && found.folder.join("config.json").is_file() {
            // A model that is not known is refused before its weights are fetched.
            ModelConfig::read(&found.folder)?;
        }
        config.model.path = hub.at(&found.commit).to_string_lossy().into_owned();
    }
    for list in [&mut config.data.train, &mut config.data.eval, &mut config.data.replay] {
        let sources = data_sources(list, cache.as_deref())?;
        for (entry, source) in list.iter_mut().zip(&sources) {
            if let Some(pinned) = get_dataset(source, cache.as_deref(), quiet)? {
                entry.path = pinned;
            }
        }
    }
    if let Some(hub) = named.filter(|_| part == Part::Whole) {
        get_model(&HubId::parse_model(&config.model.path).unwrap_or(hub), part, &settings(cache.as_deref())?, quiet)?;
    }
    Ok(model_folder(config)?)
}

/// The folder of a model that a flag names: a folder, or a model of the hub.
///
/// # Errors
/// What is not there and cannot be had.
pub(crate) fn model(path: &Path) -> Result<PathBuf> {
    let text = path.to_string_lossy();
    let Some(hub) = hub_model(&text)? else { return Ok(path.to_path_buf()) };
    let settings = settings(None)?;
    let found = get_model(&hub, Part::Settings, &settings, false).map_err(|e| or_no_folder(&text, e))?;
    if found.folder.join("config.json").is_file() {
        ModelConfig::read(&found.folder)?;
    }
    let pinned = HubId { revision: found.commit, ..hub };
    Ok(get_model(&pinned, Part::Whole, &settings, false)?.folder)
}

/// The folder of an adapter that a flag names: a folder, or a repository of the hub as `hf://OWNER/NAME`.
///
/// # Errors
/// What is not there and cannot be had.
pub(crate) fn adapter(path: &Path) -> Result<PathBuf> {
    if !HubId::is_hub(path) {
        return Ok(path.to_path_buf());
    }
    let hub = HubId::parse_model(&path.to_string_lossy())?;
    Ok(get_model(&hub, Part::Whole, &settings(None)?, false)?.folder)
}

/// A dataset that a flag names, ready to be read.
///
/// # Errors
/// What is not there and cannot be had.
pub(crate) fn dataset(mut source: Source) -> Result<Source> {
    if hub_dataset(&source)?.is_some() {
        let cache = settings(None)?.cache;
        if let Some(pinned) = get_dataset(&source, Some(&cache), false)? {
            source.path = pinned;
        }
        source.hub_cache = Some(cache);
    }
    Ok(source)
}

/// Where a branch stands now.
///
/// # Errors
/// What is not there and cannot be had.
pub(crate) fn newest(kind: RepoKind, hub: &HubId, split: Option<&str>) -> Result<Fetched> {
    let repo = Repo::new(kind, &hub.id, &hub.revision)?;
    let select = |names: &[&str]| match kind {
        RepoKind::Model => model_files(names),
        RepoKind::Dataset => hub.select(names, split),
    };
    get(&repo, &select, Freshness::Newest, &settings(None)?, false)
}

/// A model of the hub: by `hf://`, or by `OWNER/NAME` where no such folder is.
fn hub_model(text: &str) -> Result<Option<HubId>> {
    if HubId::is_hub(Path::new(text)) {
        return Ok(Some(HubId::parse_model(text)?));
    }
    Ok(if Path::new(text).exists() { None } else { HubId::parse_model(text).ok() })
}

fn get_model(hub: &HubId, part: Part, settings: &Settings, quiet: bool) -> Result<Fetched> {
    let select = |names: &[&str]| {
        let mut files = model_files(names);
        files.retain(|name| part == Part::Whole || !name.ends_with(".safetensors"));
        files
    };
    let repo = Repo::new(RepoKind::Model, &hub.id, &hub.revision)?;
    get(&repo, &select, Freshness::Cached, settings, quiet)
}

/// A name without `hf://` may have been meant as a folder's.
fn or_no_folder(named: &str, error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref::<lora_hub::HubError>() {
        Some(error) if error.is_usage() && !HubId::is_hub(Path::new(named)) => {
            usage(format!("model {named}: there is no such folder, and on the hub: {error}"))
        }
        _ => error,
    }
}

/// Fetches the dataset of the hub that a source names. Gives its path with the commit, unless an entry of `dataset_info.json`
/// stands between.
fn get_dataset(source: &Source, cache: Option<&Path>, quiet: bool) -> Result<Option<PathBuf>> {
    let Some((hub, split)) = hub_dataset(source)? else { return Ok(None) };
    let repo = Repo::new(RepoKind::Dataset, &hub.id, &hub.revision)?;
    let select = |names: &[&str]| hub.select(names, Some(&split));
    let found = get(&repo, &select, Freshness::Cached, &settings(cache)?, quiet)?;
    Ok(HubId::is_hub(&source.path).then(|| hub.at(&found.commit)))
}

fn get(
    repo: &Repo,
    select: &dyn Fn(&[&str]) -> Vec<String>,
    freshness: Freshness,
    settings: &Settings,
    quiet: bool,
) -> Result<Fetched> {
    let mut view = View { bar: None, lines: NowAndThen::default(), begun: Instant::now(), kept: 0, quiet };
    let found = fetch(repo, select, freshness, settings, &mut |event| view.tell(&event));
    if let Some(bar) = &view.bar {
        bar.finish();
    }
    found.map_err(Into::into)
}

/// What is shown of a download.
struct View {
    bar: Option<ByteBar>,
    lines: NowAndThen,
    begun: Instant,
    kept: u64,
    quiet: bool,
}

impl View {
    fn tell(&mut self, event: &Event<'_>) {
        match event {
            Event::Start { what, commit, files, bytes, kept } => {
                self.kept = *kept;
                let commit = commit.get(..SHOWN).unwrap_or(commit);
                let at = if what.contains(commit) { String::new() } else { format!(" ({commit})") };
                let begun =
                    if *kept > 0 { format!(", {} of it here already", out::bytes(*kept)) } else { String::new() };
                let plural = if *files == 1 { "" } else { "s" };
                self.note(&format!("fetching {what}{at}: {files} file{plural}, {}{begun}", out::bytes(*bytes)));
                self.begun = Instant::now();
                self.bar = (!self.quiet).then(|| ByteBar::with_time("fetching"));
                // The first line after some seconds.
                self.lines.due();
            }
            Event::Progress { done, of } => self.progress(*done, *of),
            Event::Waiting { file } => self.note(&format!("{file}: another process fetches it, waiting")),
            Event::Again { file, reason } => self.note(&format!("{file}: {reason}; going on")),
            Event::Unasked { what, reason } => {
                self.note(&format!("note: {what} is used as the cache has it ({reason})"))
            }
            _ => {}
        }
    }

    fn progress(&mut self, done: u64, of: u64) {
        let Some(bar) = &mut self.bar else { return };
        bar.set(done, of);
        if !out::live() && self.lines.due() {
            let rate = done.saturating_sub(self.kept) as f64 / self.begun.elapsed().as_secs_f64().max(1e-3);
            let left = (of - done.min(of)) as f64 / rate.max(1.0);
            out::note(format!(
                "fetched {} of {}, {}/s, {} left",
                out::bytes(done),
                out::bytes(of),
                out::bytes(rate as u64),
                out::seconds(left)
            ));
        }
    }

    fn note(&self, line: &str) {
        if self.quiet {
            return;
        }
        match &self.bar {
            Some(bar) => bar.above(line),
            None => out::note(line),
        }
    }
}

/// Puts folders into the place of what flags name of the hub.
///
/// # Errors
/// What is not there and cannot be had.
pub(crate) fn resolve(models: Vec<&mut PathBuf>, adapters: Vec<&mut PathBuf>) -> Result<()> {
    for path in models {
        *path = model(path)?;
    }
    for path in adapters {
        *path = adapter(path)?;
    }
    Ok(())
}
