//! Preference pairs and rated answers as rows of tokens, for objectives that compare answers.

use std::collections::HashSet;

use crate::dataset::{DataOptions, builder, check_options, check_whole};
use crate::document::{Body, Document};
use crate::error::{DataError, Result};
use crate::example::{Example, ExampleBuilder};
use crate::format::Format;
use crate::report::{DataReport, SourceReport};
use crate::source::{Documents, Source};
use crate::tokenizer::Tokenizer;

/// A better and a worse answer to the same prompt. In both rows only the answer is trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreferencePair {
    /// The prompt with the better answer.
    pub chosen: Example,
    /// The prompt with the worse answer.
    pub rejected: Example,
}

/// An answer, in whose row only the answer is trained, and whether it is a good one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RatedExample {
    /// The prompt with the answer.
    pub example: Example,
    /// Whether the answer is a good one.
    pub desirable: bool,
}

/// What became of sources of answers.
#[derive(Debug, Clone, PartialEq)]
pub struct AnswerSet<T> {
    /// Pairs or rated answers, in the order of the files.
    pub items: Vec<T>,
    /// For each source how many of the items are of it and of those before it.
    pub source_ends: Vec<usize>,
    /// What became of every record.
    pub report: DataReport,
}

/// The pairs of sources in format `preference`, in the order of the files. A pair of which one side is left out, for its
/// length for instance, is left out whole; sides are cut as `options` say.
///
/// # Errors
/// As [`build_dataset`](crate::build_dataset), and for a source of another format.
pub fn build_pairs(
    sources: &[Source],
    tokenizer: &Tokenizer,
    options: &DataOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<AnswerSet<PreferencePair>> {
    build(sources, tokenizer, options, progress, PAIR, &mut |builder, document, report| {
        let Body::Preference { chosen, rejected } = &document.body else { return Ok(None) };
        if chosen == rejected {
            return Err(DataError::SameAnswers { origin: document.origin.clone() });
        }
        let chosen = side(builder, document, chosen, report)?;
        let rejected = side(builder, document, rejected, report)?;
        Ok(Some(chosen.zip(rejected).map(|(chosen, rejected)| PreferencePair { chosen, rejected })))
    })
}

/// The answers of sources in format `kto`, in the order of the files.
///
/// # Errors
/// As [`build_dataset`](crate::build_dataset), and for a source of another format.
pub fn build_rated(
    sources: &[Source],
    tokenizer: &Tokenizer,
    options: &DataOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<AnswerSet<RatedExample>> {
    build(sources, tokenizer, options, progress, RATED, &mut |builder, document, report| {
        let Body::Rated { answer, desirable } = &document.body else { return Ok(None) };
        let example = side(builder, document, answer, report)?;
        Ok(Some(example.map(|example| RatedExample { example, desirable: *desirable })))
    })
}

/// What a record must be.
const PAIR: &str =
    "pair of answers: this objective needs `chosen` and `rejected`; answers that are rated one by one are for kto";
const RATED: &str = "rated answer: this objective needs `label` beside the answer; pairs of answers are for dpo, orpo, simpo and reward";

/// Records between two reports of progress.
const READ_AT_ONCE: usize = 256;

/// What a pair or a rated answer is made of: its rows, and whether it is rated good.
trait Rated {
    fn rows(&self) -> Vec<&Example>;
    fn is_good(&self) -> bool {
        true
    }
}

impl Rated for PreferencePair {
    fn rows(&self) -> Vec<&Example> {
        vec![&self.chosen, &self.rejected]
    }
}

impl Rated for RatedExample {
    fn rows(&self) -> Vec<&Example> {
        vec![&self.example]
    }
    fn is_good(&self) -> bool {
        self.desirable
    }
}

/// Makes one item of a document: the outer `None` is a document of another kind, the inner one a row that is left out.
type Make<'m, T> = &'m mut dyn FnMut(&ExampleBuilder<'_>, &Document, &mut DataReport) -> Result<Option<Option<T>>>;

fn build<T: Rated>(
    sources: &[Source],
    tokenizer: &Tokenizer,
    options: &DataOptions,
    progress: &mut dyn FnMut(usize, usize),
    wanted: &'static str,
    make: Make<'_, T>,
) -> Result<AnswerSet<T>> {
    check_options(sources, options)?;
    let own_template = options.template.as_ref().map(|path| tokenizer.template_named(path)).transpose()?;
    let builder = builder(tokenizer, options, own_template.as_ref());
    let (mut items, mut source_ends, mut report) = (Vec::new(), Vec::new(), DataReport::default());
    let (mut first, mut read, mut seen) = (None, 0, HashSet::new());
    for source in sources {
        let mut documents = Documents::open(source, options.reading)?;
        while let Some(document) = documents.next() {
            let document = document?;
            match make(&builder, &document, &mut report) {
                Ok(Some(None)) => {}
                Ok(Some(Some(item))) => {
                    let key = item.rows().into_iter().map(Example::fingerprint).collect::<Vec<_>>();
                    let is_new = seen.insert((key, item.is_good()));
                    if !is_new {
                        report.duplicates += 1;
                        report.duplicate_tokens += item.rows().iter().map(|row| row.input_ids.len()).sum::<usize>();
                    }
                    if is_new || !options.dedup {
                        item.rows().into_iter().for_each(|row| report.add_kept(row, tokenizer));
                        items.push(item);
                    }
                    first = first.or(Some(document.origin));
                }
                Ok(None) => {
                    let format = documents.format().unwrap_or(Format::Text);
                    return Err(DataError::NotPreference { origin: document.origin, format, wanted });
                }
                Err(error) => documents.reject(error)?,
            }
            read += 1;
            if read % READ_AT_ONCE == 0 {
                progress(read, read);
            }
        }
        documents.check_bad()?;
        report.sources.push(SourceReport::of(&documents));
        source_ends.push(items.len());
    }
    progress(read, read);
    check_whole(&report, || first.filter(|_| !items.is_empty()), options)?;
    Ok(AnswerSet { items, source_ends, report })
}

/// The row of one side: the last one, where the template needs a row for each turn.
fn side(
    builder: &ExampleBuilder<'_>,
    document: &Document,
    body: &Body,
    report: &mut DataReport,
) -> Result<Option<Example>> {
    let document = Document { origin: document.origin.clone(), body: body.clone() };
    let mut outcome = builder.build(&document)?;
    report.add(&outcome, &document.origin);
    Ok(outcome.examples.pop().filter(|_| outcome.dropped.is_empty()))
}
