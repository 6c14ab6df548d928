//! A whole dataset: read, tokenised in parallel, checked and counted.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;

use rayon::prelude::*;
use serde_json::{Map, Value};

use crate::answers::{AnswerKind, Item, Made, made};
use crate::document::{Body, Conversation, Document, Origin};
use crate::error::{DataError, Result};
use crate::example::{Example, ExampleBuilder, conversation_of};
use crate::fingerprint::Fingerprint;
use crate::format::Format;
use crate::mask::{Choice, Renderer};
use crate::read::DataFile;
use crate::report::{DataReport, SourceReport, TemplateReport};
use crate::source::{Documents, PreferenceUse, ReadOptions, Source};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::truncation::Truncation;

/// Documents tokenised between two reports of progress, and fewer where they are long.
const CHUNK: usize = 1024;
const CHUNK_BYTES: usize = 32 << 20;

/// How documents become rows of tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct DataOptions {
    /// The longest row, in tokens.
    pub max_length: usize,
    /// What happens to longer ones.
    pub truncation: Truncation,
    /// Whether prompts are trained too.
    pub train_on_prompt: bool,
    /// Of the messages of a record that would be trained, only the last one is.
    pub train_on_last_turn_only: bool,
    /// The roles whose messages are trained; a message's own flag goes before.
    pub train_roles: Vec<String>,
    /// A Jinja file, or the name of a built-in template ([`crate::builtin_templates`]), to be used in place of the
    /// tokenizer's own chat template.
    pub template: Option<PathBuf>,
    /// Further variables for the chat template, such as `enable_thinking`.
    pub template_variables: Map<String, Value>,
    /// The share of records, from 0 to 1, that may be cut or left out.
    pub max_affected_share: f64,
    /// How files are read, and what happens to bad records.
    pub reading: ReadOptions,
    /// Leaves out a row whose tokens and mask are those of a row before it, of whatever dataset.
    pub dedup: bool,
    /// What preference data is used for.
    pub preference: PreferenceUse,
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            max_length: 2048,
            truncation: Truncation::default(),
            train_on_prompt: false,
            train_on_last_turn_only: false,
            train_roles: vec!["assistant".to_owned()],
            template: None,
            template_variables: Map::new(),
            max_affected_share: 0.05,
            reading: ReadOptions::default(),
            dedup: false,
            preference: PreferenceUse::default(),
        }
    }
}

/// Rows of tokens and what became of the records.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// The rows, in the order of the files.
    pub examples: Vec<Example>,
    /// For each source how many of the rows are of it and of those before it.
    pub source_ends: Vec<usize>,
    /// What became of every record.
    pub report: DataReport,
}

/// Reads the sources and makes rows of tokens in memory; `progress` hears how many records are done, and of how many.
/// Records are read as they are needed, so that how many there are is known at the end: until then both numbers are the
/// same. [`open_dataset`](crate::open_dataset) keeps the rows of large sets in a file instead.
///
/// # Errors
/// Names file and line of a record that cannot be read, rendered or tokenised. Refuses a set of which too large a
/// share would be cut or left out, in which nothing is trained, or from which the model would never learn to stop.
pub fn build_dataset(
    sources: &[Source],
    tokenizer: &Tokenizer,
    options: &DataOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Dataset> {
    let (rows, Counted { source_ends, report, .. }) =
        Prepared::new(sources, tokenizer, options, None)?.collect(progress)?;
    Ok(Dataset { examples: rows, source_ends, report })
}

/// What takes the rows that are kept, one after the other, in the order of the files.
pub(crate) type Keep<'k> = &'k mut dyn FnMut(Example, &Fingerprint) -> Result<()>;

/// What there is to say of rows besides the rows.
#[derive(Default)]
pub(crate) struct Counted {
    pub(crate) report: DataReport,
    /// For each source how many items were kept of it and of those before it: rows, or pairs of rows.
    pub(crate) source_ends: Vec<usize>,
    /// Of answers that are rated one by one, whether each is good.
    pub(crate) good: Vec<bool>,
}

/// Sources that were opened and settings that were checked, before the first record is read.
pub(crate) struct Prepared<'a> {
    pub(crate) streams: Vec<Documents>,
    pub(crate) own_template: Option<ChatTemplate>,
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) options: &'a DataOptions,
    /// Answers to be compared or rated; plain rows when absent.
    pub(crate) answers: Option<AnswerKind>,
}

