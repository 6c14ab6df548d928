//! How good answers are: exact, and by the values that they must name.

use crate::failure::usage;
use crate::generator::{Generator, SamplingArgs};
use crate::progress::CountBar;
use crate::prompt::Prompt;
use anyhow::Result;
use lora_data::Tokenizer;
use lora_model::Decoder;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Most tokens of an answer.
const MAX_NEW_TOKENS: usize = 96;

/// A question, its answer, and what the answer must name.
#[derive(Debug, Deserialize)]
struct Test {
    prompt: String,
    completion: String,
    slots: Vec<String>,
}

/// Questions that were not trained on.
#[derive(Debug)]
pub(super) struct TestSet(Vec<Test>);

/// How a model did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Score {
    /// Share of the answers that are the wanted ones to the letter.
    pub(super) exact_match: f64,
    /// Share of the slots whose value occurs in the answer.
    pub(super) slot_accuracy: f64,
    /// Slots in all.
    pub(super) slots: usize,
    /// The answers, in order.
    pub(super) answers: Vec<String>,
}

impl TestSet {
    /// Reads a JSONL file of `prompt`, `completion`, `slots`.
    ///
    /// # Errors
    /// A file that cannot be read, and a record that is not one, by its line.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).map_err(|e| usage(format!("{}: cannot be read: {e}", path.display())))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let record = |(i, line)| {
            serde_json::from_str(line)
                .map_err(|e| usage(format!("{}:{}: not a test record: {e}", path.display(), i + 1)))
        };
        let tests: Vec<Test> = lines.map(record).collect::<Result<_>>()?;
        if tests.is_empty() {
            return Err(usage(format!("{}: holds no record", path.display())));
        }
        Ok(Self(tests))
    }

    /// How many questions there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// A question and its wanted answer.
    pub(super) fn question(&self, i: usize) -> (&str, &str) {
        (&self.0[i].prompt, &self.0[i].completion)
    }

    /// Lets a model answer, always with the most likely token.
    ///
    /// # Errors
    /// What the model reports.
    pub(super) fn score(&self, model: &Decoder, tokenizer: &Tokenizer) -> Result<Score> {
        let greedy = SamplingArgs { temperature: 0.0, top_p: 1.0, seed: 0, stop: Vec::new() };
        let generator = Generator::new(model, tokenizer);
        let mut bar = CountBar::new("answering");
        let mut answers = Vec::with_capacity(self.len());
        for (i, test) in self.0.iter().enumerate() {
            bar.set(i, self.len());
            let ids = Prompt::Text(test.prompt.clone()).encode(tokenizer, true)?;
            answers.push(generator.run(&ids, MAX_NEW_TOKENS, &greedy, &mut |_| Ok(true))?.text);
        }
        bar.finish();
        Ok(self.judge(answers))
    }

    fn judge(&self, answers: Vec<String>) -> Score {
        let pairs = || self.0.iter().zip(&answers);
        let exact = pairs().filter(|(test, answer)| answer.trim() == test.completion.trim()).count();
        let slots = self.0.iter().map(|test| test.slots.len()).sum::<usize>();
        let named: usize =
            pairs().map(|(test, answer)| test.slots.iter().filter(|slot| answer.contains(slot.as_str())).count()).sum();
        Score {
            exact_match: exact as f64 / self.len().max(1) as f64,
            slot_accuracy: named as f64 / slots.max(1) as f64,
            slots,
            answers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_judged_by_letter_and_by_slot() {
        let test = |completion: &str, slots: &[&str]| Test {
            prompt: String::new(),
            completion: completion.into(),
            slots: slots.iter().map(|s| (*s).to_string()).collect(),
        };
        let set = TestSet(vec![test("a pub by the mill", &["pub", "mill"]), test("a cheap café", &["café", "cheap"])]);
        let score = set.judge(vec![" a pub by the mill\n".into(), "a cheap house".into()]);
        assert_eq!((score.exact_match, score.slot_accuracy, score.slots), (0.5, 0.75, 4));
    }

    #[test]
    fn a_broken_record_is_named_by_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("test.jsonl");
        std::fs::write(&path, "{\"prompt\":\"\",\"completion\":\"\",\"slots\":[]}\n{\"prompt\":1}\n").unwrap();
        assert!(TestSet::read(&path).unwrap_err().to_string().contains("test.jsonl:2"));
    }
}
