//! One round: the files that were taken, trained from the version that counts, judged, and published or not.

use super::arrivals::copy_of;
use super::outcome::outcome;
use super::state::{Round, now};
use super::{RefusedFile, Watch};
use crate::checkpoint::has_checkpoints;
use crate::config::{RunConfig, SourceConfig, WatchConfig};
use crate::error::{Error, Result};
use crate::events::{Event, EventSink, NoEvents};
use crate::plan::RunPlan;
use crate::run::{EndedBy, TrainOptions, train};
use crate::versions::{REJECTED_DIR, TakenFile, VERSIONS_DIR, Version, Versions, version_name};
use std::fs;
use std::path::{Path, PathBuf};

/// The folder of the rounds under way, in the output folder.
const ROUNDS_DIR: &str = "rounds";

/// How far a round came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// It is over, or begun anew.
    Over,
    /// It was asked to stop, and is saved.
    Interrupted,
}

/// What every round has of the configuration: no path of `data.train`, and the adapter that counts.
fn base_config(config: &RunConfig, parent: Option<u64>, versions: &Versions) -> Result<RunConfig> {
    let mut config = RunConfig { watch: WatchConfig::default(), ..config.clone() };
    (config.data.replay, config.data.replay_share) = (Vec::new(), 0.0);
    if let Some(parent) = parent {
        let none =
            || Error::NoVersion { dir: config.output_dir.clone(), wanted: version_name(parent), published: Vec::new() };
        versions.version(parent)?.ok_or_else(none)?;
        config.lora.init_adapter = Some(versions.folder(parent));
    }
    Ok(config)
}

