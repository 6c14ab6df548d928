//! A run's folder, read: its metrics, its configuration, its samples, and what it says of itself.

use crate::about::{About, RUN_FILE};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const METRICS_FILE: &str = "metrics.jsonl";
const CONFIG_FILE: &str = "config.resolved.toml";
/// The name of the file with what the model wrote, in a run's folder.
pub const SAMPLES_FILE: &str = "samples.jsonl";

/// One figure over the steps of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Its name in `metrics.jsonl`.
    pub name: String,
    /// Steps and values, in the order of the file; values that were not finite are left out.
    pub points: Vec<(u64, f64)>,
}

impl Series {
    /// The last value.
    pub fn last(&self) -> Option<f64> {
        self.points.last().map(|point| point.1)
    }
}

/// What the model wrote when it was asked, as `samples.jsonl` has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Optimizer steps done before.
    pub step: u64,
    /// The prompt.
    pub prompt: String,
    /// What the model wrote.
    pub text: String,
    /// What the data has there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted: Option<String>,
    /// Why it ended: `stop` at an end token, `length` at the limit, `time` when time was up.
    #[serde(default)]
    pub finish_reason: String,
}

/// A run.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// The folder, as it was named.
    pub dir: PathBuf,
    /// Every number of `metrics.jsonl`, in the order in which they first come.
    pub series: Vec<Series>,
    /// The resolved configuration: dotted keys and values as TOML, in its order.
    pub config: Vec<(String, String)>,
    /// What it says of itself; none for a run that was written before there was such a file.
    pub about: Option<About>,
    /// What the model wrote.
    pub samples: Vec<Sample>,
}

impl Run {
    /// Reads a run's folder, of a run that is over or goes on. A last line that is not whole yet is passed over.
    ///
    /// # Errors
    /// [`Error::NoRun`] where the folder has no metrics or no configuration, [`Error::Line`] and [`Error::Broken`] for a
    /// file that is not what a run writes, [`Error::Io`] for one that cannot be read.
    pub fn read(dir: &Path) -> Result<Self> {
        let (metrics, config) = (needed(dir, METRICS_FILE)?, needed(dir, CONFIG_FILE)?);
        let path = dir.join(RUN_FILE);
        let about = match optional(&path)? {
            None => None,
            Some(text) => Some(
                serde_json::from_str(&text).map_err(|e| Error::Broken { path: path.clone(), reason: e.to_string() })?,
            ),
        };
        let samples = dir.join(SAMPLES_FILE);
        Ok(Self {
            series: series(&lines::<Map<String, Value>>(&dir.join(METRICS_FILE), &metrics)?, &dir.join(METRICS_FILE))?,
            config: flat_config(&config, &dir.join(CONFIG_FILE))?,
            samples: optional(&samples)?.map_or(Ok(Vec::new()), |text| lines(&samples, &text))?,
            about,
            dir: dir.to_path_buf(),
        })
    }

    /// What the run is called: the last part of its folder's name.
    pub fn name(&self) -> String {
        let whole = || self.dir.display().to_string();
        self.dir.file_name().map_or_else(whole, |name| name.to_string_lossy().into_owned())
    }

    /// A figure by its name.
    pub fn series(&self, name: &str) -> Option<&Series> {
        self.series.iter().find(|series| series.name == name)
    }
}

/// The text of a file that every run has.
fn needed(dir: &Path, file: &'static str) -> Result<String> {
    optional(&dir.join(file))?.ok_or_else(|| Error::NoRun { path: dir.to_path_buf(), file })
}

fn optional(path: &Path) -> Result<Option<String>> {
    match std::fs::read(path) {
        // The end of a line that is being written may cut a character in two.
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(Error::io("read", path)(e)),
    }
}

/// The lines of a file, each a JSON document; a last one without a line end may be torn.
fn lines<T: for<'a> Deserialize<'a>>(path: &Path, text: &str) -> Result<Vec<T>> {
    let mut all = Vec::new();
    for (i, line) in text.split_inclusive('\n').enumerate() {
        match serde_json::from_str(line) {
            Ok(value) => all.push(value),
            Err(_) if !line.ends_with('\n') => break,
            Err(e) => return Err(Error::Line { path: path.to_path_buf(), line: i + 1, reason: e.to_string() }),
        }
    }
    Ok(all)
}

