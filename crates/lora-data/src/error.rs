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
    #[error("{path}: file extension `{found}` is not a dataset that can be read; known are .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, .feather and .txt, each also with .gz or .zst behind", path = path.display())]
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
    /// A folder or a pattern without a dataset file.
    #[error("{path}: no dataset file is there; name a file, a folder of files or a pattern such as data/*.jsonl", path = path.display())]
    NoFiles { path: PathBuf },
    /// A pattern that is none.
    #[error("{path}: not a valid pattern", path = path.display())]
    Pattern {
        path: PathBuf,
        #[source]
        source: glob::PatternError,
    },
    /// Files of several kinds in one folder.
    #[error("{path}: holds files of several kinds ({first} and {other}); name those of one kind by a pattern", path = path.display(), first = first.display(), other = other.display())]
    MixedFiles { path: PathBuf, first: PathBuf, other: PathBuf },
    /// A compressed table that unpacks to too much.
    #[error("{path}: unpacks to more than {limit} bytes; unpack it yourself, or store the table without a compression around it", path = path.display())]
    Unpacked { path: PathBuf, limit: u64 },
    /// A Parquet or Arrow file that cannot be read.
    #[error("{path}: not a table that can be read: {problem}", path = path.display())]
    Table { path: PathBuf, problem: String },
    /// A row of a table that cannot be read.
    #[error("{origin}: the row cannot be read: {problem}")]
    Row { origin: Origin, problem: String },
    /// A column of a type that has no JSON form.
    #[error("{path}: column `{column}` is of type {found}, which is not read; convert it to text or numbers, or rename it if it is not meant", path = path.display())]
    ColumnType { path: PathBuf, column: String, found: String },
    /// A column that a table has twice.
    #[error("{origin}: column `{column}` appears twice in the header; rename one of them")]
    ColumnTwice { origin: Origin, column: String },
    /// A row of a CSV file that is shorter or longer than the header.
    #[error(
        "{origin}: the row has {found} fields where the header has others ({columns}); quote fields that hold the delimiter or line breaks"
    )]
    CsvWidth { origin: Origin, found: usize, columns: String },
    /// A quote that swallows the rest of a CSV file.
    #[error("{origin}: a quote is opened here and never closed; close it, or write a quote inside of a field twice")]
    CsvQuote { origin: Origin },
    /// A line of a text file without the separator.
    #[error("{origin}: the line has no `{separator}` between prompt and completion; add it, or leave `separator` out")]
    NoSeparator { origin: Origin, separator: String },
    /// No dataset file at all.
    #[error("no data file was given; name at least one in `data.train`")]
    NoSource,

    // Records
    /// A line, row or element too long to be a record.
    #[error("{origin}: a record of more than {limit} bytes; split it, or raise the limit of a record")]
    LineTooLong { origin: Origin, limit: usize },
    /// Bytes that are not UTF-8.
    #[error("{origin}: not valid UTF-8 at byte {column} of the line; save the file as UTF-8")]
    Utf8 {
        origin: Origin,
        column: usize,
        #[source]
        source: std::str::Utf8Error,
    },
    /// A field that is not UTF-8.
    #[error("{origin}: field `{field}` is not valid UTF-8; save the file as UTF-8")]
    FieldUtf8 {
        origin: Origin,
        field: String,
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
    /// A policy for long rows that labelled texts do not have.
    #[error(
        "truncation = \"{policy}\": a labelled text has no turns, and its end belongs to its start; use \"right\", \"left\", \"drop\" \
         or \"refuse\""
    )]
    LabelledTruncation {
        /// The policy.
        policy: crate::truncation::Truncation,
    },
    /// A field that the format needs is absent or null.
    #[error("{origin}: field `{field}` of format {format} is missing; the record has {present}")]
    MissingField { origin: Origin, format: Format, field: String, present: String },
    /// A field of the wrong type.
    #[error("{origin}: field `{field}` must be {wanted}, found {found}")]
    WrongType { origin: Origin, field: String, wanted: &'static str, found: String },
    /// More records are bad than the policy of skipping allows.
    #[error("{path}: {bad} of {records} records cannot be used, more than the share {limit} that `data.max_bad_share` allows; mend them or raise it (the first is the cause below)", path = path.display())]
    TooManyBad {
        path: PathBuf,
        bad: usize,
        records: usize,
        limit: f64,
        #[source]
        first: Box<DataError>,
    },

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
    /// A sharegpt role that has no plain message form.
    #[error(
        "{origin}: field `{field}` has the role `{role}`, which is not one of {known}; rename it, or name the roles by `tags`"
    )]
    ShareGptRole { origin: Origin, field: String, role: String, known: String },
    /// A message whose role cannot stand where it stands.
    #[error("{origin}: field `{field}` has a message of role `{role}` {place}; {wanted} belongs there")]
    RoleOrder { origin: Origin, field: String, role: String, place: &'static str, wanted: &'static str },
    /// A pair whose two sides are the same.
    #[error(
        "{origin}: `chosen` and `rejected` are the same and there is no prompt, so the answer cannot be told from the prompt; remove the record"
    )]
    SamePair { origin: Origin },
    /// Preference data where plain examples are wanted.
    #[error(
        "{origin}: a record of format {format} has good and bad answers, and plain fine-tuning would train both; set `objective.name = \"dpo\"` (or \"kto\", of rated answers) to learn from both, or `data.preference = \"chosen\"` to train the good ones only"
    )]
    PreferenceData { origin: Origin, format: Format },

    /// Plain examples where preference data is wanted.
    #[error("{origin}: a record of format {format} is no {wanted}")]
    NotPreference { origin: Origin, format: Format, wanted: &'static str },
    /// A pair whose answers are the same.
    #[error("{origin}: `chosen` and `rejected` are the same answer, so that neither is better; remove the record")]
    SameAnswers { origin: Origin },

    // dataset_info.json
    /// A dataset_info.json that is not what it should be.
    #[error("{path}: dataset `{name}`: key `{key}` {problem}", path = path.display())]
    DatasetInfo { path: PathBuf, name: String, key: String, problem: String },
    /// A dataset that dataset_info.json does not have.
    #[error("{path}: there is no dataset `{name}`; {known}", path = path.display())]
    UnknownDataset { path: PathBuf, name: String, known: String },
    /// A dataset_info.json without a dataset's name.
    #[error("{path}: holds several datasets; name one, as {path}#NAME or by the key `name`", path = path.display())]
    NoDatasetName { path: PathBuf },

    /// A tag that does not exist.
    #[error("{path}: `tags` has the unknown key `{key}`; known are {known}", path = path.display())]
    UnknownTag { path: PathBuf, key: String, known: String },

    // The hub
    /// Not the name of a dataset or of a model.
    #[error("{path}: not the name of a {kind}; write hf://OWNER/NAME, with @REVISION and, in a dataset, /PATH behind it where wanted", path = path.display())]
    HubName { path: PathBuf, kind: &'static str },
    /// A dataset or a model that is not in the cache.
    #[error(
        "{kind} {id} of the hub (revision {revision}) is not in the cache ({cache}); put it there with `lora fetch --{kind} hf://{id}@{revision}` or `hf download --repo-type {kind} --revision {revision} {id}`, or name files"
    )]
    HubMissing { kind: &'static str, id: String, revision: String, cache: String },
    /// A split that a dataset does not have.
    #[error("dataset {id} of the hub has no file of split `{split}`; name its files, as hf://{id}/data/*.parquet")]
    HubSplit { id: String, split: String },

    // Mixing
    /// A weight that is none.
    #[error("{path}: `weight` is {weight}; it must be a number above 0 and at most 1000", path = path.display())]
    Weight { path: PathBuf, weight: f64 },

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

    // The cache of tokens
    /// A file of the cache that cannot be written to the end.
    #[error("{path}: the tokens cannot be written; make room there, name another folder by `data.cache_dir`, or set `data.cache = \"never\"`", path = path.display())]
    CacheWrite {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A file of the cache that changed after it was written.
    #[error("{path}: row {row} is not what was written; remove the file, and the tokens are made anew", path = path.display())]
    CacheDamaged { path: PathBuf, row: usize },
    /// A number of a row that does not exist.
    #[error("there is no row {row} among {rows}")]
    NoRow { row: usize, rows: usize },

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
    /// A token with an id that no model has a row for.
    #[error("{path}: a token has the id {id}; ids must be below {limit}", path = path.display())]
    VocabularySize { path: PathBuf, id: usize, limit: usize },
    /// A tokenizer whose rules could make more of a text than memory holds.
    #[error(
        "the tokenizer's `{field}` can make a text {times} times as long, and this one has {bytes} bytes; up to {limit} bytes are made; is tokenizer.json from a source that you trust?"
    )]
    TextGrowth { field: &'static str, times: u64, bytes: usize, limit: u64 },
    /// A tokenizer that puts too much around every text.
    #[error("{path}: the `post_processor` puts {tokens} tokens around a text; up to {limit} are taken", path = path.display())]
    TokensAround { path: PathBuf, tokens: usize, limit: usize },
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
    /// A chat template whose blocks and brackets cannot be told apart.
    #[error("chat template {name}: a block, a bracket or a string of it has no end")]
    TemplateUnreadable { name: String },
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
    /// A name that is neither a built-in template nor a file.
    #[error("there is no chat template `{name}`; built in are {known}; a file is named by its path, as ./{name}.jinja")]
    UnknownTemplate { name: String, known: String },
    /// Conversations, and no chat template.
    #[error(
        "{path}: the tokenizer has no chat template, and format {format} needs one; set `data.template` to a .jinja file or to the name of a built-in one, as \"chatml\"", path = path.display()
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
    /// The words of a message that are not found by writing other words in their place.
    #[error(
        "{origin}: chat template {template} writes message {message} of role `{role}` in a way that cannot be told from the text around it; take the role out of `data.train_roles`"
    )]
    RoleNotTrainable { origin: Origin, template: String, message: usize, role: String },
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
            | Self::RoleNotTrainable { .. }
            | Self::RoleIgnored { .. }
            | Self::ToolsIgnored { .. }
            | Self::LabelMismatch { .. }
            | Self::TokenOutOfRange { .. }
            | Self::TooLong { .. }) => located,
            other => Self::AtRecord { origin: origin.clone(), source: Box::new(other) },
        }
    }
}
