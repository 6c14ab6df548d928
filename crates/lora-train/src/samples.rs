//! Samples: a few prompts, answered before the first step and after the last.

use crate::answering::stop_ids;
use crate::error::{Error, Result};
use crate::events::{Event, EventSink};
use crate::plan::RunPlan;
use crate::speed::{operations_per_step, share_of_matrix_rate};
use crate::trainer::Trainer;
use lora_data::{Example, Format, StreamDecoder, Tokenizer};
use lora_format::write_atomic;
use lora_model::{GenerateOptions, Sampling};
use lora_report::{SAMPLES_FILE, Sample};
use serde_json::{Map, json};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Of a text without a prompt of its own, so many tokens are the prompt at most.
const BEGINNING: usize = 32;
/// Examples with a longer prompt are not asked: reading it would take longer than the answer.
const LONGEST_PROMPT: usize = 1024;
/// Examples that are looked at for prompts.
const LOOKED_AT: usize = 1000;
/// Answers may take this share of the time that the run is expected to take, at least and at most so many seconds.
const SHARE_OF_RUN: f64 = 0.01;
const LEAST_SECONDS: f64 = 5.0;
const MOST_SECONDS: f64 = 60.0;

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
struct Question {
    prompt: Vec<u32>,
    /// As it is shown.
    shown: String,
    wanted: Option<String>,
}

/// What a run asks its model.
#[derive(Debug)]
pub(crate) struct Samples {
    questions: Vec<Question>,
    max_new_tokens: usize,
    seconds: f64,
}

impl Samples {
    /// The questions of a run: those of the configuration, or of the first examples. A classifier answers none, and neither do
    /// the stages of a divided model.
    ///
    /// # Errors
    /// What the tokenizer or the chat template says of a prompt of the configuration.
    pub(crate) fn of(plan: &RunPlan) -> Result<Self> {
        let config = &plan.config.train;
        let max_new_tokens = config.sample_max_new_tokens as usize;
        let questions = match (config.sample_count as usize, plan.model.labels.is_some() || config.pipeline_stages > 1)
        {
            (0, _) | (_, true) => Vec::new(),
            _ if !config.sample_prompts.is_empty() => {
                config.sample_prompts.iter().map(|text| asked(plan, text)).collect::<Result<_>>()?
            }
            (count, _) => from_examples(plan, count, max_new_tokens)?,
        };
        Ok(Self { questions, max_new_tokens, seconds: LEAST_SECONDS })
    }

    /// Sets how long answers may take, from the operations of the run and the machine's rate.
    pub(crate) fn allow(&mut self, trainer: &Trainer, matrix_rate: Option<f64>) {
        let Some(matrix_rate) = matrix_rate else { return };
        let plan = trainer.plan();
        let rate = share_of_matrix_rate(plan.device) * matrix_rate;
        let run = operations_per_step(plan) * plan.total_steps as f64 / rate;
        self.seconds = (SHARE_OF_RUN * run).clamp(LEAST_SECONDS, MOST_SECONDS);
    }

    /// Asks the model as it stands and writes what it says in place of what the file has of this step and later ones. It
    /// takes the most likely token each time, so no random number is drawn. When the run is to `stop`, answers end where
    /// they are. A run never fails for its samples.
    pub(crate) fn take(&self, trainer: &Trainer, stop: &AtomicBool, sink: &mut dyn EventSink) {
        if self.questions.is_empty() {
            return;
        }
        if let Err(e) = self.answers(trainer, stop, sink).and_then(|samples| write(trainer, &samples)) {
            sink.event(Event::Note(format!("there are no samples of step {}: {e}", trainer.state().step)));
        }
    }

    fn answers(&self, trainer: &Trainer, stop: &AtomicBool, sink: &mut dyn EventSink) -> Result<Vec<Sample>> {
        let until = Instant::now() + Duration::from_secs_f64(self.seconds);
        let mut samples = Vec::new();
        for (done, question) in self.questions.iter().enumerate() {
            if stop.load(Ordering::Relaxed) || (done > 0 && Instant::now() > until) {
                break;
            }
            let of = self.questions.len();
            sink.event(Event::Sampling { done, of });
            // What is left of the time is shared among the prompts that are left.
            let now = Instant::now();
            let share = until.saturating_duration_since(now) / u32::try_from(of - done).unwrap_or(u32::MAX);
            samples.push(self.answer(trainer, question, now + share, stop)?);
        }
        Ok(samples)
    }

    fn answer(&self, trainer: &Trainer, question: &Question, until: Instant, stop: &AtomicBool) -> Result<Sample> {
        let (model, tokenizer) = (trainer.model(), &trainer.plan().tokenizer);
        let stop_ids = stop_ids(model, tokenizer);
        let options = GenerateOptions {
            max_new_tokens: self.max_new_tokens,
            stop_ids: stop_ids.clone(),
            sampling: Sampling { temperature: 0.0, top_p: 1.0, seed: 0 },
        };
        let prompt: Vec<i64> = question.prompt.iter().map(|id| i64::from(*id)).collect();
        let mut late = false;
        let ids = model.generate(&prompt, &options, |_| {
            late = Instant::now() > until || stop.load(Ordering::Relaxed);
            !late
        })?;
        let ended = ids.last().is_some_and(|id| stop_ids.contains(id));
        let finish_reason = match (ended, late) {
            (true, _) => "stop",
            (_, true) => "time",
            _ => "length",
        };
        Ok(Sample {
            step: trainer.state().step,
            prompt: question.shown.clone(),
            text: text_after(tokenizer, &question.prompt, &ids[..ids.len() - usize::from(ended)])?,
            wanted: question.wanted.clone(),
            finish_reason: finish_reason.into(),
        })
    }
}

