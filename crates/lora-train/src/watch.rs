//! Training that never ends: files arrive in a folder, each round goes on from the adapter that counts, and what is not worse on
//! a fixed held-out set becomes the next version of it.
//!
//! Whatever happens in between, a file is trained in one round only and none is lost: it is copied, then written into the state
//! together with its round, and the round is over when its outcome has a folder of its own.

mod arrivals;
mod outcome;
mod round;
mod state;

use crate::checkpoint::has_checkpoints;
use crate::config::{FinetuningType, RunConfig};
use crate::error::{Error, Result};
use crate::events::{Event, EventSink};
use crate::lock::RunLock;
use crate::versions::{Version, Versions};
use arrivals::{Arrivals, Taken};
use round::Ended;
use serde::Serialize;
use state::State;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// So often a watch that waits looks whether it is to stop.
const BLINK: Duration = Duration::from_millis(50);

/// How files are watched for.
#[derive(Clone, Debug)]
pub struct WatchOptions {
    /// The folder in which files arrive.
    pub dir: PathBuf,
    /// Take up what is there and end, instead of waiting for more.
    pub once: bool,
}

/// A file that cannot be trained on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RefusedFile {
    /// Its name.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

/// What a watch came to.
#[derive(Clone, Debug, Serialize)]
pub struct WatchReport {
    /// `done` when all that was there was taken up, `stopped` when it was asked to stop.
    pub status: &'static str,
    /// Where the versions are.
    pub output_dir: PathBuf,
    /// The version that counts.
    pub current: Option<u64>,
    /// The rounds that ended in this time.
    pub rounds: Vec<Version>,
    /// The files that were refused in this time.
    pub refused: Vec<RefusedFile>,
}

/// Watches a folder and trains on what arrives there, until it is asked to stop; with `once` until nothing new is there. The
/// configuration's `data.train` says how the files are read, its path is not looked at.
///
/// # Errors
/// What a round reports that no other file would mend: a configuration or a base at fault, a full disk, want of memory. The
/// round goes on when the watch is started again.
pub fn watch(
    config: RunConfig,
    options: &WatchOptions,
    stop: &AtomicBool,
    sink: &mut dyn EventSink,
) -> Result<WatchReport> {
    let mut watch = Watch::open(config, options, stop, sink)?;
    let status = watch.rounds(sink)?;
    let (output_dir, current) = (watch.config.output_dir.clone(), watch.versions.current()?);
    Ok(WatchReport { status, output_dir, current, rounds: watch.done, refused: watch.refused })
}

/// A watch at work.
struct Watch<'a> {
    config: RunConfig,
    once: bool,
    stop: &'a AtomicBool,
    versions: Versions,
    state: State,
    arrivals: Arrivals,
    done: Vec<Version>,
    refused: Vec<RefusedFile>,
    /// Held as long as the watch goes on.
    _lock: RunLock,
}

impl<'a> Watch<'a> {
    /// Checks all that does not depend on files that are yet to come, before the first of them is waited for.
    fn open(config: RunConfig, options: &WatchOptions, stop: &'a AtomicBool, sink: &mut dyn EventSink) -> Result<Self> {
        check(&config)?;
        let arrivals = Arrivals::of(&options.dir)?;
        let out = &config.output_dir;
        let lock = RunLock::acquire(out)?;
        if has_checkpoints(out)? {
            return Err(Error::OutputTaken { path: out.clone() });
        }
        let versions = Versions::new(out);
        let state = State::read(out, &versions)?;
        let (done, refused) = (Vec::new(), Vec::new());
        let watch = Self { once: options.once, stop, versions, state, arrivals, done, refused, _lock: lock, config };
        watch.probe()?;
        watch.sweep()?;
        sink.event(Event::Note(format!("watching {}", options.dir.display())));
        Ok(watch)
    }

    /// Round after round.
    fn rounds(&mut self, sink: &mut dyn EventSink) -> Result<&'static str> {
        let mut idle = 0;
        loop {
            // What was interrupted comes first.
            while self.state.round.is_some() {
                if self.round(sink)? == Ended::Interrupted {
                    return Ok("stopped");
                }
            }
            if self.stop.load(Ordering::Relaxed) {
                return Ok("stopped");
            }
            let candidates = self.arrivals.look()?;
            if self.take_up(sink)? {
                idle = 0;
                continue;
            }
            idle += 1;
            // What is not whole at the second look is left to the next time.
            if self.once && (!candidates || idle > 1) && !self.stop.load(Ordering::Relaxed) {
                return Ok("done");
            }
            self.wait();
        }
    }

    /// Copies the files that are whole by now, leaves out those that cannot be used, and begins a round with the others; whether
    /// there is one.
    fn take_up(&mut self, sink: &mut dyn EventSink) -> Result<bool> {
        let mut good = Vec::new();
        for path in self.arrivals.whole() {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let file = match self.arrivals.take(&self.config.output_dir, &path, &self.state, &good)? {
                Taken::File(file) => file,
                Taken::Nothing => continue,
                Taken::Unreadable(reason) => {
                    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    self.tell_refused(RefusedFile { name, reason }, sink);
                    continue;
                }
            };
            match self.fault_of(&file)? {
                None => good.push(file),
                Some(reason) => self.refuse(std::slice::from_ref(&file), &reason, sink)?,
            }
        }
        if good.is_empty() {
            return Ok(false);
        }
        let parent = self.versions.current()?;
        self.state.begin(&self.versions, parent, good)?;
        Ok(true)
    }

    fn wait(&self) {
        let until = Instant::now() + self.config.watch.interval();
        while Instant::now() < until && !self.stop.load(Ordering::Relaxed) {
            std::thread::sleep(BLINK.min(until.saturating_duration_since(Instant::now())));
        }
    }

    fn out(&self) -> &Path {
        &self.config.output_dir
    }
}

/// What a watch cannot work with, told from the configuration alone.
fn check(config: &RunConfig) -> Result<()> {
    config.validate()?;
    let fault = |key, reason| Err(Error::Watch { key, reason });
    if config.data.eval.is_empty() {
        return fault("data.eval", "a version is published by its loss on a fixed held-out set: give one");
    }
    if config.train.finetuning_type == FinetuningType::Full {
        return fault("train.finetuning_type", "versions are adapters, and full training makes none; set \"lora\"");
    }
    if config.train.pipeline_stages > 1 {
        return fault("train.pipeline_stages", "a watch trains in one process; remove it");
    }
    if config.data.train.len() != 1 {
        return fault("data.train", "give one entry: its format and columns count for each file that arrives");
    }
    Ok(())
}
