//! A whole dataset: read, tokenised in parallel, checked and counted.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;

use rayon::prelude::*;
use serde_json::{Map, Value};

use crate::document::{Body, Conversation, Document};
use crate::error::{DataError, Result};
use crate::example::{Example, ExampleBuilder, Outcome, conversation_of};
use crate::format::Format;
use crate::mask::{Choice, Renderer};
use crate::report::{DataReport, SourceReport, TemplateReport};
use crate::source::{Source, read_source};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::truncation::Truncation;

/// Documents tokenised between two reports of progress.
const CHUNK: usize = 1024;

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
        }
    }
}

/// Rows of tokens and what became of the records.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// The rows, in the order of the files.
    pub examples: Vec<Example>,
    /// What became of every record.
    pub report: DataReport,
}

/// Reads the sources and makes rows of tokens; `progress` hears how many records of how many are done.
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
    check_options(sources, options)?;
    let own_template = options.template.as_ref().map(|path| tokenizer.template_named(path)).transpose()?;
    let builder = builder(tokenizer, options, own_template.as_ref());

    let mut report = DataReport { template: template_name(&builder), ..DataReport::default() };
    let mut documents = Vec::new();
    for source in sources {
        let data = read_source(source)?;
        report.sources.push(SourceReport {
            path: source.path.clone(),
            format: data.format,
            records: data.documents.len(),
            ignored_columns: data.ignored_columns,
        });
        documents.extend(data.documents);
    }
    check_roles(&builder, &documents)?;

    let of = documents.len();
    progress(0, of);
    let mut examples = Vec::with_capacity(of);
    let mut seen = HashSet::new();
    let mut documents = documents.into_iter();
    loop {
        let chunk: Vec<Document> = documents.by_ref().take(CHUNK).collect();
        if chunk.is_empty() {
            break;
        }
        // Outcomes are looked at in order, so that of several faults the same one is always named.
        let outcomes: Vec<Result<Outcome>> = chunk.par_iter().map(|document| builder.build(document)).collect();
        for (document, outcome) in chunk.iter().zip(outcomes) {
            let outcome = outcome?;
            report.add(&outcome, &document.origin);
            for example in outcome.examples {
                report.add_kept(&example, tokenizer);
                if !seen.insert(fingerprint(&example)) {
                    report.duplicates += 1;
                    report.duplicate_tokens += example.input_ids.len();
                }
                examples.push(example);
            }
        }
        progress(report.read, of);
    }
    check_whole(&report, &examples, options)?;
    Ok(Dataset { examples, report })
}

fn check_options(sources: &[Source], options: &DataOptions) -> Result<()> {
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

fn builder<'a>(
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

/// The first conversation with each role, and the first with tools, show whether the template writes what they say.
fn check_roles(builder: &ExampleBuilder<'_>, documents: &[Document]) -> Result<()> {
    let mut roles = BTreeSet::new();
    let mut tools_seen = false;
    for document in documents {
        let conversation: Cow<'_, Conversation> = match &document.body {
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
        if has_tools && !std::mem::replace(&mut tools_seen, true) {
            renderer.check_tools(conversation, origin)?;
        }
        for (at, message) in conversation.messages.iter().enumerate() {
            if !message.is_empty() && roles.insert((message.role().to_owned(), has_tools)) {
                renderer.check_role(conversation, at, origin)?;
            }
        }
    }
    Ok(())
}

/// The chat template that conversations are written with.
fn template_name(builder: &ExampleBuilder<'_>) -> Option<TemplateReport> {
    builder.renderers.as_ref().map(|(plain, _)| TemplateReport {
        name: plain.template.name().to_owned(),
        marks_generation: plain.template.marks_generation(),
        writes_date: plain.template.writes_date(),
    })
}

fn fingerprint(example: &Example) -> u64 {
    let mut hasher = DefaultHasher::new();
    example.input_ids.hash(&mut hasher);
    example.trained.hash(&mut hasher);
    hasher.finish()
}

fn check_whole(report: &DataReport, examples: &[Example], options: &DataOptions) -> Result<()> {
    let Some(first) = examples.first() else {
        return Err(DataError::NothingTrained { reasons: report.reasons(), first: report.first_affected() });
    };
    if report.affected as f64 > options.max_affected_share * report.read as f64 {
        return Err(DataError::TooManyAffected {
            affected: report.affected,
            read: report.read,
            reasons: report.reasons(),
            limit: options.max_affected_share,
            first: report.first_affected(),
        });
    }
    // Tokens that were made elsewhere are taken as they are.
    let all_tokenized = report.sources.iter().all(|source| source.format == Format::Tokenized);
    if report.end_tokens.is_empty() && !all_tokenized {
        return Err(DataError::EosNeverTrained { first: first.origin.clone() });
    }
    Ok(())
}