/// The text of new tokens, joined to the prompt without a lost space.
fn text_after(tokenizer: &Tokenizer, prompt: &[u32], ids: &[i64]) -> Result<String> {
    let mut decoder = StreamDecoder::after(tokenizer, true, prompt);
    let mut text = String::new();
    for id in ids.iter().filter_map(|id| u32::try_from(*id).ok()) {
        text.extend(decoder.push(id)?);
    }
    text.extend(decoder.finish()?);
    Ok(text)
}

/// A prompt of the configuration: a user's message where there is a template and the data is not plain text.
fn asked(plan: &RunPlan, text: &str) -> Result<Question> {
    let plain = |format| matches!(format, Format::PromptCompletion | Format::Text | Format::Tokenized);
    let raw = plan.train_report.sources.iter().any(|source| plain(source.format));
    let tokenizer = &plan.tokenizer;
    let prompt = match tokenizer.template().filter(|_| !raw) {
        Some(template) => {
            let message = [json!({"role": "user", "content": text})];
            tokenizer.encode(&template.render(&message, None, true, &Map::new())?, false)?
        }
        None => without_end(tokenizer, tokenizer.encode(text, true)?),
    };
    Ok(Question { prompt, shown: text.to_string(), wanted: None })
}

/// Some tokenizers put an end token behind every text; a prompt has none.
fn without_end(tokenizer: &Tokenizer, mut ids: Vec<u32>) -> Vec<u32> {
    if ids.len() > 1 && ids.last().copied() == tokenizer.eos_token_id() {
        ids.pop();
    }
    ids
}

/// The first examples of the evaluation data, or of the training data: of answers that are compared the better ones.
fn from_examples(plan: &RunPlan, count: usize, max_new_tokens: usize) -> Result<Vec<Question>> {
    let held_out = !plan.eval.is_empty();
    let rows = if held_out { &plan.eval } else { &plan.train };
    let answers = plan.answers.as_ref().map(|[train, eval]| if held_out { eval } else { train });
    let good = |row: usize| answers.is_none_or(|answers| answers.good.get(row).copied().unwrap_or(false));
    let mut questions: Vec<Question> = Vec::new();
    for row in (0..rows.len().min(LOOKED_AT)).filter(|row| good(*row)) {
        if questions.len() == count {
            break;
        }
        let Some((prompt, wanted)) = parts(&rows.example(row)?, max_new_tokens) else { continue };
        let shown = plan.tokenizer.decode(&prompt, false)?;
        if questions.iter().all(|other| other.shown != shown) {
            let wanted = Some(plan.tokenizer.decode(&wanted, true)?);
            questions.push(Question { prompt, shown, wanted });
        }
    }
    Ok(questions)
}

/// The tokens before the first answer, and that answer. Of a text that is trained whole, its beginning and what follows.
fn parts(example: &Example, max_new_tokens: usize) -> Option<(Vec<u32>, Vec<u32>)> {
    let (ids, trained) = (&example.input_ids, &example.trained);
    let begin = trained.iter().position(|trained| *trained)?;
    let (begin, end) = match begin {
        0 | 1 => {
            let begin = (ids.len() / 2).min(BEGINNING);
            (begin, ids.len().min(begin + max_new_tokens))
        }
        _ => (begin, trained[begin..].iter().position(|trained| !trained).map_or(ids.len(), |n| begin + n)),
    };
    (1..=LONGEST_PROMPT).contains(&begin).then(|| (ids[..begin].to_vec(), ids[begin..end].to_vec()))
}

/// Puts the samples of a step into the file, behind those of earlier steps.
fn write(trainer: &Trainer, samples: &[Sample]) -> Result<()> {
    let path = trainer.plan().config.output_dir.join(SAMPLES_FILE);
    let mut lines = match trainer.state().step {
        0 => String::new(),
        step => earlier(&path, step)?,
    };
    for sample in samples {
        lines += &serde_json::to_string(sample).map_err(|source| Error::Json { what: "a sample", source })?;
        lines.push('\n');
    }
    Ok(write_atomic(&path, lines.as_bytes())?)
}

/// The lines of earlier steps.
fn earlier(path: &Path, step: u64) -> Result<String> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(Error::io("read", path)(e)),
    };
    let before = |line: &&str| serde_json::from_str::<Sample>(line).is_ok_and(|sample| sample.step < step);
    Ok(text.split_inclusive('\n').filter(before).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_data::Origin;

    fn example(trained: &str) -> Example {
        let trained: Vec<bool> = trained.chars().map(|c| c == '1').collect();
        Example {
            input_ids: (0..trained.len() as u32).collect(),
            trained,
            origin: Origin { file: Path::new("f").into(), record: 1, line: 1 },
        }
    }

    #[test]
    fn a_prompt_is_what_comes_before_the_first_answer() {
        let of = |trained: &str| parts(&example(trained), 3);
        assert_eq!(of("000110011"), Some((vec![0, 1, 2], vec![3, 4])));
        assert_eq!(of("0011"), Some((vec![0, 1], vec![2, 3])));
        // Trained whole: the first half, and as much as an answer may have.
        assert_eq!(of("0111111111"), Some((vec![0, 1, 2, 3, 4], vec![5, 6, 7])));
        assert_eq!(of("0000"), None);
        assert_eq!(of("1"), None);
    }

    #[test]
    fn lines_of_earlier_steps_stay_and_others_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SAMPLES_FILE);
        assert_eq!(earlier(&path, 5).unwrap(), "");
        let line = |step: u64| format!("{}\n", serde_json::to_string(&Sample { step, ..Sample::default() }).unwrap());
        std::fs::write(&path, format!("{}{}{}torn", line(0), line(3), line(5))).unwrap();
        assert_eq!(earlier(&path, 5).unwrap(), line(0) + &line(3));
    }
}