fn series(lines: &[Map<String, Value>], path: &Path) -> Result<Vec<Series>> {
    let (mut all, mut places): (Vec<Series>, BTreeMap<&str, usize>) = (Vec::new(), BTreeMap::new());
    for (i, line) in lines.iter().enumerate() {
        let step = line.get("step").and_then(Value::as_u64).ok_or_else(|| Error::Line {
            path: path.to_path_buf(),
            line: i + 1,
            reason: "the line has no step".into(),
        })?;
        for (name, value) in line.iter().filter(|(name, _)| *name != "step") {
            // A number that is not finite was written as null; the figure is there all the same.
            if !value.is_number() && !value.is_null() {
                continue;
            }
            let at = *places.entry(name).or_insert_with(|| {
                all.push(Series { name: name.clone(), points: Vec::new() });
                all.len() - 1
            });
            all[at].points.extend(value.as_f64().map(|value| (step, value)));
        }
    }
    Ok(all)
}

fn flat_config(text: &str, path: &Path) -> Result<Vec<(String, String)>> {
    let broken = |e: toml::de::Error| Error::Broken { path: path.to_path_buf(), reason: e.message().to_string() };
    let table: toml::Table = text.parse().map_err(broken)?;
    let mut flat = Vec::new();
    for (name, value) in table {
        match value {
            toml::Value::Table(section) => {
                flat.extend(section.iter().map(|(key, value)| (format!("{name}.{key}"), value.to_string())));
            }
            value => flat.push((name, value.to_string())),
        }
    }
    Ok(flat)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::fs;

    /// A folder with these files.
    pub(crate) fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    const CONFIG: (&str, &str) = (CONFIG_FILE, "seed = 3\n[train]\nmax_steps = 7\n");

    #[test]
    fn every_number_is_a_series_and_a_torn_line_is_passed_over() {
        let text = "{\"step\":0,\"eval_loss\":2.5,\"eval_tokens\":7}\n{\"step\":1,\"loss\":2.0,\"word\":\"x\"}\n\
                    {\"step\":2,\"loss\":null,\"reward_margin\":-1.5}\n{\"step\":3,\"loss\":1.5}\n{\"step\":4,\"lo\u{fffd}";
        let dir = folder(&[(METRICS_FILE, text), CONFIG]);
        let run = Run::read(dir.path()).unwrap();
        let names: Vec<&str> = run.series.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["eval_loss", "eval_tokens", "loss", "reward_margin"]);
        assert_eq!(run.series("loss").unwrap().points, [(1, 2.0), (3, 1.5)]);
        assert_eq!(run.series("reward_margin").unwrap().last(), Some(-1.5));
        assert_eq!(run.config, [("seed".into(), "3".into()), ("train.max_steps".into(), "7".into())]);
        assert!(run.about.is_none() && run.samples.is_empty());
    }

    #[test]
    fn a_run_that_has_only_begun_is_read() {
        let dir = folder(&[(METRICS_FILE, ""), CONFIG]);
        assert!(Run::read(dir.path()).unwrap().series.is_empty());
    }

    #[test]
    fn what_is_missing_or_broken_is_named() {
        let fault = |files: &[(&str, &str)]| Run::read(folder(files).path()).unwrap_err();
        let whole = (METRICS_FILE, "{\"step\":1,\"loss\":1}\n");
        for (files, words) in [
            (vec![CONFIG], vec!["metrics.jsonl", "output_dir"]),
            (vec![whole], vec!["config.resolved.toml"]),
            (vec![(METRICS_FILE, "{\"step\":1}\nno\n{\"step\":2}\n"), CONFIG], vec!["metrics.jsonl:2:"]),
            (vec![(METRICS_FILE, "{\"step\":1}\n{\"loss\":2}\n"), CONFIG], vec!["metrics.jsonl:2:", "no step"]),
            (vec![whole, (CONFIG_FILE, "seed = \n")], vec!["config.resolved.toml"]),
            (vec![whole, CONFIG, (RUN_FILE, "{")], vec!["run.json"]),
            (vec![whole, CONFIG, (SAMPLES_FILE, "{\"step\":0}\n")], vec!["samples.jsonl:1:", "prompt"]),
        ] {
            let e = fault(&files);
            assert!(e.is_usage() && words.iter().all(|word| e.to_string().contains(word)), "{e}");
        }
        let e = Run::read(Path::new("no/such/folder")).unwrap_err();
        assert!(e.is_usage() && e.to_string().contains("no/such/folder"), "{e}");
    }

    #[test]
    fn the_file_of_another_version_is_read_for_what_it_has() {
        let about = "{\"status\":\"stopped\",\"step\":5,\"later\":true}";
        let dir = folder(&[(METRICS_FILE, ""), CONFIG, (RUN_FILE, about)]);
        let about = Run::read(dir.path()).unwrap().about.unwrap();
        assert_eq!((about.status.name(), about.step, about.total_steps), ("stopped", 5, 0));
    }
}
