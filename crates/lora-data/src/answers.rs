//! What becomes of a record: rows of its own, a pair of answers, or an answer that is rated.

use crate::document::{Body, Document};
use crate::error::{DataError, Result};
use crate::example::{Example, ExampleBuilder, Outcome};
use crate::fingerprint::{Fingerprint, fingerprint_of};
use crate::format::Format;

/// How an objective wants its answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerKind {
    /// Records of format `preference`: two rows each, the better answer first.
    Pairs,
    /// Records of format `kto`: an answer each, and whether it is a good one.
    Rated,
}

impl AnswerKind {
    /// Rows of a pair, or of an answer that comes alone.
    pub fn rows_each(self) -> usize {
        match self {
            Self::Pairs => 2,
            Self::Rated => 1,
        }
    }
}

/// What is kept or left out as one: a row, or the two rows of a pair.
pub(crate) struct Item {
    pub(crate) rows: Vec<(Example, Fingerprint)>,
    /// Of an answer that is rated.
    pub(crate) good: Option<bool>,
}

impl Item {
    fn of(rows: Vec<Example>, good: Option<bool>) -> Self {
        let with_fingerprint = |row: Example| {
            let fingerprint = row.fingerprint();
            (row, fingerprint)
        };
        Self { rows: rows.into_iter().map(with_fingerprint).collect(), good }
    }

    /// The same for two items that are the same to an objective.
    pub(crate) fn fingerprint(&self) -> Fingerprint {
        match (self.rows.as_slice(), self.good) {
            ([(_, fingerprint)], None) => *fingerprint,
            (rows, good) => {
                let mut words: Vec<u8> = rows.iter().flat_map(|(_, fingerprint)| *fingerprint).collect();
                words.extend(good.map(u8::from));
                fingerprint_of(&words)
            }
        }
    }
}

/// What became of a record: how each of its sides fared, and what is left.
pub(crate) struct Made {
    pub(crate) outcomes: Vec<Outcome>,
    pub(crate) items: Vec<Item>,
}

/// What a record must be.
const PAIR: &str =
    "pair of answers: this objective needs `chosen` and `rejected`; answers that are rated one by one are for kto";
const RATED: &str = "rated answer: this objective needs `label` beside the answer; pairs of answers are for dpo, orpo, simpo and reward";

/// Makes the rows of a record. A pair of which one side is left out, for its length for instance, is left out whole.
pub(crate) fn made(
    builder: &ExampleBuilder<'_>,
    document: &Document,
    answers: Option<AnswerKind>,
    format: Format,
) -> Result<Made> {
    let origin = &document.origin;
    let (wanted, good) = match (answers, &document.body) {
        (None, _) => {
            let mut outcome = builder.build(document)?;
            let rows = std::mem::take(&mut outcome.examples);
            let items = rows.into_iter().map(|row| Item::of(vec![row], None)).collect();
            return Ok(Made { outcomes: vec![outcome], items });
        }
        (Some(AnswerKind::Pairs), Body::Preference { chosen, rejected }) if chosen == rejected => {
            return Err(DataError::SameAnswers { origin: origin.clone() });
        }
        (Some(AnswerKind::Pairs), Body::Preference { .. }) => (2, None),
        (Some(AnswerKind::Rated), Body::Rated { desirable, .. }) => (1, Some(*desirable)),
        (Some(kind), _) => {
            let wanted = if kind == AnswerKind::Pairs { PAIR } else { RATED };
            return Err(DataError::NotPreference { origin: origin.clone(), format, wanted });
        }
    };
    let (mut outcomes, mut rows) = (Vec::new(), Vec::new());
    for body in document.body.sides() {
        let side = Document { origin: origin.clone(), body: body.clone() };
        let mut outcome = builder.build(&side)?;
        // The last row holds the answer, where the template needs a row for each turn.
        rows.extend(outcome.examples.pop().filter(|_| outcome.dropped.is_empty()));
        outcomes.push(outcome);
    }
    let whole = rows.len() == wanted;
    Ok(Made { outcomes, items: whole.then(|| Item::of(rows, good)).into_iter().collect() })
}
