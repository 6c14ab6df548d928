//! Evaluation by what a model writes: it answers the prompts of held-out examples, and the answers are compared with those that
//! stand there.

use crate::error::{Error, Result};
use crate::events::{Event, EventSink};
use lora_data::{Example, Rows, Scores, Tokenizer, Written};
use lora_model::{Decoder, GenerateOptions, Sampling};
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// A prompt, and the answers that are right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The tokens before the answer.
    pub prompt: Vec<i64>,
    /// The answers of all examples with this prompt.
    pub references: Vec<String>,
}

/// The prompts of examples, each once, in their order, with all answers that stand behind them; the first `most` of them.
///
/// The answer of an example is its last stretch of trained tokens, and all before it is the prompt: of a conversation the last
/// answer, with the ones before as context.
///
/// # Errors
/// [`Error::NothingToAnswer`] when no example has both, or what reading a row reports.
pub fn questions(examples: &Rows, tokenizer: &Tokenizer, most: Option<u32>) -> Result<Vec<Question>> {
    let (mut list, mut places) = (Vec::<Question>::new(), HashMap::<Vec<u32>, usize>::new());
    let most = most.map_or(usize::MAX, |most| most as usize);
    for row in 0..examples.len() {
        let example = examples.example(row)?;
        let Some((begin, end)) = last_answer(&example) else { continue };
        let (prompt, answer) = (&example.input_ids[..begin], &example.input_ids[begin..end]);
        let place = match places.entry(prompt.to_vec()) {
            Entry::Occupied(place) => *place.get(),
            Entry::Vacant(_) if list.len() == most => continue,
            Entry::Vacant(free) => {
                let prompt = prompt.iter().map(|&id| i64::from(id)).collect();
                list.push(Question { prompt, references: Vec::new() });
                *free.insert(list.len() - 1)
            }
        };
        let text = tokenizer.decode(answer, true)?;
        if let Some(question) = list.get_mut(place) {
            question.references.push(text);
        }
    }
    if list.is_empty() { Err(Error::NothingToAnswer { examples: examples.len() }) } else { Ok(list) }
}

/// Where the last stretch of trained tokens begins and ends; none without a prompt before it. The first token of an example is
/// never trained, so that alone it is no prompt.
pub(crate) fn last_answer(example: &Example) -> Option<(usize, usize)> {
    let end = example.trained.iter().rposition(|trained| *trained)? + 1;
    let begin = example.trained[..end].iter().rposition(|trained| !trained)? + 1;
    (begin > 1).then_some((begin, end))
}

/// The tokens that end an answer: the model's, and the tokenizer's where that is another one.
pub fn stop_ids(model: &Decoder, tokenizer: &Tokenizer) -> Vec<i64> {
    let mut ids = model.config.eos_token_ids.clone();
    ids.extend(tokenizer.eos_token_id().map(i64::from).filter(|id| !ids.contains(id)));
    ids
}

/// Answers the questions, the most likely token each time, and compares.
///
/// # Errors
/// What the model or the tokenizer reports.
pub fn answer_questions(
    model: &Decoder,
    tokenizer: &Tokenizer,
    questions: &[Question],
    max_new_tokens: usize,
    sink: &mut dyn EventSink,
) -> Result<Scores> {
    let stop_ids = stop_ids(model, tokenizer);
    let options = GenerateOptions { max_new_tokens, stop_ids, sampling: Sampling::default() };
    let mut written = Vec::with_capacity(questions.len());
    for (done, question) in questions.iter().enumerate() {
        let mut ids = model.generate(&question.prompt, &options, |_| true)?;
        ids.pop_if(|last| options.stop_ids.contains(last));
        let ids: Vec<u32> = ids.into_iter().filter_map(|id| u32::try_from(id).ok()).collect();
        let text = tokenizer.decode(&ids, true)?;
        written.push(Written { text, references: question.references.clone() });
        sink.event(Event::Evaluating { done: done + 1, of: questions.len() });
    }
    Ok(Scores::of(&written))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lora_data::Origin;
    use std::path::Path;

    fn rows(examples: &[(&[u32], &str)]) -> Rows {
        let example = |(ids, mask): &(&[u32], &str)| Example {
            input_ids: ids.to_vec(),
            trained: mask.chars().map(|c| c == 'x').collect(),
            origin: Origin { file: Path::new("x").into(), record: 1, line: 1 },
        };
        examples.iter().map(example).collect::<Vec<_>>().into()
    }

    fn tokenizer() -> Tokenizer {
        Tokenizer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama")).unwrap()
    }

    #[test]
    fn the_last_answer_is_asked_for_and_equal_prompts_are_one() {
        let tokenizer = tokenizer();
        let rows = rows(&[
            (&[10, 11, 12, 13], "..xx"),
            (&[10, 19, 14, 15], "..xx"),
            (&[10, 11, 16, 2], "..xx"),
            (&[10, 11, 12, 13, 17, 18], "..xx.x"),
            (&[20, 21], "xx"),
            (&[20, 21], ".."),
            (&[20, 21, 22], ".xx"),
        ]);
        let text = |ids: &[u32]| tokenizer.decode(ids, true).unwrap();
        let asked = |prompt: &[i64], references: &[&[u32]]| Question {
            prompt: prompt.to_vec(),
            references: references.iter().map(|ids| text(ids)).collect(),
        };
        let all = [
            asked(&[10, 11], &[&[12, 13], &[16, 2]]),
            asked(&[10, 19], &[&[14, 15]]),
            asked(&[10, 11, 12, 13, 17], &[&[18]]),
        ];
        assert_eq!(questions(&rows, &tokenizer, None).unwrap(), all);
        // Answers of a prompt that is asked are all taken, however many prompts are.
        assert_eq!(questions(&rows, &tokenizer, Some(1)).unwrap(), all[..1]);
        assert!(!text(&[16, 2]).contains("</s>"), "end tokens are not text");
    }

    #[test]
    fn examples_without_prompts_are_named() {
        let error = questions(&rows(&[(&[1, 2], "xx")]), &tokenizer(), None).unwrap_err();
        assert!(error.is_usage() && error.to_string().contains("predict_with_generate"), "{error}");
    }
}
