//! `metrics.jsonl`: a line of JSON for every optimizer step and every evaluation.

use crate::comparing::Rewards;
use crate::error::{Error, Result};
use crate::eval::EvalReport;
use crate::run::EndedBy;
use lora_data::Scores;
use serde::{Deserialize, Serialize, Serializer};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The name of the file in a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// The metrics of an optimizer step. Numbers that are not finite are written as `null`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepRecord {
    /// Optimizer steps done, this one included.
    pub step: u64,
    /// Passes over the data, with the part of the present one.
    pub epoch: f64,
    /// Sum of the loss over the step's trained tokens, over their number; with AdaLoRA's regulariser, where that is trained.
    pub loss: f64,
    /// Common 2-norm of the gradients before they were clipped.
    pub grad_norm: f64,
    /// Triplets that AdaLoRA's schedule allows after this step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank_budget: Option<u64>,
    /// Of answers that are compared or rated.
    #[serde(flatten)]
    pub rewards: Option<Rewards>,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Tokens with a loss in this step.
    pub trained_tokens: u64,
    /// Tokens computed in this step.
    pub tokens: u64,
    /// Seconds since the run started, without the time between its parts.
    pub seconds: f64,
    /// Seconds of the step in which it waited for its batches.
    pub data_seconds: f64,
    /// Tokens computed per second in this step.
    pub tokens_per_second: f64,
    /// Most bytes in use so far, on the device that computes.
    pub peak_memory_bytes: u64,
}

/// The metrics of an evaluation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvalRecord {
    /// Optimizer steps done before it.
    pub step: u64,
    /// Sum of the loss over the trained tokens of the evaluation data, over their number.
    pub eval_loss: f64,
    /// Tokens with a loss; texts, of a classifier.
    pub eval_tokens: u64,
    /// `exp(eval_loss)`, of a language model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_perplexity: Option<f64>,
    /// Share of the trained tokens that a language model ranks first; of the texts that a classifier gives the right label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_accuracy: Option<f64>,
    /// Mean over the labels of a classifier's F1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_macro_f1: Option<f64>,
    /// Of answers that are compared or rated.
    #[serde(flatten, serialize_with = "with_eval_names")]
    pub rewards: Option<Rewards>,
    /// Of answers that the model writes: `eval_bleu`, `eval_chrf`, `eval_rouge_l`, `eval_exact_match`.
    #[serde(flatten, serialize_with = "scores_with_eval_names")]
    pub generated: Option<Scores>,
}

impl EvalRecord {
    /// The record of an evaluation.
    pub fn of(report: &EvalReport, step: u64) -> Self {
        let language = report.classes.is_none() && report.rewards.is_none();
        Self {
            step,
            eval_loss: report.loss,
            eval_tokens: report.tokens,
            eval_perplexity: language.then_some(report.perplexity),
            eval_accuracy: report.classes.map_or(language.then_some(report.accuracy), |c| c.accuracy),
            eval_macro_f1: report.classes.and_then(|c| c.macro_f1),
            rewards: report.rewards,
            generated: report.generated,
        }
    }
}

fn scores_with_eval_names<S: Serializer>(
    scores: &Option<Scores>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    let named = |s: &Scores| {
        [("eval_bleu", s.bleu), ("eval_chrf", s.chrf), ("eval_rouge_l", s.rouge_l), ("eval_exact_match", s.exact_match)]
    };
    serializer.collect_map(scores.iter().flat_map(named))
}

fn with_eval_names<S: Serializer>(rewards: &Option<Rewards>, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    let named = rewards.iter().flat_map(Rewards::named);
    serializer.collect_map(named.map(|(name, value)| (format!("eval_{name}"), value)))
}

/// The last line of a start of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EndRecord {
    /// Optimizer steps done.
    pub step: u64,
    /// Why it ended.
    pub ended_by: EndedBy,
}

/// What must be known of a line to tell whether it is kept.
#[derive(Deserialize)]
struct Line {
    step: u64,
    /// The end of an earlier start, which was none.
    ended_by: Option<String>,
}

/// Appends to a run's `metrics.jsonl`. Every record reaches the system as one write, so a killed run leaves at most its last
/// line torn.
#[derive(Debug)]
pub struct MetricsWriter {
    file: File,
    path: PathBuf,
    length: u64,
}

impl MetricsWriter {
    /// Starts an empty file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be made.
    pub fn create(run_dir: &Path) -> Result<Self> {
        let path = run_dir.join(METRICS_FILE);
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        Ok(Self { file, path, length: 0 })
    }

    /// Goes on with the file of a run whose checkpoint has done `step` optimizer steps: lines of later steps are cut off,
    /// and so is a torn end. A missing file is started anew. Write the evaluation of a step before its checkpoint, so that
    /// the checkpoint's own evaluation is among the lines that stay.
    ///
    /// # Errors
    /// [`Error::Metrics`] when lines that should stay lie behind a broken or later one, [`Error::Io`] when the file cannot
    /// be read or cut.
    pub fn resume(run_dir: &Path, step: u64) -> Result<Self> {
        let path = run_dir.join(METRICS_FILE);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        let length = kept_length(&file, &path, step)?;
        file.set_len(length).and_then(|()| file.sync_all()).map_err(Error::io("cut back", &path))?;
        file.seek(SeekFrom::Start(length)).map_err(Error::io("open", &path))?;
        Ok(Self { file, path, length })
    }

