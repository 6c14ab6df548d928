//! What becomes of rows that are longer than the limit.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::document::{Body, Conversation, Document, Instruction, Message};

/// What happens to a row that is longer than the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// The whole set is refused.
    Refuse,
    /// The row is left out and counted.
    #[default]
    Drop,
    /// Tokens are cut off on the left: the end is kept.
    Left,
    /// Tokens are cut off on the right: the start is kept.
    Right,
    /// Tokens are cut out of the middle: start and end are kept.
    Middle,
    /// The earliest turns are left out until the rest fits; a system message stays.
    LeftTurns,
    /// The latest turns are left out.
    RightTurns,
    /// Turns in the middle are left out: the first and the last stay longest.
    MiddleTurns,
    /// The row becomes several, end to end.
    Split,
}

/// Where something is taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Left,
    Right,
    Middle,
}

/// The policy as it is written in a configuration.
impl fmt::Display for Truncation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refuse => "refuse",
            Self::Drop => "drop",
            Self::Left => "left",
            Self::Right => "right",
            Self::Middle => "middle",
            Self::LeftTurns => "left_turns",
            Self::RightTurns => "right_turns",
            Self::MiddleTurns => "middle_turns",
            Self::Split => "split",
        })
    }
}

impl Truncation {
    /// Where tokens are cut off, if they are; of rows without turns also by the policies for turns.
    pub(crate) fn side(self) -> Option<Side> {
        match self {
            Self::Left | Self::LeftTurns => Some(Side::Left),
            Self::Right | Self::RightTurns => Some(Side::Right),
            Self::Middle | Self::MiddleTurns => Some(Side::Middle),
            Self::Refuse | Self::Drop | Self::Split => None,
        }
    }

    /// Whether whole turns are left out.
    pub(crate) fn is_by_turn(self) -> bool {
        matches!(self, Self::LeftTurns | Self::RightTurns | Self::MiddleTurns)
    }
}

/// Tokens, and which of them are trained.
pub(crate) type Row = (Vec<u32>, Vec<bool>);

/// Cuts a row to `max_length` tokens. A token that loses its predecessor is not trained any more.
pub(crate) fn cut((mut ids, mut trained): Row, side: Side, max_length: usize) -> Row {
    let too_many = ids.len().saturating_sub(max_length);
    let from = match side {
        Side::Left => 0,
        Side::Right => max_length.min(ids.len()),
        Side::Middle => max_length.div_ceil(2).min(ids.len()),
    };
    ids.drain(from..from + too_many);
    trained.drain(from..from + too_many);
    if too_many > 0
        && let Some(after) = trained.get_mut(from)
    {
        *after = false;
    }
    (ids, trained)
}

/// Pieces of a row of at most `max_length` tokens. Each begins with the last token of the one before, so that every
/// trained token keeps a predecessor and is trained once.
pub(crate) fn pieces((ids, trained): &Row, max_length: usize) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut from = 0;
    while from < ids.len() {
        let start = if from == 0 { 0 } else { from - 1 };
        let to = (start + max_length).min(ids.len());
        let mut trained = trained[start..to].to_vec();
        if let Some(first) = trained.first_mut() {
            *first = false;
        }
        rows.push((ids[start..to].to_vec(), trained));
        from = to;
    }
    rows
}

/// Exchanges of a document that can be left out: one less than it has. None where there are no turns at all.
pub(crate) fn removable_turns(document: &Document) -> Option<usize> {
    let exchanges = match &document.body {
        Body::Conversation(conversation) => exchanges(&conversation.messages).len(),
        Body::Instruction(instruction) => instruction.history.len() + 1,
        _ => return None,
    };
    exchanges.checked_sub(1).filter(|&n| n > 0)
}

/// The document without `count` of its exchanges.
pub(crate) fn without_turns(document: &Document, side: Side, count: usize) -> Document {
    let body = match &document.body {
        Body::Conversation(conversation) => {
            let messages = &conversation.messages;
            let exchanges = exchanges(messages);
            let head = exchanges.first().map_or(messages.len(), |first| first.start);
            let gone = gone(exchanges.len(), side, count);
            let kept =
                exchanges.into_iter().enumerate().filter(|(i, _)| !gone.contains(i)).flat_map(|(_, range)| range);
            let messages: Vec<Message> = (0..head).chain(kept).map(|k| messages[k].clone()).collect();
            Body::Conversation(Conversation { messages, tools: conversation.tools.clone() })
        }
        Body::Instruction(instruction) => Body::Instruction(shorter(instruction, side, count)),
        other => other.clone(),
    };
    Document { origin: document.origin.clone(), body }
}

fn gone(exchanges: usize, side: Side, count: usize) -> std::ops::Range<usize> {
    let count = count.min(exchanges);
    let from = match side {
        Side::Left => 0,
        Side::Right => exchanges - count,
        Side::Middle => (exchanges - count).div_ceil(2),
    };
    from..from + count
}

/// Message ranges that belong together: what a user says and what follows until the user speaks again.
fn exchanges(messages: &[Message]) -> Vec<std::ops::Range<usize>> {
    let head = messages.iter().take_while(|message| ["system", "developer"].contains(&message.role())).count();
    let begins = |k: usize| k == head || messages[k].role() == "user" && messages[k - 1].role() != "user";
    let starts: Vec<usize> = (head..messages.len()).filter(|&k| begins(k)).collect();
    let ends = starts.iter().skip(1).copied().chain([messages.len()]);
    starts.iter().copied().zip(ends).map(|(start, end)| start..end).collect()
}

fn shorter(instruction: &Instruction, side: Side, count: usize) -> Instruction {
    let last = instruction.history.len();
    let gone = gone(last + 1, side, count);
    let mut kept: Vec<usize> = (0..=last).filter(|i| !gone.contains(i)).collect();
    let Some(newest) = kept.pop() else { return instruction.clone() };
    let history = kept.into_iter().map(|i| instruction.history[i].clone()).collect();
    if newest == last {
        return Instruction { history, ..instruction.clone() };
    }
    let (user, assistant) = instruction.history[newest].clone();
    let system = instruction.system.clone();
    Instruction { system, history, instruction: user, input: String::new(), output: assistant }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        ((0..10).collect(), vec![false, false, true, true, true, true, true, true, true, true])
    }

    #[test]
    fn cuts_keep_what_they_say() {
        assert_eq!(cut(row(), Side::Right, 4), (vec![0, 1, 2, 3], vec![false, false, true, true]));
        assert_eq!(cut(row(), Side::Left, 4), (vec![6, 7, 8, 9], vec![false, true, true, true]));
        // What stands after the gap was not said after what stands before it.
        assert_eq!(cut(row(), Side::Middle, 5), (vec![0, 1, 2, 8, 9], vec![false, false, true, false, true]));
        assert_eq!(cut(row(), Side::Middle, 10), row());
    }

    #[test]
    fn pieces_train_every_token_once() {
        for max_length in 2..12 {
            let pieces = pieces(&row(), max_length);
            assert!(pieces.iter().all(|(ids, trained)| ids.len() <= max_length && !trained[0]));
            let trained = |(ids, trained): &Row| -> Vec<u32> {
                ids.iter().zip(trained).filter(|(_, trained)| **trained).map(|(id, _)| *id).collect()
            };
            let all: Vec<u32> = pieces.iter().flat_map(trained).collect();
            assert_eq!(all, (2..10).collect::<Vec<_>>(), "{max_length}");
        }
    }
}