impl Watch<'_> {
    /// Goes on with the round under way, from wherever a stop or a kill left it.
    pub(super) fn round(&mut self, sink: &mut dyn EventSink) -> Result<Ended> {
        let Some(round) = self.state.round.clone() else { return Ok(Ended::Over) };
        if let Some(rejected) = self.rejected(&round)? {
            return self.over(rejected, sink);
        }
        let dir = self.run_dir(round.version);
        if self.versions.current()? != round.parent && self.versions.current()? != Some(round.version) {
            return self.anew(&round, sink);
        }
        // One that has a folder already lacks nothing but the link.
        let made = self.versions.version(round.version)?;
        let record = match made {
            Some(record) => record,
            None => match self.train(&round, sink)? {
                Some(record) => record,
                None if self.state.round.is_none() => return Ok(Ended::Over),
                None => return Ok(Ended::Interrupted),
            },
        };
        if record.rejected.is_some() {
            self.versions.keep(&dir, &record)?;
        } else if !self.versions.publish(&dir, &record)? {
            return self.anew(&round, sink);
        }
        self.over(record, sink)
    }

    /// Trains the round to its end and judges it; `None` where it was asked to stop before, and where its files cannot be used.
    fn train(&mut self, round: &Round, sink: &mut dyn EventSink) -> Result<Option<Version>> {
        let dir = self.run_dir(round.version);
        let resume = has_checkpoints(&dir)?;
        let own = dir.join("config.resolved.toml");
        // It goes on as it was begun: keys that were changed meanwhile count from the next round on.
        let config = if resume && own.is_file() {
            RunConfig { output_dir: dir.clone(), ..RunConfig::load(Some(&own), &[])? }
        } else {
            clear(&dir)?;
            self.config_of(round)?
        };
        let plan = match RunPlan::resolve(config, sink) {
            Err(error) if self.is_of_files(&error)? => {
                self.refuse(&round.files, &error.to_string(), sink)?;
                clear(&dir)?;
                return Ok(None);
            }
            plan => plan?,
        };
        sink.event(Event::Note(begins(round, &plan, resume)));
        let train_config = plan.config.train.clone();
        let options = TrainOptions { resume, ..TrainOptions::default() };
        let (steps, diverged) = match train(plan, &options, self.stop, sink) {
            Ok((report, _)) if matches!(report.ended_by, EndedBy::Interrupt | EndedBy::Hook) => return Ok(None),
            Ok((report, _)) => (report.steps, None),
            Err(Error::Stopped { step, source, .. })
                if matches!(*source, Error::NotFinite { .. } | Error::AdapterNotFinite { .. }) =>
            {
                (step, Some(source.to_string()))
            }
            Err(Error::Stopped { step, source, .. }) => {
                return Err(Error::RoundStopped { version: round.version, step, source });
            }
            Err(error) => return Err(error),
        };
        let judged = outcome(&dir, &train_config, self.config.watch.eval_tolerance)?;
        Ok(Some(Version {
            version: round.version,
            parent: round.parent,
            files: round.files.clone(),
            steps,
            eval_loss_before: judged.before,
            eval_loss: if diverged.is_some() { None } else { judged.after },
            rejected: diverged.or(judged.rejected),
            finished_at: now(),
        }))
    }

    /// The run of a round.
    fn config_of(&self, round: &Round) -> Result<RunConfig> {
        let mut config = base_config(&self.config, round.parent, &self.versions)?;
        config.output_dir = self.run_dir(round.version);
        // Each round draws anew, what it replays among it.
        config.seed = config.seed.wrapping_add(round.version) & i64::MAX as u64;
        config.data.train = self.sources(&round.files);
        let data = &self.config.data;
        let share = self.config.watch.replay_share.unwrap_or(data.replay_share);
        let earlier: Vec<TakenFile> =
            self.versions.lineage(round.parent)?.into_iter().rev().flat_map(|version| version.files).collect();
        let old: Vec<SourceConfig> = data.replay.iter().cloned().chain(self.sources(&earlier)).collect();
        if share > 0.0 && !old.is_empty() {
            (config.data.replay, config.data.replay_share) = (old, share);
        }
        Ok(config)
    }

    /// The copies of files, each read as `data.train` says.
    fn sources(&self, files: &[TakenFile]) -> Vec<SourceConfig> {
        let how = self.config.data.train.first().cloned().unwrap_or_default();
        files.iter().map(|file| SourceConfig { path: copy_of(self.out(), file), ..how.clone() }).collect()
    }

    /// What is wrong with a file, read alone as a round would.
    pub(super) fn fault_of(&self, file: &TakenFile) -> Result<Option<String>> {
        let mut config = base_config(&self.config, self.versions.current()?, &self.versions)?;
        config.data.train = self.sources(std::slice::from_ref(file));
        match RunPlan::resolve(config, &mut NoEvents) {
            Ok(_) => Ok(None),
            Err(error) if self.is_of_files(&error)? => Ok(Some(error.to_string())),
            Err(error) => Err(error),
        }
    }

    /// Whether an error would be mended by other files. Where the held-out set is at fault by now, that is the error: no file is
    /// blamed for it.
    fn is_of_files(&self, error: &Error) -> Result<bool> {
        let of_data = matches!(
            error,
            Error::Data(_) | Error::NoRows { .. } | Error::TokenOutsideModel { .. } | Error::TooLong { .. }
        );
        if of_data {
            self.probe()?;
        }
        Ok(of_data)
    }

    /// Looks at base, adapter and evaluation as a round would, with the held-out set in place of files.
    pub(super) fn probe(&self) -> Result<()> {
        let mut probe = base_config(&self.config, self.versions.current()?, &self.versions)?;
        probe.data.train.clone_from(&self.config.data.eval);
        RunPlan::resolve(probe, &mut NoEvents).map(drop)
    }

    /// Removes what a kill left: folders that were being filled, and those of rounds that are over.
    pub(super) fn sweep(&self) -> Result<()> {
        let active = self.state.round.as_ref().map(|round| version_name(round.version));
        for (folder, is_left) in [
            (VERSIONS_DIR, &(|name: &str| name.starts_with('.')) as &dyn Fn(&str) -> bool),
            (REJECTED_DIR, &|name: &str| name.starts_with('.')),
            (ROUNDS_DIR, &|name: &str| active.as_deref() != Some(name)),
        ] {
            let folder = self.out().join(folder);
            if !folder.is_dir() {
                continue;
            }
            for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
                let entry = entry.map_err(Error::io("list", &folder))?;
                if entry.path().is_dir() && is_left(&entry.file_name().to_string_lossy()) {
                    clear(&entry.path())?;
                }
            }
        }
        Ok(())
    }

    /// Remembers that files cannot be used, and says so.
    pub(super) fn refuse(&mut self, files: &[TakenFile], reason: &str, sink: &mut dyn EventSink) -> Result<()> {
        self.state.refuse(files, reason)?;
        for file in files {
            self.tell_refused(RefusedFile { name: file.name.clone(), reason: reason.to_string() }, sink);
        }
        Ok(())
    }

    /// Says that a file cannot be used, now and in the report.
    pub(super) fn tell_refused(&mut self, file: RefusedFile, sink: &mut dyn EventSink) {
        sink.event(Event::Refused(file.clone()));
        self.refused.push(file);
    }

    /// Another version counts by now than the one that the round went on from: its files are trained again, from that one.
    fn anew(&mut self, round: &Round, sink: &mut dyn EventSink) -> Result<Ended> {
        let current = self.versions.current()?;
        let name = |version: Option<u64>| version.map_or("none".to_string(), version_name);
        sink.event(Event::Note(format!(
            "round {} went on from version {}, and {} counts by now: its files are trained again from there",
            version_name(round.version),
            name(round.parent),
            name(current)
        )));
        self.state.begin(&self.versions, current, round.files.clone())?;
        clear(&self.run_dir(round.version))?;
        Ok(Ended::Over)
    }

    /// The record of a round that was rejected and not taken out of the state any more.
    fn rejected(&self, round: &Round) -> Result<Option<Version>> {
        let is_there = self.versions.rejected_folder(round.version).is_dir();
        let of = |version: &Version| version.version == round.version;
        if is_there { Ok(self.versions.list()?.into_iter().find(of)) } else { Ok(None) }
    }

    /// The round has its folder among the versions, or among the rejected ones.
    fn over(&mut self, record: Version, sink: &mut dyn EventSink) -> Result<Ended> {
        self.state.end()?;
        clear(&self.run_dir(record.version))?;
        sink.event(Event::Round(record.clone()));
        self.done.push(record);
        Ok(Ended::Over)
    }

    fn run_dir(&self, version: u64) -> PathBuf {
        self.out().join(ROUNDS_DIR).join(version_name(version))
    }
}

/// As `round 0003: 2 files, 80 rows a pass (8 replayed), from version 0002`.
fn begins(round: &Round, plan: &RunPlan, resume: bool) -> String {
    let from = match (round.parent, &plan.config.lora.init_adapter) {
        (Some(parent), _) => format!("from version {}", version_name(parent)),
        (None, Some(adapter)) => format!("from {}", adapter.display()),
        (None, None) => "from the base".to_string(),
    };
    let replayed = plan.replay.map(|replay| format!(" ({} replayed)", replay.drawn)).unwrap_or_default();
    let again = if resume { ", gone on with" } else { "" };
    let (name, files) = (version_name(round.version), round.files.len());
    let files = if files == 1 { "1 file".to_string() } else { format!("{files} files") };
    format!("round {name}: {files}, {} rows a pass{replayed}, {from}{again}", plan.rows_per_pass())
}

/// Removes the folder of a round.
fn clear(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Io { action: "remove", path: dir.into(), source: e })
        }
        _ => Ok(()),
    }
}