    /// Appends the line of an optimizer step.
    ///
    /// # Errors
    /// [`Error::Io`] when the line was not written; the file then ends with the line before, and later lines may be tried.
    pub fn write_step(&mut self, record: &StepRecord) -> Result<()> {
        self.write(record)
    }

    /// Appends the line of an evaluation.
    ///
    /// # Errors
    /// As [`MetricsWriter::write_step`].
    pub fn write_eval(&mut self, record: &EvalRecord) -> Result<()> {
        self.write(record)
    }

    /// Appends the line that says why the run ended; a run that goes on takes it away again.
    ///
    /// # Errors
    /// As [`MetricsWriter::write_step`].
    pub fn write_end(&mut self, record: &EndRecord) -> Result<()> {
        self.write(record)
    }

    /// Brings the lines to the disk. To be called before a checkpoint is saved, so that no line of a saved step can be lost.
    ///
    /// # Errors
    /// [`Error::Io`] when the system says they may not be there.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("sync", &self.path))
    }

    fn write(&mut self, record: &impl Serialize) -> Result<()> {
        // serde_json writes numbers that are not finite as null, which is what JSON has for them.
        let mut line = serde_json::to_vec(record).map_err(|source| Error::Json { what: "a metrics line", source })?;
        line.push(b'\n');
        // An earlier failure may have left part of a line behind.
        self.file.seek(SeekFrom::Start(self.length)).map_err(Error::io("write", &self.path))?;
        if let Err(source) = self.file.write_all(&line) {
            // Best effort: the next write starts at the same place.
            let _ = self.file.set_len(self.length);
            return Err(Error::Io { action: "write", path: self.path.clone(), source });
        }
        self.length += line.len() as u64;
        Ok(())
    }
}