impl<'a> Prepared<'a> {
    pub(crate) fn new(
        sources: &[Source],
        tokenizer: &'a Tokenizer,
        options: &'a DataOptions,
        answers: Option<AnswerKind>,
    ) -> Result<Self> {
        check_options(sources, options)?;
        let own_template = options.template.as_ref().map(|path| tokenizer.template_named(path)).transpose()?;
        // Every path is opened before the first record is read.
        let open = |source| Documents::open(source, options.reading);
        let streams = sources.iter().map(open).collect::<Result<_>>()?;
        Ok(Self { streams, own_template, tokenizer, options, answers })
    }

    /// Every file that will be read.
    pub(crate) fn files(&self) -> impl Iterator<Item = &DataFile> {
        self.streams.iter().flat_map(Documents::files)
    }

    /// Makes the rows and holds them all.
    pub(crate) fn collect(self, progress: &mut dyn FnMut(usize, usize)) -> Result<(Vec<Example>, Counted)> {
        let (options, mut examples) = (self.options, Vec::new());
        let counted = self.run(progress, &mut |example, _| {
            examples.push(example);
            Ok(())
        })?;
        check_whole(&counted.report, || examples.first().map(|first: &Example| first.origin.clone()), options)?;
        Ok((examples, counted))
    }

    /// Makes the rows, some thousand records at a time.
    pub(crate) fn run(self, progress: &mut dyn FnMut(usize, usize), keep: Keep<'_>) -> Result<Counted> {
        let Self { streams, own_template, tokenizer, options, answers } = self;
        let builder = builder(tokenizer, options, own_template.as_ref());
        let mut report = DataReport { template: template_name(&builder), ..DataReport::default() };
        let mut roles = RolesSeen::default();
        let (mut source_ends, mut good, mut items) = (Vec::new(), Vec::new(), 0);
        let mut seen = HashSet::new();
        progress(0, 0);
        for mut documents in streams {
            loop {
                let chunk = next_chunk(&mut documents, answers.map_or(options.preference, |_| PreferenceUse::Refuse))?;
                if chunk.is_empty() {
                    break;
                }
                roles.check(&builder, &chunk, answers.is_some())?;
                let format = documents.format().unwrap_or(Format::Text);
                // Outcomes are looked at in order, so that of several faults the same one is always named.
                let all: Vec<Result<Made>> =
                    chunk.par_iter().map(|document| made(&builder, document, answers, format)).collect();
                for (document, made) in chunk.iter().zip(all) {
                    let made = match made {
                        Ok(made) => made,
                        Err(error) => {
                            documents.reject(error)?;
                            continue;
                        }
                    };
                    made.outcomes.iter().for_each(|outcome| report.add(outcome, &document.origin));
                    for item in made.items {
                        let is_new = seen.insert(item.fingerprint());
                        let Item { rows, good: is_good } = item;
                        if !is_new {
                            report.duplicates += 1;
                            report.duplicate_tokens += rows.iter().map(|(row, _)| row.input_ids.len()).sum::<usize>();
                        }
                        if !is_new && options.dedup {
                            continue;
                        }
                        items += 1;
                        good.extend(is_good);
                        for (example, fingerprint) in rows {
                            report.add_kept(&example, tokenizer);
                            keep(example, &fingerprint)?;
                        }
                    }
                }
                progress(report.read, report.read);
            }
            documents.check_bad()?;
            report.sources.push(SourceReport::of(&documents));
            source_ends.push(items);
        }
        Ok(Counted { report, source_ends, good })
    }
}

/// The next documents; none at the end.
fn next_chunk(documents: &mut Documents, preference: PreferenceUse) -> Result<Vec<Document>> {
    let mut chunk = Vec::with_capacity(CHUNK);
    let mut bytes = 0;
    while chunk.len() < CHUNK && bytes < CHUNK_BYTES {
        let Some(document) = documents.next() else { break };
        for document in preference.apply(document?) {
            bytes += document.body.size();
            chunk.push(document);
        }
    }
    Ok(chunk)
}

