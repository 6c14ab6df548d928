//! Datasets to packed batches: formats, chat templates, loss masks, packing; links no torch.
//!
//! The way of a record, one file a step: `source` reads documents, `template` renders conversations,
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

mod batch;
mod classes;
mod clock;
mod dataset;
mod document;
mod error;
mod example;
mod format;
mod mask;
mod pack;
mod preview;
mod python;
mod record;
mod report;
mod sampler;
mod source;
mod special_tokens;
mod stream_decoder;
mod strict_json;
mod template;
mod template_source;
mod tokenizer;
mod tokenizer_files;

pub use batch::Batch;
pub use classes::{
    ClassTarget, EncodedText, KnownLabels, LabelKind, LabelSet, LabelledSet, LabelledText, build_labelled,
    count_labels, encode,
};
pub use clock::Clock;
pub use dataset::{DataOptions, Dataset, build_dataset};
pub use document::{Body, Conversation, Document, Instruction, Message, Origin};
pub use error::{DataError, Result};
pub use example::{Example, Truncation};
pub use format::Format;
pub use pack::pack;
pub use preview::{PreviewToken, preview};
pub use report::{DataReport, DropReason, Dropped, LengthBucket, SourceReport};
pub use sampler::{Cursor, Sampler, epoch_order};
pub use source::{Source, read_documents};
pub use stream_decoder::StreamDecoder;
pub use template::{ChatTemplate, Rendered};
pub use tokenizer::Tokenizer;
