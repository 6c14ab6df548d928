//! What can be wrong with a dataset, a tokenizer or a template.

use std::path::PathBuf;

use crate::document::Origin;
use crate::format::Format;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, DataError>;

/// Why data could not be read, rendered, tokenised or accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // of the fields: the messages say what each of them holds
pub enum DataError {
    // Files
    /// A file cannot be opened or read.
    #[error("{path}: cannot be read", path = path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A dataset file of a kind that is not read.
    #[error("{path}: file extension `{found}` is not a dataset that can be read; use .json (an array) or .jsonl / .ndjson (a record per line)", path = path.display())]
    Extension { path: PathBuf, found: String },
    /// A pickle, which would run code.
    #[error("{path}: pickle files are refused, because loading one runs code; save the data as .jsonl", path = path.display())]
    Pickle { path: PathBuf },
    /// A dataset file without a record.
    #[error("{path}: holds no record", path = path.display())]
    EmptyFile { path: PathBuf },
    /// A `.json` file that holds one object.
    #[error("{path}: holds one object where an array of records (or a record per line) is expected", path = path.display())]
    NotAnArray { path: PathBuf },
    /// No dataset file at all.
    #[error("no data file was given; name at least one in `data.train`")]
    NoSource,

    // Records
    /// A line too long to be a record.
    #[error("{origin}: a line of more than {limit} bytes; a record must be shorter")]
    LineTooLong { origin: Origin, limit: usize },
    /// Bytes that are not UTF-8.
    #[error("{origin}: not valid UTF-8 at byte {column} of the line; save the file as UTF-8")]
    Utf8 {
        origin: Origin,
        column: usize,
        #[source]
        source: std::str::Utf8Error,
    },
    /// A record that is not JSON, or has a key twice.
    #[error("{origin}: broken JSON at column {column}: {problem}")]
    Json {
        origin: Origin,
        column: usize,
        problem: String,
        #[source]
        source: serde_json::Error,
    },
    /// Something else than a comma between records.
    #[error("{origin}: expected {wanted} after a record, found `{found}`")]
    ArraySyntax { origin: Origin, wanted: &'static str, found: char },
    /// An array without its end.
    #[error("{origin}: the array is not closed by `]`; the file was cut off")]
    ArrayCutOff { origin: Origin },
    /// A record that is not an object.
    #[error("{origin}: a record must be a JSON object, found {found}")]
    NotAnObject { origin: Origin, found: &'static str },
    /// A field that the format needs is absent or null.
    #[error("{origin}: field `{field}` of format {format} is missing; the record has {present}")]
    MissingField { origin: Origin, format: Format, field: String, present: String },
    /// A field of the wrong type.
    #[error("{origin}: field `{field}` must be {wanted}, found {found}")]
    WrongType { origin: Origin, field: String, wanted: &'static str, found: String },

    // Formats
    /// A format name that does not exist.
    #[error("unknown data format `{name}`; known are {known}")]
    UnknownFormat { name: String, known: String },
    /// The fields fit no format, or look like preference data.
    #[error(
        "{origin}: the format cannot be told from the fields {present}; set `format`, and `columns` if the fields have other names"
    )]
    FormatUndetected { origin: Origin, present: String },
    /// The fields fit more than one format.
    #[error("{origin}: the fields {present} fit several formats ({candidates}); set `format`")]
    FormatAmbiguous { origin: Origin, present: String, candidates: String },
    /// `columns` names a field that the format does not have.
    #[error("{path}: `columns` names the unknown field `{field}`; did you mean `{nearest}`? {owner} has {known}", path = path.display())]
    UnknownColumn { path: PathBuf, field: String, nearest: String, owner: String, known: String },

    // Labels
    /// A label that is none of those there are.
    #[error("{origin}: field `label` is {found}; it must be {wanted}")]
    Label { origin: Origin, found: String, wanted: String },
    /// All labels are the same.
    #[error(
        "every record has the label `{label}`, so there is nothing to tell apart; name all labels in `model.labels`, or set `model.problem_type = \"regression\"` for numbers"
    )]
    OneLabel { label: String },
    /// Data of another format where labelled texts are needed.
    #[error("{path}: format {format} has no labels; a classifier is trained with format classification (`text`, `label`)", path = path.display())]
    NotLabelled { path: PathBuf, format: Format },
    /// Labelled texts where something to be written is needed.
    #[error("{origin}: a labelled text is for classifiers; set `lora.task_type = \"SEQ_CLS\"`, or another format")]
    Labelled { origin: Origin },

    // Conversations
    /// A conversation without messages.
    #[error("{origin}: field `{field}` has no message")]
    EmptyConversation { origin: Origin, field: String },
    /// A message of another role than assistant is marked as trained.
    #[error(
        "{origin}: field `{field}` asks to train a message of role `{role}`; only assistant messages can be trained"
    )]
    TrainedRole { origin: Origin, field: String, role: String },
    /// A sharegpt role that has no plain message form.
    #[error(
        "{origin}: field `{field}` has the sharegpt role `{role}`, which has no plain message form; convert it to role/content messages"
    )]
    ShareGptRole { origin: Origin, field: String, role: String },

    // Token rows
    /// A token that the vocabulary does not have.
    #[error("{origin}: field `{field}` holds {id} at position {index}; the vocabulary has {vocab_size} tokens")]
    TokenOutOfRange { origin: Origin, field: &'static str, index: usize, id: i64, vocab_size: usize },
    /// Labels that are not as many as the tokens.
    #[error("{origin}: `labels` has {labels} entries, `input_ids` has {input_ids}; they must be as many")]
    LabelsLength { origin: Origin, labels: usize, input_ids: usize },
    /// A label that is neither -100 nor its own token.
    #[error(
        "{origin}: `labels` holds {label} at position {index} where `input_ids` holds {input_id}; a label is -100 or the token itself (they are not shifted)"
    )]
    LabelMismatch { origin: Origin, index: usize, label: i64, input_id: i64 },

    // Tokenizers
    /// A folder without tokenizer.json.
    #[error("{path}: the checkpoint has no tokenizer.json; save the tokenizer in its fast form", path = path.display())]
    NoTokenizer { path: PathBuf },
    /// A tokenizer file that is not the JSON it should be.
    #[error("{path}: {problem}", path = path.display())]
    TokenizerJson {
        path: PathBuf,
        problem: &'static str,
        #[source]
        source: serde_json::Error,
    },
    /// A tokenizer.json that the tokenizer library refuses.
    #[error("{path}: not a tokenizer that can be used", path = path.display())]
    TokenizerFile {
        path: PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A tokenizer.json on which the tokenizer library breaks down.
    #[error("{path}: the tokenizer library gave up on this file; it is damaged", path = path.display())]
    TokenizerPanic { path: PathBuf },
    /// A tokenizer file that is too large.
    #[error("{path}: {size} bytes, more than the {limit} a tokenizer file may have", path = path.display())]
    TokenizerSize { path: PathBuf, size: u64, limit: u64 },
    /// A field of a tokenizer file that has the wrong type.
    #[error("{path}: field `{field}` must be {wanted}, found {found}", path = path.display())]
    TokenizerField { path: PathBuf, field: String, wanted: &'static str, found: String },
    /// Two files give a token different ids.
    #[error("{path}: `added_tokens_decoder` gives `{token}` the id {wanted}, but tokenizer.json gives it {found}", path = path.display())]
    AddedTokenId { path: PathBuf, token: String, wanted: u32, found: u32 },
    /// A text that the tokenizer refuses.
    #[error("text could not be encoded")]
    Encode {
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Tokens that the tokenizer refuses.
    #[error("tokens could not be decoded")]
    Decode {
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A text on which the tokenizer library breaks down.
    #[error("the tokenizer library gave up on a text of {bytes} bytes; the tokenizer is damaged")]
    EncodePanic { bytes: usize },
    /// A format that needs an end token, and no file that names one.
    #[error("{path}: no end-of-sequence token in tokenizer_config.json, special_tokens_map.json, generation_config.json or config.json; set `eos_token`", path = path.display())]
    NoEos { path: PathBuf },

    // Templates
    /// A chat template that is too long.
    #[error("chat template {name}: {size} bytes, more than the {limit} a template may have")]
    TemplateSize { name: String, size: usize, limit: usize },
    /// A chat template with a syntax error.
    #[error("chat template {name}: does not compile")]
    TemplateCompile {
        name: String,
        #[source]
        source: minijinja::Error,
    },
    /// A chat template that raises an error or runs out of its limits.
    #[error("chat template {name}: refuses the conversation")]
    TemplateRender {
        name: String,
        #[source]
        source: minijinja::Error,
    },
    /// A chat template that writes too much.
    #[error("chat template {name}: writes more than {limit} bytes for one conversation")]
    TemplateOutput { name: String, limit: usize },
    /// Text that holds a character which marks trained text.
    #[error(
        "chat template {name}: the text holds U+{code:04X}, a private-use character that marks trained text; remove it"
    )]
    TemplateMarker { name: String, code: u32 },
    /// Generation blocks that are not in pairs.
    #[error("chat template {name}: a generation block is opened or closed alone")]
    TemplateSpans { name: String },
    /// Conversations, and no chat template.
    #[error(
        "{path}: the tokenizer has no chat template, and format {format} needs one; set `data.template` to a .jinja file", path = path.display()
    )]
    NoTemplate { path: PathBuf, format: Format },
    /// A chat template that leaves out what a role says.
    #[error(
        "{origin}: chat template {template} leaves out what role `{role}` says; use a template that knows the role"
    )]
    RoleIgnored { origin: Origin, template: String, role: String },
    /// A chat template that leaves out the tools.
    #[error(
        "{origin}: chat template {template} leaves out the tools of the conversation; use a template that knows tools"
    )]
    ToolsIgnored { origin: Origin, template: String },
    /// Any of the others, with the record on which it happened.
    #[error("{origin}")]
    AtRecord {
        origin: Origin,
        #[source]
        source: Box<DataError>,
    },

    // Loss masks
    /// An answer that cannot be told from its prompt.
    #[error(
        "{origin}: the prompt that chat template {template} writes before message {message} is not the beginning of what it writes with the answer, so the answer cannot be told from the prompt; mark it with {{% generation %}} blocks in the template"
    )]
    NotPrefixPreserving { origin: Origin, template: String, message: usize },
    /// Generation blocks that cannot be matched with turns.
    #[error(
        "{origin}: chat template {template} has {spans} generation blocks for {turns} assistant turns, so the `train` flags cannot be applied"
    )]
    SpansPerTurn { origin: Origin, template: String, spans: usize, turns: usize },

    // The whole set
    /// A length limit that leaves nothing to train.
    #[error("`data.max_length` is {max_length}; at least 2 tokens are needed to train one")]
    MaxLength { max_length: usize },
    /// A share that is none.
    #[error("`data.max_affected_share` is {share}; it must lie between 0 and 1")]
    AffectedShare { share: f64 },
    /// A row over the length limit, where such are refused.
    #[error("{origin}: {tokens} tokens, more than `data.max_length` = {max_length}; raise it or set `data.truncation`")]
    TooLong { origin: Origin, tokens: usize, max_length: usize },
    /// Too many records would be cut or left out.
    #[error(
        "{affected} of {read} records were truncated or dropped ({reasons}), more than the share {limit} that `data.max_affected_share` allows; first: {first}"
    )]
    TooManyAffected { affected: usize, read: usize, reasons: String, limit: f64, first: String },
    /// No record has anything to train.
    #[error("no record has a token to train ({reasons}); first: {first}")]
    NothingTrained { reasons: String, first: String },
    /// No end token is ever trained.
    #[error(
        "no trained text ends with a special token, so the model would never learn to stop; let the chat template end an assistant turn with the tokenizer's end token (first: {first})"
    )]
    EosNeverTrained { first: Origin },
}

impl DataError {
    /// The same error with the record it came from in front.
    pub(crate) fn at(self, origin: &Origin) -> Self {
        match self {
            located @ (Self::AtRecord { .. }
            | Self::NotPrefixPreserving { .. }
            | Self::SpansPerTurn { .. }
            | Self::RoleIgnored { .. }
            | Self::ToolsIgnored { .. }
            | Self::LabelMismatch { .. }
            | Self::TokenOutOfRange { .. }
            | Self::TooLong { .. }) => located,
            other => Self::AtRecord { origin: origin.clone(), source: Box::new(other) },
        }
    }
}
