//! Datasets to packed batches: formats, chat templates, loss masks, packing; links no torch.
//!
//! The way of a record, one file a step: `read` takes files apart record by record, `layout` and `fields` make documents
//! of them, `source` gives these out one at a time, `template` renders conversations,
//! `mask` finds what is trained, `example` makes token rows, `dataset` builds all of them with a report,
//! `pack` fills rows, `sampler` orders them and `batch` lays them end to end for the model.
//!
//! ```no_run
//! use lora_data::{Batch, Cursor, DataOptions, Sampler, Source, Tokenizer, build_dataset};
//!
//! let tokenizer = Tokenizer::load("models/tiny".as_ref())?;
//! let source = Source { path: "train.jsonl".into(), ..Source::default() };
//! let dataset = build_dataset(&[source], &tokenizer, &DataOptions::default(), &mut |_done, _of| {})?;
//!
//! let mut sampler = Sampler::new(dataset.examples.len(), 0, true);
//! let (rows, _next) = sampler.next_batch(Cursor::default(), 8);
//! let batch = Batch::from_examples(rows.iter().map(|&row| &dataset.examples[row]));
//! assert_eq!(batch.targets.len(), batch.trained_tokens());
//! # Ok::<(), lora_data::DataError>(())
//! ```

mod answers;
mod bad_record;
mod batch;
mod cache;
mod classes;
mod clock;
mod dataset;
mod dataset_info;
mod document;
mod error;
mod example;
mod fields;
mod figures;
mod fingerprint;
mod format;
#[doc(hidden)]
pub mod fuzz;
mod hub;
mod layout;
mod mask;
mod mask_tokens;
mod messages;
mod mix;
mod pack;
mod page;
mod pairs;
mod prefetch;
mod preview;
mod python;
mod read;
mod replay;
mod report;
mod rows;
mod sampler;
mod scores;
mod source;
mod special_tokens;
mod stream_decoder;
mod strict_json;
mod tags;
mod template;
mod template_builtin;
mod template_guard;
mod template_source;
mod template_weight;
mod tokenizer;
mod tokenizer_files;
mod tokenizer_guard;
mod truncation;

pub use answers::AnswerKind;
pub use batch::Batch;
pub use cache::{CacheEntry, CacheUse, TokenCache, TokenSet, open_answers, open_dataset};
pub use classes::{
    ClassTarget, EncodedText, KnownLabels, LabelKind, LabelSet, LabelledSet, LabelledText, build_labelled,
    count_labels, encode,
};
pub use clock::Clock;
pub use dataset::{DataOptions, Dataset, build_dataset};
pub use dataset_info::dataset_names;
pub use document::{Body, Conversation, Document, Instruction, Message, Origin};
pub use error::{DataError, Result};
pub use example::Example;
pub use figures::{DataFigures, LengthBar, PackingFigures, PaddingFigures, StatsText};
pub use format::Format;
pub use hub::{HubId, hub_dataset};
pub use mix::{Mixing, hold_out, mix_order, stage_lengths};
pub use pack::{RowPlan, pack};
pub use page::{PageRow, data_page};
pub use prefetch::Prefetch;
pub use preview::{PreviewToken, preview};
pub use replay::Replay;
pub use report::{DataReport, DropReason, Dropped, LengthBucket, SourceReport, TemplateReport};
pub use rows::Rows;
pub use sampler::{Cursor, Sampler, epoch_order, grouped_order};
pub use scores::{Scores, Written};
pub use source::{BadRecords, BadReport, Documents, PreferenceUse, ReadOptions, Source, TextBy, read_documents};
pub use stream_decoder::StreamDecoder;
pub use tags::{Role, Tags};
pub use template::{ChatTemplate, Rendered};
pub use template_builtin::builtin_templates;
pub use tokenizer::Tokenizer;
pub use truncation::Truncation;