/// Bytes of the lines up to `step`.
fn kept_length(file: &File, path: &Path, step: u64) -> Result<u64> {
    let mut reader = BufReader::new(file);
    let (mut kept, mut offset, mut line) = (0, 0, Vec::new());
    let mut cut: Option<(usize, &'static str)> = None;
    for number in 1.. {
        line.clear();
        let read = reader.read_until(b'\n', &mut line).map_err(Error::io("read", path))?;
        if read == 0 {
            break;
        }
        offset += read as u64;
        let parsed = line.ends_with(b"\n").then(|| serde_json::from_slice::<Line>(&line).ok()).flatten();
        match (parsed, cut) {
            (Some(parsed), None) if parsed.step <= step && parsed.ended_by.is_none() => kept = offset,
            (Some(parsed), Some((line, reason))) if parsed.step <= step => {
                return Err(Error::Metrics { path: path.to_path_buf(), line, reason });
            }
            (Some(_), None) => cut = Some((number, "a line of a later step comes before lines of earlier ones")),
            (None, None) => cut = Some((number, "a line is not JSON with a step, and lines that count follow it")),
            (_, Some(_)) => {}
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    fn record(step: u64, loss: f64) -> StepRecord {
        StepRecord {
            step,
            epoch: step as f64 / 8.0,
            loss,
            grad_norm: 1.5,
            rank_budget: None,
            rewards: None,
            learning_rate: 2e-4,
            trained_tokens: 10,
            tokens: 20,
            seconds: 0.25,
            tokens_per_second: 80.0,
            data_seconds: 0.0,
            peak_memory_bytes: 1 << 20,
        }
    }

    fn evaluation(step: u64) -> EvalRecord {
        EvalRecord::of(&EvalReport { loss: f64::INFINITY, tokens: 7, ..EvalReport::default() }, step)
    }

    #[test]
    fn an_evaluation_has_the_figures_of_what_is_trained() {
        let keys = |report: EvalReport| {
            let line = serde_json::to_value(EvalRecord::of(&report, 3)).unwrap();
            line.as_object().unwrap().keys().skip(3).cloned().collect::<Vec<_>>().join(", ")
        };
        let usual = EvalReport { loss: 1.0, perplexity: 1f64.exp(), accuracy: 0.5, tokens: 2, ..EvalReport::default() };
        let generated = Some(Scores { bleu: 12.0, texts: 1, ..Scores::default() });
        let written = "eval_perplexity, eval_accuracy, eval_bleu, eval_chrf, eval_rouge_l, eval_exact_match";
        assert_eq!(keys(EvalReport { generated, ..usual }), written);
        let classes = Some(crate::ClassScores { accuracy: Some(0.5), macro_f1: Some(0.25), ..Default::default() });
        assert_eq!(keys(EvalReport { classes, ..usual }), "eval_accuracy, eval_macro_f1");
        let rewards = Some(Rewards { margin: Some(1.0), ..Default::default() });
        assert_eq!(keys(EvalReport { rewards, ..usual }), "eval_reward_margin");
    }

    fn lines(dir: &Path) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(dir.join(METRICS_FILE)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_line_has_the_fields_of_the_contract_and_is_json_whatever_the_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::create(dir.path()).unwrap();
        writer.write_step(&record(1, f64::NAN)).unwrap();
        writer.write_eval(&evaluation(1)).unwrap();
        writer.write_step(&record(2, 0.1 + 0.2)).unwrap();
        writer.sync().unwrap();
        let lines = lines(dir.path());
        let keys = |i: usize| lines[i].as_object().unwrap().keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        assert_eq!(
            keys(0),
            "step, epoch, loss, grad_norm, learning_rate, trained_tokens, tokens, seconds, data_seconds, tokens_per_second, peak_memory_bytes"
        );
        assert_eq!(keys(1), "step, eval_loss, eval_tokens, eval_perplexity, eval_accuracy");
        assert!(lines[0]["loss"].is_null() && lines[1]["eval_loss"].is_null());
        assert_eq!(lines[2]["loss"].as_f64(), Some(0.1 + 0.2));
    }

    #[test]
    fn the_end_of_a_run_is_its_last_line_until_it_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::create(dir.path()).unwrap();
        writer.write_step(&record(1, 1.0)).unwrap();
        writer.write_end(&EndRecord { step: 1, ended_by: EndedBy::MaxTime }).unwrap();
        assert_eq!(lines(dir.path())[1].to_string(), "{\"step\":1,\"ended_by\":\"max_time\"}");
        MetricsWriter::resume(dir.path(), 1).unwrap().write_step(&record(2, 1.0)).unwrap();
        let left = lines(dir.path());
        assert_eq!(left.iter().map(|l| l["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
        assert!(left.iter().all(|line| line.get("ended_by").is_none()));
    }

    #[test]
    fn a_missing_file_is_started_anew() {
        let dir = tempfile::tempdir().unwrap();
        MetricsWriter::resume(dir.path(), 5).unwrap().write_step(&record(6, 1.0)).unwrap();
        assert_eq!(lines(dir.path()).len(), 1);
    }

    #[test]
    fn damage_before_lines_that_count_is_refused_and_the_file_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        for (text, line) in [("{\"step\":1}\n{\"st\n{\"step\":2}\n", 2), ("{\"step\":9}\n{\"step\":2}\n", 1)] {
            fs::write(&path, text).unwrap();
            let e = MetricsWriter::resume(dir.path(), 5).unwrap_err().to_string();
            assert!(e.contains(&format!("metrics.jsonl:{line}:")), "{e}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn a_failed_write_leaves_no_torn_line_in_the_middle() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::create(dir.path()).unwrap();
        writer.write_step(&record(1, 1.0)).unwrap();
        // A full disk: part of a line got through, and cutting it off failed too.
        fs::OpenOptions::new()
            .append(true)
            .open(dir.path().join(METRICS_FILE))
            .unwrap()
            .write_all(b"{\"step\":2,\"ep")
            .unwrap();
        writer.write_step(&record(3, 1.0)).unwrap();
        assert_eq!(lines(dir.path()).iter().map(|l| l["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 3]);
    }

    #[test]
    fn a_full_disk_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/full", dir.path().join(METRICS_FILE)).unwrap();
        let mut writer = MetricsWriter::create(dir.path()).unwrap();
        for _ in 0..2 {
            let e = writer.write_step(&record(1, 1.0)).unwrap_err().to_string();
            assert!(e.contains(METRICS_FILE) && e.contains("os error 28"), "{e}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        /// However a run of ten steps with an evaluation every third is cut off, resuming at a step gives the same file as
        /// a run that was never cut off.
        #[test]
        fn resumed_equals_uninterrupted(step in 0u64..=10, cut in 0.0f64..1.0) {
            fn write(writer: &mut MetricsWriter, from: u64) {
                for step in from..=10 {
                    writer.write_step(&record(step, 1.0 / step as f64)).unwrap();
                    if step % 3 == 0 {
                        writer.write_eval(&evaluation(step)).unwrap();
                    }
                }
            }
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(METRICS_FILE);
            write(&mut MetricsWriter::create(dir.path()).unwrap(), 1);
            let whole = fs::read(&path).unwrap();
            // Lines up to the checkpoint are on the disk; what follows is lost from any byte on.
            let saved: usize = String::from_utf8(whole.clone()).unwrap().split_inclusive('\n')
                .filter(|l| serde_json::from_str::<Line>(l).unwrap().step <= step).map(str::len).sum();
            let left = saved + ((whole.len() - saved) as f64 * cut) as usize;
            fs::write(&path, &whole[..left]).unwrap();
            write(&mut MetricsWriter::resume(dir.path(), step).unwrap(), step + 1);
            prop_assert_eq!(fs::read(&path).unwrap(), whole);
        }
    }
}
