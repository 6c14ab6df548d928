//! What answers are worth: a function of the caller's, a comparison with the right answer, or a program.

mod command;

pub use command::RewardCommand;

use crate::config::{ObjectiveConfig, RewardName};
use lora_data::{Scores, Written};
use std::time::Duration;

/// An answer that the model wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Completion<'a> {
    /// The prompt as text, special tokens included.
    pub prompt: &'a str,
    /// The answer as text, without special tokens.
    pub completion: &'a str,
    /// The answer that stands in the example.
    pub answer: &'a str,
    /// Whether it came to its end, and was not cut.
    pub ended: bool,
}

/// What went wrong while answers were rewarded.
pub type RewardFault = Box<dyn std::error::Error + Send + Sync>;

/// Says what answers are worth; the more the better. A closure from answers to numbers is one.
pub trait Reward: Send {
    /// A number for each answer, in their order.
    ///
    /// # Errors
    /// Whatever keeps it from telling; the run then ends, with its last whole step saved.
    fn score(&mut self, answers: &[Completion<'_>]) -> Result<Vec<f64>, RewardFault>;
}

impl<F: FnMut(&[Completion<'_>]) -> Vec<f64> + Send> Reward for F {
    fn score(&mut self, answers: &[Completion<'_>]) -> Result<Vec<f64>, RewardFault> {
        Ok(self(answers))
    }
}

/// What a configuration names; `None` where it names nothing. A program is started.
pub(crate) fn reward_of(config: &ObjectiveConfig) -> Result<Option<Box<dyn Reward>>, RewardFault> {
    let each = |of: fn(&Completion<'_>) -> f64| -> Box<dyn Reward> {
        Box::new(move |answers: &[Completion<'_>]| answers.iter().map(of).collect::<Vec<f64>>())
    };
    let Some(reward) = config.reward else { return Ok(None) };
    Ok(Some(match reward {
        RewardName::Command => {
            let timeout = Duration::from_secs_f64(config.reward_timeout.min(MOST_SECONDS));
            Box::new(RewardCommand::start(config.reward_command.clone(), timeout)?)
        }
        RewardName::ExactMatch => each(|a| scores(a).exact_match),
        RewardName::RougeL => each(|a| scores(a).rouge_l),
        RewardName::Chrf => each(|a| scores(a).chrf / 100.0),
        RewardName::Number => each(|a| {
            let (got, right) = (last_number(a.completion), last_number(a.answer));
            f64::from(u8::from(right.is_some() && got == right))
        }),
    }))
}

/// A year.
const MOST_SECONDS: f64 = 365.0 * 86_400.0;

fn scores(answer: &Completion<'_>) -> Scores {
    Scores::of(&[Written { text: answer.completion.into(), references: vec![answer.answer.into()] }])
}

/// The last number of a text: digits with a sign before them, a point within and commas between thousands.
fn last_number(text: &str) -> Option<f64> {
    let is_part = |c: char| c.is_ascii_digit() || c == '.' || c == ',';
    let words = text.split(|c: char| !is_part(c) && c != '-').rev();
    let number = |word: &str| {
        // What stands before the last minus is another number, or none.
        let begin = word.rfind('-').unwrap_or(0);
        let word = word[begin..].trim_end_matches(['.', ',']).replace(',', "");
        word.parse().ok().filter(|_| word.contains(|c: char| c.is_ascii_digit()))
    };
    words.into_iter().find_map(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_number_of_a_text_is_found() {
        let of = last_number;
        assert_eq!(of("so 3 and 1,234.50 dollars."), Some(1234.5));
        assert_eq!(of("#### 72"), Some(72.0));
        assert_eq!(
            (of("it is -5."), of("7-4"), of("5-"), of("a - b"), of("...")),
            (Some(-5.0), Some(-4.0), None, None, None)
        );
    }

    #[test]
    fn answers_are_compared_with_the_right_one() {
        let of = |name, completion, answer| {
            let config = ObjectiveConfig { reward: Some(name), ..ObjectiveConfig::default() };
            let one = Completion { prompt: "p", completion, answer, ended: true };
            reward_of(&config).unwrap().unwrap().score(&[one]).unwrap()[0]
        };
        assert_eq!((of(RewardName::ExactMatch, " a b ", "a b"), of(RewardName::ExactMatch, "a", "a b")), (1.0, 0.0));
        assert_eq!(
            (of(RewardName::Number, "it is 7", "#### 7"), of(RewardName::Number, "it is 7", "none")),
            (1.0, 0.0)
        );
        assert_eq!(
            (of(RewardName::RougeL, "the cat sat", "the cat sat"), of(RewardName::RougeL, "a", "b")),
            (1.0, 0.0)
        );
        let near = of(RewardName::Chrf, "the cat sits", "the cat sat");
        assert!(near > 0.5 && near < 1.0, "{near}");
        assert!(reward_of(&ObjectiveConfig::default()).unwrap().is_none());
    }
}