pub(crate) fn check_options(sources: &[Source], options: &DataOptions) -> Result<()> {
    if sources.is_empty() {
        return Err(DataError::NoSource);
    }
    if options.max_length < 2 {
        return Err(DataError::MaxLength { max_length: options.max_length });
    }
    if !(0.0..=1.0).contains(&options.max_affected_share) {
        return Err(DataError::AffectedShare { share: options.max_affected_share });
    }
    Ok(())
}

pub(crate) fn builder<'a>(
    tokenizer: &'a Tokenizer,
    options: &'a DataOptions,
    own_template: Option<&'a ChatTemplate>,
) -> ExampleBuilder<'a> {
    let renderer =
        |template| Renderer { template, extra: &options.template_variables, eos_token: tokenizer.eos_token() };
    let plain = own_template.or(tokenizer.template());
    let with_tools = own_template.or(tokenizer.tool_template());
    ExampleBuilder {
        tokenizer,
        renderers: plain.zip(with_tools).map(|(plain, with_tools)| (renderer(plain), renderer(with_tools))),
        choice: Choice {
            roles: &options.train_roles,
            last_only: options.train_on_last_turn_only,
            everything: options.train_on_prompt,
        },
        max_length: options.max_length,
        truncation: options.truncation,
    }
}

/// Which roles, without and with tools, were looked at.
#[derive(Default)]
struct RolesSeen {
    roles: BTreeSet<(String, bool)>,
    tools: bool,
}

impl RolesSeen {
    /// The first conversation with each role, and the first with tools, show whether the template writes what they say.
    fn check(&mut self, builder: &ExampleBuilder<'_>, documents: &[Document], answers: bool) -> Result<()> {
        fn bodies(document: &Document, answers: bool) -> Vec<&Body> {
            if answers { document.body.sides() } else { vec![&document.body] }
        }
        let sides =
            documents.iter().flat_map(|document| bodies(document, answers).into_iter().map(move |b| (document, b)));
        for (document, body) in sides {
            let conversation: Cow<'_, Conversation> = match body {
                Body::Conversation(conversation) => Cow::Borrowed(conversation),
                // Without a template an instruction is laid out as plain text, system prompt included.
                Body::Instruction(instruction) if builder.renderers.is_some() && instruction.system.is_some() => {
                    Cow::Owned(conversation_of(instruction))
                }
                _ => continue,
            };
            let conversation = conversation.as_ref();
            let (origin, has_tools) = (&document.origin, conversation.tools.is_some());
            let renderer = builder.renderer(conversation, Format::Messages)?;
            // A conversation that cannot be rendered at all is reported where rows are made of it.
            let passed = |checked: Result<()>| match checked {
                Err(error) if error.is_bad_record() => Ok(()),
                other => other,
            };
            if has_tools && !std::mem::replace(&mut self.tools, true) {
                passed(renderer.check_tools(conversation, origin))?;
            }
            for (at, message) in conversation.messages.iter().enumerate() {
                if !message.is_empty() && self.roles.insert((message.role().to_owned(), has_tools)) {
                    passed(renderer.check_role(conversation, at, origin))?;
                }
            }
        }
        Ok(())
    }
}

/// The chat template that conversations are written with.
fn template_name(builder: &ExampleBuilder<'_>) -> Option<TemplateReport> {
    builder.renderers.as_ref().map(|(plain, _)| TemplateReport {
        name: plain.template.name().to_owned(),
        marks_generation: plain.template.marks_generation(),
        writes_date: plain.template.writes_date(),
    })
}

/// Refuses a set for what became of its records as a whole; `first` is where its first row comes from.
pub(crate) fn check_whole(
    report: &DataReport,
    first: impl FnOnce() -> Option<Origin>,
    options: &DataOptions,
) -> Result<()> {
    let Some(first) = first() else { return Err(report.nothing_trained()) };
    report.check_affected(options.max_affected_share)?;
    // Tokens that were made elsewhere are taken as they are.
    let all_tokenized = report.sources.iter().all(|source| source.format == Format::Tokenized);
    if report.end_tokens.is_empty() && !all_tokenized {
        return Err(DataError::EosNeverTrained { first });
    }
    Ok(())
}
